"""Frames of the past, as files: both readers find in them what the manifest says, for ever."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec.frames import PLENTY, allocating_at_most, tensors_of
from golden import generate
from reference.frame_reader import Corrupt, Unsupported, read_frame

from kvcached import codec, errors
from kvcached.block import BlockId, FidelityKind
from kvcached.codec import container
from kvcached_client.tensors import DTYPES

DIRECTORY = Path(__file__).resolve().parent.parent / "golden/v1"
MANIFEST: dict[str, dict[str, dict[str, Any]]] = json.loads((DIRECTORY / "MANIFEST.json").read_text())
FRAMES, ERRORS = MANIFEST["frames"], MANIFEST["errors"]
CLASSES: dict[str, tuple[type[Exception], type[Exception]]] = {
    "CorruptFrameError": (errors.CorruptFrameError, Corrupt),
    "UnsupportedFrameError": (errors.UnsupportedFrameError, Unsupported),
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def id_of(entry: dict[str, Any]) -> BlockId:
    return BlockId(bytes.fromhex(entry["model_id"]), "", bytes.fromhex(entry["block_hash"]))


def frame_of(name: str) -> bytes:
    return (DIRECTORY / f"{name}.kvf").read_bytes()


def described(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Tensors as the manifest has them."""
    return {
        name: {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha256(array.tobytes())}
        for name, array in tensors.items()
    }


def test_the_manifest_lists_every_file_and_nothing_else() -> None:
    listed = {f"{name}.kvf" for name in FRAMES} | {f"errors/{name}.kvf" for name in ERRORS} | {"MANIFEST.json"}
    assert {str(path.relative_to(DIRECTORY)) for path in DIRECTORY.rglob("*") if path.is_file()} == listed


@pytest.mark.parametrize("name", [*FRAMES, *(f"errors/{name}" for name in ERRORS)])
def test_golden_frames_are_the_bytes_they_were(name: str) -> None:
    section = "errors" if name.startswith("errors/") else "frames"
    assert sha256(frame_of(name)) == MANIFEST[section][Path(name).name]["sha256"]


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


def test_golden_frames_cover_what_a_frame_can_hold() -> None:
    tensors = [tensor for entry in FRAMES.values() for tensor in entry["tensors"].items()]
    assert {t["dtype"] for name, t in tensors if name == "keys"} == {"float16", "bfloat16", "float32"}
    assert {t["dtype"] for name, t in tensors if name not in ("keys", "values")} == set(DTYPES)
    assert any("keys" not in entry["tensors"] for entry in FRAMES.values())
    assert {entry["lineage"] for entry in FRAMES.values()} == {kind.name for kind in FidelityKind}
    assert {entry["error"] for entry in ERRORS.values()} == set(CLASSES)


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
