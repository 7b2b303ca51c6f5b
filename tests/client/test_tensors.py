"""Named arrays as one run of bytes, and back."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import same_tensors

from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.tensors import ALIGNMENT, DTYPES, MAX_TENSORS, describe, nbytes, pieces, problems, views


@st.composite
def array_maps(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """A few arrays of any dtype and shape, of any bits, some not contiguous."""
    arrays = {}
    for name in draw(st.lists(st.text("abc/é", min_size=1, max_size=4), max_size=5, unique=True)):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        seed = draw(st.integers(0, 9))
        raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
        array = raw.view(dtype).reshape(shape)
        arrays[name] = array.T if draw(st.booleans()) else array
    return arrays


def payload_of(arrays: dict[str, np.ndarray], max_bytes: int = 1 << 20) -> np.ndarray:
    return np.frombuffer(b"".join(pieces(arrays, max_bytes)), np.uint8)


@given(array_maps(), st.integers(1, 200))
def test_arrays_survive_description_and_payload(arrays: dict[str, np.ndarray], max_bytes: int) -> None:
    described = describe(arrays)
    assert problems(described) == []
    assert same_tensors(views(described, payload_of(arrays, max_bytes)), arrays)


@given(array_maps(), st.integers(1, 200))
def test_pieces_are_small_enough_and_add_up(arrays: dict[str, np.ndarray], max_bytes: int) -> None:
    sizes = [len(piece) for piece in pieces(arrays, max_bytes)]
    assert sum(sizes) == nbytes(describe(arrays))
    assert all(0 < size <= max(max_bytes, ALIGNMENT - 1) for size in sizes)


@given(array_maps())
def test_every_tensor_starts_at_a_multiple_of_64_bytes(arrays: dict[str, np.ndarray]) -> None:
    payload = payload_of(arrays)
    base = payload.__array_interface__["data"][0]
    for array in views(describe(arrays), payload).values():
        if array.size:
            assert (array.__array_interface__["data"][0] - base) % 64 == 0


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_travels_under_its_name(dtype: str) -> None:
    arrays = {"x": np.arange(6).reshape(2, 3).astype(DTYPES[dtype])}
    assert describe(arrays) == [pb.Tensor(name="x", dtype=dtype, shape=[2, 3])]
    assert same_tensors(views(describe(arrays), payload_of(arrays)), arrays)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - {"bfloat16"}))  # numpy cannot swap the bytes of this one
def test_big_endian_arrays_come_back_equal_and_little_endian(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[dtype].newbyteorder(">"))
    arrays = {"x": array, "transposed": array.T}
    again = views(describe(arrays), payload_of(arrays, max_bytes=5))
    for name, expected in arrays.items():
        assert np.array_equal(again[name], expected)
        assert again[name].dtype == DTYPES[dtype]


def test_the_layout_is_what_the_protocol_says() -> None:
    arrays = {"a": np.array([1, 2], np.uint16), "none": np.empty((3, 0), np.int8), "b": np.array([3], np.float32)}
    expected = b"\1\0\2\0" + bytes(60) + b"\0\0\x40\x40"
    assert payload_of(arrays).tobytes() == expected
    assert nbytes(describe(arrays)) == len(expected)


def test_views_are_views() -> None:
    arrays = {"x": np.arange(4, dtype=np.int32)}
    payload = payload_of(arrays)
    assert np.shares_memory(views(describe(arrays), payload)["x"], payload)


@pytest.mark.parametrize("n_bytes", [0, 15, 17])
def test_a_payload_of_another_size_raises_value_error(n_bytes: int) -> None:
    described = describe({"x": np.zeros(4, np.int32)})
    with pytest.raises(ValueError, match=f"take 16 bytes, got {n_bytes}"):
        views(described, np.zeros(n_bytes, np.uint8))


@pytest.mark.parametrize("dtype", ["complex64", "U3", "datetime64[s]", "object"])
def test_a_dtype_without_a_name_raises_value_error(dtype: str) -> None:
    with pytest.raises(ValueError, match=r"tensor 'x' has dtype .* expected one of float16"):
        describe({"x": np.zeros(1, dtype)})


def tensor(**fields: object) -> pb.Tensor:
    return pb.Tensor(**{"name": "x", "dtype": "int8", "shape": [1], **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([tensor(), tensor()], "unique and of 1 to 128 bytes, got 'x'"),
        ([tensor(name="")], "unique and of 1 to 128 bytes, got ''"),
        ([tensor(name="é" * 65)], "unique and of 1 to 128 bytes"),
        ([tensor(dtype="float8")], "dtype of 'x' must be one of float16.*, got 'float8'"),
        ([tensor(dtype="")], "dtype of 'x' must be one of"),
        ([tensor(shape=[1] * 9)], r"'x' may have 8 dimensions and \d+ values, got \[1, 1"),
        ([tensor(name=str(n)) for n in range(MAX_TENSORS + 1)], f"at most {MAX_TENSORS} tensors"),
    ],
    ids=["duplicate", "nameless", "long name", "dtype", "no dtype", "dimensions", "number"],
)
def test_problems_names_what_is_wrong(listed: list[pb.Tensor], message: str) -> None:
    (problem,) = problems(listed)
    assert re.search(message, problem)


def test_problems_finds_nothing_wrong_with_the_largest_that_is_allowed() -> None:
    assert problems([tensor(name="é" * 64, shape=[1] * 8)]) == []
    assert problems([tensor(name=str(n)) for n in range(MAX_TENSORS)]) == []


def test_an_empty_tensor_with_impossible_dimensions_is_a_problem() -> None:
    """numpy cannot make a view of it, although it takes no bytes."""
    assert problems([tensor(shape=[0, 2**32 - 1, 2**32 - 1, 2**32 - 1])]) != []
