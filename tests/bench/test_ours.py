"""Our codec under test is the daemon's own: whole frames there and back, every byte counted."""

import json

import numpy as np
import pytest
from ours import Ours, calibration, entropy_bits, entropy_overhead, output_metric, spec
from reference_model import DATA, ReferenceModel, windows
from under_test import Half

from kvcached import codec
from kvcached.block import BlockId, KVBlock
from kvcached.calibration import Calibration

pytestmark = pytest.mark.slow  # runs the reference model
MODEL = ReferenceModel()


@pytest.fixture(scope="module")
def calibrated() -> Calibration:
    return calibration(MODEL, 6, n_windows=4, n_tokens=512)


@pytest.fixture(scope="module")
def block() -> tuple[Half, Half]:
    """The first block of a text that was not calibrated on."""
    added = MODEL.run(windows("heldout", 1, 257)[0][:256]).added
    return added.keys.astype(np.float16), added.values.astype(np.float16)


def test_more_compression_is_fewer_bytes_and_more_error(calibrated: Calibration, block: tuple[Half, Half]) -> None:
    coded = [ours(*block, 0) for ours in Ours.family(calibrated, (4, 8, 16, 32))]
    errors = [np.square(c.values.astype(np.float64) - block[1]).sum() for c in coded]
    assert (np.diff([c.bits for c in coded]) < 0).all()
    assert (np.diff(errors) > 0).all()


def test_every_byte_of_the_frame_counts(calibrated: Calibration, block: tuple[Half, Half]) -> None:
    (ours,) = Ours.family(calibrated, [8])
    tensors = {"keys": block[0], "values": block[1]}
    frame = codec.encode(BlockId(bytes(32), "", bytes(32)), KVBlock.dense(tensors, 256, 512), coder=ours.coder)
    coded = ours(*block, 512)
    assert coded.bits == 8 * len(frame)
    assert 0.9 * coded.bits < coded.paper_bits < coded.bits
    assert coded.paper_values == block[0].size + block[1].size


def test_sinks_are_exact_and_counted(calibrated: Calibration, block: tuple[Half, Half]) -> None:
    (ours,) = Ours.family(calibrated, [8])
    first, later = (ours(*block, position) for position in (0, 256))
    assert np.array_equal(first.keys[:, :, :4], block[0][:, :, :4])
    assert np.array_equal(first.values[:, :, :4], block[1][:, :, :4])
    assert not np.array_equal(later.keys[:, :, :4], block[0][:, :, :4])
    assert first.paper_values == later.paper_values * 252 / 256


def test_the_output_metric_is_the_norm_of_what_a_value_adds(block: tuple[Half, Half]) -> None:
    value = block[1][3, 1, 7].astype(np.float32)
    heads = np.zeros((4, 64), np.float32)
    per_head = []
    for head in (2, 3):  # those that read KV head 1
        heads[:] = 0
        heads[head] = value
        per_head.append(np.square(MODEL.output_projection(3) @ heads.reshape(-1)).sum())
    assert value @ output_metric(MODEL)[3, 1] @ value == pytest.approx(sum(per_head), rel=1e-3)


def test_the_entropy_that_symbols_are_held_against_is_that_of_their_own_histogram() -> None:
    assert entropy_bits(np.array([0, 1, 2, 3] * 8)) == pytest.approx(2 * 32)
    assert entropy_bits(np.zeros(100, np.int32)) == 0


def test_no_code_beats_the_entropy(calibrated: Calibration, block: tuple[Half, Half]) -> None:
    one, other = ((x[:, :, :128], x[:, :, 128:]) for x in block)
    halves = [(one[0], other[0], 256), (one[1], other[1], 384)]
    assert entropy_overhead(Ours.family(calibrated, [8])[0], halves) > 0


def test_the_reference_model_is_described_as_it_is() -> None:
    assert spec().problems() == []
    assert spec().dense_shapes()["keys"] == (6, 2, 256, 64)


def test_what_is_calibrated_on_and_what_is_measured_on_share_no_text() -> None:
    texts = {
        part: [json.loads(line)["text"] for line in (DATA / f"text/{part}.jsonl").read_text().splitlines()]
        for part in ("calibration", "heldout")
    }
    paragraphs = {
        part: {paragraph for text in found for paragraph in text.split("\n\n") if len(paragraph) > 200}
        for part, found in texts.items()
    }
    assert all(len(found) > 200 for found in paragraphs.values())
    assert not set(texts["calibration"]) & set(texts["heldout"])
    assert not paragraphs["calibration"] & paragraphs["heldout"]
