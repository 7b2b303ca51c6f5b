"""Frames and bundles of the past, as files: both readers find in them what the manifest says, for ever."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec.agreement import disagreements, packed, same_rows
from codec.frames import PLENTY, allocating_at_most, tensors_of
from golden import coded, compacted, generate
from reference.bundle_reader import read_bundle
from reference.coded_reader import read_coded
from reference.compacted_reader import read_compacted
from reference.frame_reader import Corrupt, Unsupported, read_frame

from kvcached import codec, errors
from kvcached.block import BlockId, FidelityKind
from kvcached.codec import compaction, container, entropy
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import Compactor
from kvcached.codec.container import SectionKind
from kvcached.codec.tables import SIDES
from kvcached_client.tensors import DTYPES

DIRECTORY = Path(__file__).resolve().parent.parent / "golden/v1"
MANIFEST: dict[str, dict[str, dict[str, Any]]] = json.loads((DIRECTORY / "MANIFEST.json").read_text())
FRAMES, ERRORS = MANIFEST["frames"], MANIFEST["errors"]
BUNDLES, BUNDLE_ERRORS = MANIFEST["bundles"], MANIFEST["bundle_errors"]
CODED, CODED_ERRORS = MANIFEST["coded"], MANIFEST["coded_errors"]
COMPACTED, COMPACTED_ERRORS = MANIFEST["compacted"], MANIFEST["compacted_errors"]
CLASSES: dict[str, tuple[type[Exception], type[Exception]]] = {
    "CorruptFrameError": (errors.CorruptFrameError, Corrupt),
    "UnsupportedFrameError": (errors.UnsupportedFrameError, Unsupported),
    "CorruptBundleError": (errors.CorruptBundleError, Corrupt),
    "UnsupportedBundleError": (errors.UnsupportedBundleError, Unsupported),
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def id_of(entry: dict[str, Any]) -> BlockId:
    return BlockId(bytes.fromhex(entry["model_id"]), "", bytes.fromhex(entry["block_hash"]))


def frame_of(name: str) -> bytes:
    return (DIRECTORY / f"{name}.kvf").read_bytes()


def bundle_of(entry: dict[str, Any]) -> bytes:
    return (DIRECTORY / "bundles" / f"{entry['bundle']}.safetensors").read_bytes()


def compactor_of(entry: dict[str, Any]) -> Compactor:
    return Bundle.unpack(bundle_of(entry)).compactor(entry["profile"], entry["am_ratio"])


def decoded_frame_of(name: str, part: str = "coded") -> bytes:
    return (DIRECTORY / f"{part}/{name}.decoded.kvf").read_bytes()


def described(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Tensors as the manifest has them."""
    return {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha256(array.tobytes())}
        for name, array in tensors.items()
    }


def test_the_manifest_lists_every_file_and_nothing_else() -> None:
    listed = {generate.FILES[name].path for part in MANIFEST.values() for name in part}
    listed |= {f"{part}/{name}.decoded.kvf" for part in ("coded", "compacted") for name in MANIFEST[part]}
    listed |= {"MANIFEST.json"}
    assert {str(path.relative_to(DIRECTORY)) for path in DIRECTORY.rglob("*") if path.is_file()} == listed


@pytest.mark.parametrize("name", [name for part in MANIFEST.values() for name in part])
def test_golden_files_are_the_bytes_they_were(name: str) -> None:
    golden = generate.FILES[name]
    assert sha256((DIRECTORY / golden.path).read_bytes()) == MANIFEST[golden.part][name]["sha256"]
    if golden.part in ("coded", "compacted"):
        assert sha256(decoded_frame_of(name, golden.part)) == MANIFEST[golden.part][name]["decoded_sha256"]


@pytest.mark.parametrize("name", FRAMES)
def test_golden_frames_decode_to_what_they_were_made_of(name: str) -> None:
    frame, entry = frame_of(name), FRAMES[name]
    block = codec.decode(id_of(entry), frame, PLENTY)
    assert described(block.to_tensors()) == entry["tensors"]
    assert (block.first_position, block.n_source_tokens) == (entry["first_position"], entry["n_source_tokens"])
    assert container.unpack(frame, PLENTY)[0].lineage == FidelityKind[entry["lineage"]]


@pytest.mark.parametrize("name", FRAMES)
def test_the_second_reader_finds_the_same_in_golden_frames(name: str) -> None:
    found, entry = read_frame(frame_of(name)), FRAMES[name]
    assert described(tensors_of(found["sections"])) == entry["tensors"]
    for field in ("first_position", "n_source_tokens"):
        assert found[field] == entry[field]
    assert BlockId(found["model_id"], "", found["block_hash"]) == id_of(entry)
    assert found["lineage"] == FidelityKind[entry["lineage"]]


@pytest.mark.parametrize("name", ERRORS)
def test_golden_errors_are_refused_by_both_readers_for_the_same_reason(name: str) -> None:
    frame, (first, second) = frame_of(f"errors/{name}"), CLASSES[ERRORS[name]["error"]]
    with allocating_at_most(1 << 18):
        with pytest.raises(first):
            codec.decode(id_of(ERRORS[name]), frame, PLENTY)
        with pytest.raises(second):
            read_frame(frame)


@pytest.mark.parametrize("name", BUNDLES)
def test_golden_bundles_are_read_by_both_readers_and_written_again(name: str) -> None:
    file = (DIRECTORY / f"bundles/{name}.safetensors").read_bytes()
    assert len(file) < 100_000
    bundle, second = Bundle.unpack(file), read_bundle(file)
    assert bundle.bundle_id.hex() == second["id"].hex() == BUNDLES[name]["id"]
    assert bundle.pack() == file
    assert set(bundle.profiles) == set(second["profiles"])


@pytest.mark.parametrize("name", CODED)
def test_both_readers_find_the_symbols_of_golden_coded_frames_bit_for_bit(name: str) -> None:
    frame, entry = frame_of(f"coded/{name}"), CODED[name]
    assert coded.symbols_entry(coded.symbols_of(frame, Bundle.unpack(bundle_of(entry)))) == entry["symbols"]
    assert coded.symbols_entry(read_coded(frame, bundle_of(entry))["symbols"]) == entry["symbols"]


@pytest.mark.parametrize("name", CODED)
def test_golden_coded_frames_decode_to_what_they_did_within_the_tolerance(name: str) -> None:
    frame, entry = frame_of(f"coded/{name}"), CODED[name]
    block = codec.decode(id_of(entry), frame, PLENTY, Bundle.unpack(bundle_of(entry)).coder(entry["profile"]))
    second = read_coded(frame, bundle_of(entry))
    for tensors in (block.to_tensors(), codec.decode(id_of(entry), decoded_frame_of(name), PLENTY).to_tensors()):
        assert disagreements(tensors, second) == []
    for field in ("first_position", "n_source_tokens"):
        assert getattr(block, field) == second[field] == entry[field]
    assert second["lineage"] == FidelityKind[entry["lineage"]]


@pytest.mark.parametrize("name", CODED_ERRORS)
def test_golden_coded_errors_are_refused_by_both_readers_for_the_same_reason(name: str) -> None:
    frame, entry = frame_of(f"errors/{name}"), CODED_ERRORS[name]
    (first, second), coder = CLASSES[entry["error"]], Bundle.unpack(bundle_of(entry)).coder(entry["profile"])
    with pytest.raises(first):
        codec.decode(id_of(entry), frame, PLENTY, coder)
    with pytest.raises(second):
        read_coded(frame, bundle_of(entry))


@pytest.mark.parametrize("name", COMPACTED)
def test_both_readers_find_the_symbols_of_golden_compacted_frames_bit_for_bit(name: str) -> None:
    frame, entry = frame_of(f"compacted/{name}"), COMPACTED[name]
    compactor = compactor_of(entry)
    block = codec.decode(id_of(entry), frame, PLENTY, compactor)
    assert coded.symbols_entry(compacted.symbols_of(frame, compactor, block)) == entry["symbols"]
    assert coded.symbols_entry(read_compacted(frame, bundle_of(entry))["symbols"]) == entry["symbols"]


@pytest.mark.parametrize("name", COMPACTED)
def test_both_readers_find_the_tokens_and_biases_of_golden_compacted_frames(name: str) -> None:
    frame, entry = frame_of(f"compacted/{name}"), COMPACTED[name]
    block = codec.decode(id_of(entry), frame, PLENTY, compactor_of(entry))
    second = read_compacted(frame, bundle_of(entry))
    assert same_rows(block, second)
    assert second["lengths"].tolist() == entry["lengths"]
    assert second["positions"].tolist() == entry["positions"]
    assert (16 * second["bias"]).tolist() == entry["sixteenths"]
    for field in ("first_position", "n_source_tokens"):
        assert getattr(block, field) == second[field] == entry[field]
    assert second["lineage"] == FidelityKind[entry["lineage"]]


@pytest.mark.parametrize("name", COMPACTED)
def test_golden_compacted_frames_decode_to_what_they_did_within_the_tolerance(name: str) -> None:
    frame, entry = frame_of(f"compacted/{name}"), COMPACTED[name]
    second = read_compacted(frame, bundle_of(entry))
    found = packed(codec.decode(id_of(entry), frame, PLENTY, compactor_of(entry)))
    assert disagreements(found, second) == []
    of_the_past = codec.decode(id_of(entry), decoded_frame_of(name, "compacted"), PLENTY).to_tensors()
    rows = {tensor.removeprefix("kept/"): array for tensor, array in of_the_past.items()}
    assert disagreements({**found, **rows}, second) == []


@pytest.mark.parametrize("name", COMPACTED_ERRORS)
def test_golden_compacted_errors_are_refused_by_both_readers_for_the_same_reason(name: str) -> None:
    frame, entry = frame_of(f"errors/{name}"), COMPACTED_ERRORS[name]
    (first, second), compactor = CLASSES[entry["error"]], compactor_of(entry)
    entropy.warm()  # what compiling takes is no affair of the frame
    with allocating_at_most(1 << 18), pytest.raises(first):
        codec.decode(id_of(entry), frame, PLENTY, compactor)
    with pytest.raises(second):
        read_compacted(frame, bundle_of(entry))


@pytest.mark.parametrize("name", [name for name, entry in COMPACTED.items() if any(entry["sixteenths"])])
def test_a_stored_frame_whose_biases_are_removed_or_overwritten_is_refused(name: str) -> None:
    frame, entry = frame_of(f"compacted/{name}"), COMPACTED[name]
    header, sections = container.unpack(frame, PLENTY)
    payload = next(bytes(s.payload) for s in sections if s.kind == SectionKind.BIAS)
    removed = container.pack(header, [s for s in sections if s.kind != SectionKind.BIAS])
    for damaged in (removed, frame.replace(payload, bytes(len(payload)))):
        assert damaged != frame
        with pytest.raises(errors.CorruptFrameError):
            codec.decode(id_of(entry), damaged, PLENTY, compactor_of(entry))
        with pytest.raises(Corrupt):
            read_compacted(damaged, bundle_of(entry))


@pytest.mark.parametrize("name", [name for name, entry in COMPACTED.items() if any(entry["sixteenths"])])
def test_a_stored_frame_with_biases_of_0_under_right_checksums_is_told_by_what_queries_miss(name: str) -> None:
    frame, entry, made = frame_of(f"compacted/{name}"), COMPACTED[name], compacted.FRAMES[name]
    compactor, block = compactor_of(entry), made.text.block()
    zeroed = coded.changed(frame, compacted.with_tensor(SectionKind.BIAS, np.zeros_like))
    missed = []
    for stored in (frame, zeroed):
        found = codec.decode(id_of(entry), stored, PLENTY, compactor)
        queries = codec.reservoir(block, compactor)
        missed.append(compaction.errors(found, block, compactor.spec, queries, compactor.output_metric)[0])
    assert not codec.decode(id_of(entry), zeroed, PLENTY, compactor).bias.any()
    assert read_compacted(zeroed, bundle_of(entry))["bias"].tolist() != [n / 16 for n in entry["sixteenths"]]
    assert missed[1] > 1.1 * missed[0]


@pytest.mark.parametrize("name", BUNDLE_ERRORS)
def test_golden_bundle_errors_are_refused_by_both_readers_for_the_same_reason(name: str) -> None:
    file = (DIRECTORY / f"errors/{name}.safetensors").read_bytes()
    first, second = CLASSES[BUNDLE_ERRORS[name]["error"]]
    with pytest.raises(first):
        Bundle.unpack(file)
    with pytest.raises(second):
        read_bundle(file)


def test_golden_coded_frames_cover_what_a_coded_frame_can_hold() -> None:
    kinds, streams, scales, largest = set(), set(), set(), []
    for name, entry in CODED.items():
        coder = Bundle.unpack(bundle_of(entry)).coder(entry["profile"])
        planes = {container.SectionKind.KEY_PLANE: coder.keys, container.SectionKind.VALUE_PLANE: coder.values}
        for section in container.unpack(frame_of(f"coded/{name}"), PLENTY)[1]:
            kinds.add(section.kind.name)
            if section.kind in planes:
                used = planes[section.kind][section.layer].tables.scales
                width, n_escapes = section.payload[0], int.from_bytes(section.payload[1:5], "little")
                form = "none" if not section.shape[0] * len(used) else "coded"
                form = "raw" if form == "coded" and n_escapes == section.shape[0] * len(used) else form
                streams.add((form, width, n_escapes > 0))
                scales |= set(used.tolist()) if form == "coded" else set()
        block = codec.decode(id_of(entry), frame_of(f"coded/{name}"), PLENTY, coder)
        largest.append(float(np.abs(block.values.astype(np.float64)).max()))
    assert kinds == {"SINK_KEYS", "SINK_VALUES", "KEY_PLANE", "VALUE_PLANE", "OPAQUE"}
    assert {form for form, _, _ in streams} == {"none", "raw", "coded"}
    assert {(form, width) for form, width, escaped in streams if escaped} >= {("coded", 2), ("coded", 4), ("raw", 1)}
    assert min(scales) < 42 <= max(scales) - 6  # narrow and wide ones
    assert max(largest) == 65504
    assert {entry["lineage"] for entry in CODED.values()} == {kind.name for kind in FidelityKind}


def test_golden_compacted_frames_cover_what_a_compacted_frame_can_hold() -> None:
    kinds, forms, together = set(), set(), set()
    for name, entry in COMPACTED.items():
        block = codec.decode(id_of(entry), frame_of(f"compacted/{name}"), PLENTY, compactor_of(entry))
        symbols = compacted.symbols_of(frame_of(f"compacted/{name}"), compactor_of(entry), block)
        together |= {len(plane.heads) for plane in compactor_of(entry).planes}
        for section in container.unpack(frame_of(f"compacted/{name}"), PLENTY)[1]:
            kinds.add(section.kind.name)
            if section.kind in (SectionKind.KEY_ROWS, SectionKind.VALUE_ROWS):
                n = len(symbols["keys" if section.kind == SectionKind.KEY_ROWS else "values"])
                n_escapes = int.from_bytes(section.payload[1:5], "little")
                forms.add("none" if not n else "raw" if n_escapes == n else "escapes" if n_escapes else "coded")
    assert kinds == {"SINK_KEYS", "SINK_VALUES", "KEPT", "BIAS", "KEY_ROWS", "VALUE_ROWS", "OPAQUE"}
    assert forms == {"none", "raw", "escapes", "coded"}
    assert together == {1, 2}
    unequal = [entry for entry in COMPACTED.values() if len(set(entry["lengths"])) > 1]
    assert {entry["profile"] for entry in unequal} == {"x8", "x16"}
    assert {entry["first_position"] > 3 for entry in unequal} == {True, False}
    assert any(entry["n_source_tokens"] in entry["lengths"] for entry in unequal)
    assert all(any(entry["sixteenths"]) for entry in unequal)
    biases = {bias for entry in unequal for bias in entry["sixteenths"]}
    assert min(biases) < 0 < max(biases) == 48
    assert {entry["lineage"] for entry in COMPACTED.values()} == {kind.name for kind in FidelityKind}


def test_golden_compacted_frames_cover_planes_with_and_without_leaders_and_predictors() -> None:
    found: dict[str, set[str]] = {side: set() for side in SIDES}
    for entry in COMPACTED.values():
        for plane in compactor_of(entry).planes:
            heads = "heads" if len(plane.heads) > 1 else "head"
            whose = "free" if plane.leader is None else "led"
            for side in SIDES:
                found[side].add(f"{heads} {whose} {'predicted' if side in plane.predictors else 'alone'}")
    led = {"head led alone", "head led predicted", "heads led predicted"}
    assert found["keys"] == led | {"head free alone", "heads free alone"}
    assert found["values"] == led | {"head free alone", "head free predicted", "heads free predicted"}


def test_golden_frames_cover_what_a_frame_can_hold() -> None:
    tensors = [tensor for entry in FRAMES.values() for tensor in entry["tensors"].items()]
    assert {t["dtype"] for name, t in tensors if name == "keys"} == {"float16", "bfloat16", "float32"}
    assert {t["dtype"] for name, t in tensors if name not in ("keys", "values")} == set(DTYPES)
    assert any("keys" not in entry["tensors"] for entry in FRAMES.values())
    assert {entry["lineage"] for entry in FRAMES.values()} == {kind.name for kind in FidelityKind}
    assert {entry["error"] for entry in ERRORS.values()} == {"CorruptFrameError", "UnsupportedFrameError"}


def test_golden_frames_hold_raw_and_compressed_planes() -> None:
    sizes = {}
    for name in ("incompressible", "compressible"):
        n_bytes = sum(len(section.payload) for section in container.unpack(frame_of(name), PLENTY)[1])
        array_bytes = codec.decode(id_of(FRAMES[name]), frame_of(name), PLENTY).nbytes
        sizes[name] = n_bytes / array_bytes
    assert sizes["incompressible"] > 1
    assert sizes["compressible"] < 0.2


def test_the_generator_never_writes_a_frame_again(tmp_path: Path) -> None:
    generate.main(["float16", "cut"], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 3
    for names in ([], ["float16"], ["bfloat16", "cut"], ["no such frame"]):
        with pytest.raises(SystemExit):
            generate.main(names, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_generator_does_not_replace_a_frame_that_was_lost(tmp_path: Path) -> None:
    generate.main(["float16"], tmp_path)
    (tmp_path / "float16.kvf").unlink()
    with pytest.raises(SystemExit):
        generate.main(["float16"], tmp_path)
    assert not (tmp_path / "float16.kvf").exists()
