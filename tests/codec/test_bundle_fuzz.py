"""Bundle files with hostile headers, and a fuzz of bundle files: one of two answers, and no memory for claims."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from codec.frames import allocating_at_most
from codec.recipes import HALVES, SMALL, Recipe, canonical, content_of, file_of, measured, model, sealed
from codec.test_bad_bundles import NEVER, assert_corrupt, content, taken_or_refused
from reference.bundle_reader import read_bundle
from reference.frame_reader import Corrupt
from safetensors.numpy import load

from kvcached.block import Fingerprint, RopeSpec
from kvcached.codec import bundle as module
from kvcached.codec.bundle import Bundle
from kvcached.codec.klt import Basis
from kvcached.codec.tables import Profile, Tables
from kvcached.errors import CorruptBundleError, UnsupportedBundleError

BUNDLE = SMALL.bundle().with_measured({"x8": measured()})
FILE = BUNDLE.pack()
TENSORS = load(FILE)
HEADER_END = 8 + int.from_bytes(FILE[:8], "little")
FAIR = 8 * len(FILE)  # bytes that reading it may take, whatever it says

# Seeds of files that are refused as none below 400 is, or that were once neither taken nor refused.
KEPT = [
    *(
        402,
        408,
        448,
        450,
        456,
        465,
        472,
        490,
        517,
        545,
        565,
        571,
        576,
        635,
        639,
        655,
        727,
        745,
        750,
        795,
        832,
        837,
        909,
    ),
    *(
        1174,
        1218,
        1221,
        1272,
        1349,
        1350,
        1355,
        1366,
        1592,
        1670,
        1685,
        1710,
        1737,
        2041,
        2137,
        2172,
        2761,
        2326,
        2640,
        2786,
    ),
]
# ---- claims cost nothing


def claims() -> dict[str, Callable[[dict[str, Any]], None]]:
    def shape(*dims: int) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["keys.0.forward"].update(shape=list(dims))

    def offsets(*ends: int) -> Callable[[dict[str, Any]], None]:
        return lambda header: header["keys.0.forward"].update(data_offsets=list(ends))

    return {
        "huge": shape(1 << 40, 1 << 20),
        "overflowing": shape(1 << 63, 2),
        "beyond u64": shape(1 << 70),
        "huge times nothing": shape(0, 1 << 60),
        "negative": shape(-1, 16),
        "many dims": shape(*[1] * 100_000),
        "far away": offsets(1 << 40, (1 << 40) + 512),
        "long": offsets(0, 1 << 50),
        "backwards": offsets(512, 0),
        "overlapping": offsets(0, 512),
    }


@pytest.mark.parametrize("claim", claims())
def test_what_a_header_claims_costs_no_memory(claim: str) -> None:
    header = json.loads(FILE[8:HEADER_END])
    claims()[claim](header)
    file = file_of(header, FILE[HEADER_END:])
    with allocating_at_most(FAIR + 40 * len(file)), pytest.raises(CorruptBundleError):
        Bundle.unpack(file)


def test_a_header_longer_than_any_bundle_needs_is_not_parsed() -> None:
    file = file_of(b"[" + b"[]," * (5 << 19) + b"[]]")
    with allocating_at_most(1 << 20), pytest.raises(CorruptBundleError, match="not a safetensors file"):
        Bundle.unpack(file)
    with pytest.raises(Corrupt):
        read_bundle(file)


@pytest.mark.parametrize("claimed", [1 << 20, 1 << 40, (1 << 64) - 1, len(FILE) - 7, 0, 1])
def test_a_header_size_that_lies_is_corrupt_and_costs_nothing(claimed: int) -> None:
    file = claimed.to_bytes(8, "little") + FILE[8:]
    with allocating_at_most(1 << 18), pytest.raises(CorruptBundleError):
        Bundle.unpack(file)


def test_a_file_above_the_bound_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", len(FILE))
    assert Bundle.unpack(FILE).bundle_id == BUNDLE.bundle_id
    monkeypatch.setattr(module, "MAX_BYTES", len(FILE) - 1)
    with pytest.raises(CorruptBundleError, match="at most"):
        Bundle.unpack(FILE)


def test_reading_takes_a_small_multiple_of_the_file() -> None:
    file = Recipe(model((HALVES,) * 8, n_heads=4), layers_per_group=8).bundle().pack()
    with allocating_at_most(8 * len(file) + (1 << 18)):
        Bundle.unpack(file)


@pytest.mark.parametrize("n_layers", [1024, 1025])
def test_the_largest_model_fits_into_the_header(n_layers: int) -> None:
    spec = model((RopeSpec(8, 1e4, scaling_json='{"factor":4.0,"type":"linear"}'),), n_heads=1, key_dim=8, value_dim=1)
    spec = replace(spec, layers=spec.layers[:1] * n_layers, fingerprint=Fingerprint(*["f" * 64] * 4))
    one = Basis(np.zeros(8, np.float32), *(np.ones(s, np.float32) for s in ((8, 1), (1, 8), 1)))
    small = Basis(*(np.ones(s, np.float32) for s in (1, (1, 1), (1, 1), 1)))
    tables = (Tables(np.ones(1, np.float32), np.zeros(1, np.uint8)),) * n_layers
    profiles = {name: Profile(8.0, 0.5, 0.0, tables, tables) for name in module.PROFILES}
    bundle = Bundle(spec, 1, (one,) * n_layers, (small,) * n_layers, profiles)
    if n_layers > 1024:
        assert_corrupt(bundle.pack(), "layers")
    else:
        assert taken_or_refused(bundle.pack()) is not None


# ---- fuzz: a few random changes to content, text or tensors, under right checksums


def mutated(seed: int) -> bytes:
    """A bundle file with one or two things wrong. The same for ever for a seed."""
    rng = np.random.default_rng(seed)
    found, tensors = content(), dict(TENSORS)
    for _ in range(rng.integers(1, 3)):
        if rng.random() < 0.6:
            spoil(rng, found)
        else:
            name = str(rng.choice(sorted(tensors)))
            if (wrong := wrong_tensor(rng, tensors.pop(name))) is not None:
                tensors[name] = wrong
    if rng.random() < 0.7:
        return sealed(found, tensors)
    text = bytearray(canonical(content_of(sealed(found, tensors))))
    text[rng.integers(len(text))] = rng.integers(32, 127)
    return sealed(found, tensors, text.decode())


def spoil(rng: np.random.Generator, content: Any) -> None:
    """Goes down at random, and changes, removes or adds something there."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[rng.integers(len(keys))]
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    value = NEVER[rng.integers(len(NEVER))]
    match rng.integers(4):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[str(value)[:5]] = value
        case 2 if type(place[key]) in (int, float):
            place[key] = place[key] * float(rng.choice([0, 2, 0.5, -1])) if rng.random() < 0.5 else place[key] + 1
        case _:
            place[key] = value


def wrong_tensor(rng: np.random.Generator, array: np.ndarray) -> np.ndarray | None:
    """Another shape, dtype or number; None: it is gone."""
    changed = array.copy()
    match rng.integers(6):
        case 0:
            return None
        case 1:
            return changed[: rng.integers(len(changed))]
        case 2:
            return changed.astype([np.float16, np.float32, np.float64, np.int8, np.uint8][rng.integers(5)])
        case 3:
            return changed.T.copy()
        case _:
            changed.view(np.uint8).reshape(-1)[rng.integers(changed.nbytes)] ^= 1 << int(rng.integers(8))
            return changed


def assert_lawful(seed: int) -> bool:
    """Whether the file of a seed is taken, by both readers or none."""
    file = mutated(seed)
    taken = taken_or_refused(file) is not None
    with allocating_at_most(FAIR + (1 << 18)), suppress(CorruptBundleError, UnsupportedBundleError):
        Bundle.unpack(file)
    return taken


@pytest.mark.parametrize("seed", KEPT)
def test_bundles_wrong_in_a_way_of_their_own_are_taken_or_refused(seed: int) -> None:
    assert_lawful(seed)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # in the test, float16 made of steps
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_bundles_with_a_few_things_wrong_are_taken_or_refused_by_both_readers_and_cost_little() -> None:
    taken = sum(assert_lawful(seed) for seed in range(400))
    assert 20 < taken < 380  # both happen: the changes are neither too small nor too coarse


@pytest.mark.slow
def test_many_bundles_with_a_few_things_wrong_are_taken_or_refused_by_both_readers_and_cost_little() -> None:
    for seed in range(400, 2400):
        assert_lawful(seed)
