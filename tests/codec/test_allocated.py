"""Blocks are decoded into memory that the caller names, and nowhere else."""

import numpy as np
import pytest
from codec.frames import BLOCK_ID, PLENTY, Wire, wires
from codec.recipes import SMALL, Text
from hypothesis import given
from support import same_tensors

from kvcached import codec
from kvcached.codec import container, lossless
from kvcached.codec.bundle import Coder

X8 = SMALL.bundle().coder("x8")
GARBAGE = 0xA5


class Arena:
    """Memory that holds garbage, handed out tensor by tensor."""

    def __init__(self) -> None:
        self.given: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        assert name not in self.given
        size = int(np.prod(shape)) * dtype.itemsize
        self.given[name] = np.full(size, GARBAGE, np.uint8).view(dtype).reshape(shape)
        return self.given[name]


def check_decoded_into_arena(frame: bytes, coder: Coder | None = None) -> None:
    arena = Arena()
    tensors = codec.decode(BLOCK_ID, frame, PLENTY, coder, arena).to_tensors()
    assert set(arena.given) == set(tensors)
    for name, array in tensors.items():
        assert array.ctypes.data == arena.given[name].ctypes.data
    assert same_tensors(tensors, codec.decode(BLOCK_ID, frame, PLENTY, coder).to_tensors())


@given(wires())
def test_every_tensor_of_an_exact_block_lies_where_it_was_told_to(wire: Wire) -> None:
    check_decoded_into_arena(codec.encode(BLOCK_ID, wire.block()))


@pytest.mark.parametrize("first_position", [0, 2, 64])
@pytest.mark.parametrize("opaque", [False, True])
def test_every_tensor_of_a_coded_block_lies_where_it_was_told_to(first_position: int, opaque: bool) -> None:
    block = Text(SMALL.spec, 12, first_position, seed=1, opaque=opaque).block()
    check_decoded_into_arena(codec.encode(BLOCK_ID, block, coder=X8), X8)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_decode_into_fills_every_byte(itemsize: int) -> None:
    array = np.arange(60, dtype=f"<u{itemsize}").reshape(3, 4, 5)
    found = np.full_like(array, GARBAGE)
    lossless.decode_into(lossless.encode(array, 1), found, lossless.decompressor())
    assert np.array_equal(found, array)


def test_memory_in_which_nothing_would_arrive_is_refused() -> None:
    array = np.zeros((4, 6), np.uint16)
    with pytest.raises(ValueError, match="C-contiguous"):
        lossless.decode_into(lossless.encode(array.T.copy(), 1), array.T, lossless.decompressor())


def test_one_decompressor_serves_many_tensors() -> None:
    zstd, zeros = lossless.decompressor(), np.zeros(5000, np.uint16)
    for n in range(5):
        found = np.full_like(zeros, GARBAGE)
        lossless.decode_into(lossless.encode(zeros + np.uint16(n), 1), found, zstd)
        assert (found == n).all()


def test_frames_that_are_refused_ask_for_no_memory() -> None:
    block = Text(SMALL.spec, 12, 0, seed=1).block()
    header, sections = container.unpack(codec.encode(BLOCK_ID, block), PLENTY)
    for wrong in (sections[:-1], sections[::-1], [*sections, sections[-1]]):
        arena = Arena()
        with pytest.raises(codec.CorruptFrameError):
            codec.decode(BLOCK_ID, container.pack(header, wrong), PLENTY, None, arena)
        assert not arena.given
