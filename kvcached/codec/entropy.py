"""Integer symbols to bytes and back: interleaved rANS (rans.py) with tables out of a fixed family.

    stream := width:u8 n_escapes:u32 escape:int[n_escapes]  (state:u32[32] word:u16*)

Symbols run component by component, rows within. A component is coded with one of 64 tables, which a bundle names by
index; symbols that the table does not reach escape, and stand in order as integers of `width` (1, 2 or 4) bytes. Where
coding does not pay, all symbols escape and nothing follows them.

The tables are Laplacian distributions rounded to integers, made below by integer arithmetic alone: no float decides a
bit, and a stream decodes alike on every machine. A test pins them; a change would be a new coding.
"""

import struct
from functools import cache
from math import isqrt

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64, UInt8

from kvcached.codec import rans
from kvcached.errors import CorruptFrameError

N_SCALES = 64
_HEADER = struct.Struct("<BI")
_WIDTHS = (1, 2, 4)
_STATES_BYTES = 4 * rans.N_LANES
_ESCAPE_BITS = 8  # what choose_scale reckons with: most escapes fit in one byte
_TOTAL = 1 << rans.TABLE_BITS
_N_INDICES = 128
# The mean magnitude of scale i is 2^(-11 + i/3): thirds of an octave in units of 2^-27, from 1/2048 to 1024.
_THIRDS = (65536, 82570, 104032)
_FIRST_WIDE = 42  # from a mean of 8 on, rounded to multiples so that 4 to 8 of them are left
_ONE = 1 << 60


def choose_scale(symbols: Int32[np.ndarray, "n_rows n_components"]) -> UInt8[np.ndarray, "n_components"]:
    """For each component the scale index that codes it in the fewest bits; of equals the smallest."""
    best = np.zeros(symbols.shape[1], np.uint8)
    for component, column in enumerate(symbols.T):
        values, counts = np.unique(column, return_counts=True)
        best[component] = np.argmin(_bits(values) @ counts)
    return best


def encode(symbols: Int32[np.ndarray, "n_rows n_components"], scale_index: UInt8[np.ndarray, "n_components"]) -> bytes:
    """The stream of one matrix of symbols; quickest if that lies in memory column by column, as from `decode`.

    Raises:
        ValueError: a scale index of 64 or more.
    """
    _check(scale_index)
    columns = np.ascontiguousarray(symbols.T)
    states = np.empty(rans.N_LANES, np.int64)
    words, escapes = np.empty(rans.MAX_WORDS * columns.size + 1, np.uint16), np.empty(columns.size, np.int32)
    word, escape = rans.compiled().encode(columns, scale_index, tables(), states, words, escapes)
    narrow = _narrow(escapes[escape:])
    if _width(columns) * columns.size <= narrow.nbytes + _STATES_BYTES + 2 * (len(words) - word):
        raw = _narrow(columns.reshape(-1))
        return _HEADER.pack(raw.itemsize, raw.size) + raw.tobytes()
    coded = states.astype("<u4").tobytes() + words[word:].astype("<u2").tobytes()
    return _HEADER.pack(narrow.itemsize, narrow.size) + narrow.tobytes() + coded


def decode(
    stream: bytes | memoryview, n_rows: int, scale_index: UInt8[np.ndarray, "n_components"]
) -> Int32[np.ndarray, "n_rows n_components"]:
    """Inverse of `encode`. Allocates what the shape says and no more than the stream: the caller has bounded both.

    Raises:
        CorruptFrameError: the stream is not what `encode` makes of so many rows and components.
        ValueError: a scale index of 64 or more.
    """
    _check(scale_index)
    n_symbols = n_rows * len(scale_index)
    if len(stream) < _HEADER.size:
        raise CorruptFrameError(f"a stream of symbols begins with {_HEADER.size} bytes, got {len(stream)}")
    width, n_escapes = _HEADER.unpack_from(stream)
    coded_at = _HEADER.size + width * n_escapes
    n_coded = len(stream) - coded_at
    if width not in _WIDTHS or n_escapes > n_symbols or n_coded < 0:
        raise CorruptFrameError(f"{n_escapes} escapes of {width} bytes among {n_symbols} symbols, in {len(stream)}")
    escapes = np.frombuffer(stream[_HEADER.size : coded_at], f"<i{width}").astype(np.int32)
    if n_escapes == n_symbols:
        if n_coded:
            raise CorruptFrameError(
                f"{n_coded} bytes follow a stream whose {n_symbols} symbols all stand by themselves"
            )
        return escapes.reshape(len(scale_index), n_rows).T
    max_coded = _STATES_BYTES + 2 * rans.MAX_WORDS * n_symbols
    if n_coded % 2 or not _STATES_BYTES <= n_coded <= max_coded:
        raise CorruptFrameError(f"{n_symbols} symbols take {_STATES_BYTES} to {max_coded} bytes, got {n_coded}")
    return _decode_lanes(stream[coded_at:], escapes, n_rows, scale_index).T


def warm() -> None:
    """Loads or compiles the loops, which takes seconds, before they are needed."""
    zeros = np.zeros((1024, 1), np.int32)
    decode(encode(zeros, np.zeros(1, np.uint8)), 1024, np.zeros(1, np.uint8))


@cache
def tables() -> rans.Tables:
    """The family, for ever the same integers."""
    frequencies = np.zeros((N_SCALES, _N_INDICES), np.int64)
    shifts = np.array([max(0, scale - _FIRST_WIDE + 3) // 3 for scale in range(N_SCALES)])
    reaches = np.empty(N_SCALES, np.int64)
    for scale in range(N_SCALES):
        row = _frequencies(scale - 3 * int(shifts[scale]))
        frequencies[scale, : len(row)] = row
        reaches[scale] = (len(row) - 2) // 2
    starts = np.cumsum(frequencies, axis=1) - frequencies
    index = np.array([np.repeat(np.arange(_N_INDICES), row) for row in frequencies])
    offset = np.arange(_TOTAL) - np.take_along_axis(starts, index, axis=1)
    slots = (np.take_along_axis(frequencies, index, axis=1) - 1) << 20 | offset << 8 | index
    return rans.Tables(shifts, reaches, frequencies, starts, _reciprocals(frequencies), slots.astype(np.uint32))


def _frequencies(scale: int) -> list[int]:
    """The table of a narrow scale: symbols -reach .. reach, then the escape; sums to 4096, none is 0.

    A Laplacian of which the interval [k - 1/2, k + 1/2] became symbol k has, with p = exp(-1 / (2 b)),
    P(0) = 1 - p and P(k) = P(-k) = p^(2k-1) (1 - p^2) / 2; its mean magnitude m = p / (1 - p^2) gives p.
    """
    n = _THIRDS[scale % 3] << scale // 3  # m = n / 2^27
    p = ((isqrt(((1 << 54) + 4 * n * n) << 64) - (1 << 59)) << 28) // (2 * n)
    p2 = p * p // _ONE
    side: list[int] = []
    weight, rest = p * (_ONE - p2) // (2 * _ONE), p
    while not side or 2 * _TOTAL * weight >= _ONE:  # a symbol that would get half a slot gets one
        side.append(weight)
        rest -= 2 * weight
        weight = weight * p2 // _ONE
    return _rounded([*reversed(side), _ONE - p, *side, max(rest, 1)])


def _reciprocals(frequencies: Int64[np.ndarray, "n_scales n_indices"]) -> Int64[np.ndarray, "n_scales n_indices"]:
    """ceil(2^s / f) << 6 | s with s = 31 + ceil(log2 f): exact for all x < 2^31 (R. Alverson, 1991)."""
    shifts = [31 + (int(f) - 1).bit_length() for f in frequencies.flat]
    packed = [-(-(1 << s) // max(int(f), 1)) << 6 | s for f, s in zip(frequencies.flat, shifts, strict=True)]
    return np.array(packed).reshape(frequencies.shape)


def _rounded(weights: list[int]) -> list[int]:
    """Integers in proportion to the weights that sum to 4096, each at least 1.

    What rounding down leaves goes to the largest remainders, of equals the first; what raising to 1 overspends comes
    from the largest.
    """
    whole = sum(weights)
    parts = [divmod(weight * _TOTAL, whole) for weight in weights]
    rounded = [max(1, quotient) for quotient, _ in parts]
    left = _TOTAL - sum(rounded)
    if left < 0:
        rounded[weights.index(max(weights))] += left
    by_remainder = sorted(range(len(weights)), key=lambda i: -parts[i][1] if parts[i][0] else 0)
    for i in by_remainder[: max(0, left)]:
        rounded[i] += 1
    return rounded


@cache
def _costs() -> Float64[np.ndarray, "n_scales n_indices"]:
    """Bits of each index of each table, low bits and escaped value included."""
    table = tables()
    bits: Float64[np.ndarray, "n_scales n_indices"] = rans.TABLE_BITS - np.log2(np.maximum(table.frequencies, 1))
    costs: Float64[np.ndarray, "n_scales n_indices"] = bits + table.shifts[:, None]
    costs[np.arange(N_SCALES), 2 * table.reaches + 1] += _ESCAPE_BITS
    return costs


def _bits(values: Int32[np.ndarray, "n_values"]) -> Float64[np.ndarray, "n_scales n_values"]:
    """What each value costs under each table."""
    table = tables()
    shift, reach = table.shifts[:, None], table.reaches[:, None]
    index = ((values.astype(np.int64) + ((1 << shift) >> 1)) >> shift) + reach
    index = np.where((index < 0) | (index > 2 * reach), 2 * reach + 1, index)
    return np.take_along_axis(_costs(), index, axis=1)


def _decode_lanes(
    coded: bytes | memoryview,
    escapes: Int32[np.ndarray, "n_escapes"],
    n_rows: int,
    scale_index: UInt8[np.ndarray, "n_components"],
) -> Int32[np.ndarray, "n_components n_rows"]:
    states = np.frombuffer(coded[:_STATES_BYTES], "<u4").astype(np.int64)
    words = np.zeros((len(coded) - _STATES_BYTES) // 2 + 1, np.uint16)  # one more: the loop looks ahead
    words[:-1] = np.frombuffer(coded[_STATES_BYTES:], "<u2")
    if states.min() < rans.STATE_MIN or states.max() >> rans.STATE_BITS:
        raise CorruptFrameError(f"states from {states.min()} to {states.max()} are none that coding leaves")
    columns = np.empty((len(scale_index), n_rows), np.int32)
    if not rans.compiled().decode(columns, scale_index, tables(), states, words, escapes):
        raise CorruptFrameError(f"a stream of {columns.size} symbols does not end where they do")
    return columns


def _narrow(values: Int32[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The values as the narrowest little-endian integers that hold them all."""
    return values.astype(f"<i{_width(values)}")


def _width(values: Int32[np.ndarray, "..."]) -> int:
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    return next(w for w in _WIDTHS if -(1 << 8 * w - 1) <= low and high < 1 << 8 * w - 1)


def _check(scale_index: UInt8[np.ndarray, "n_components"]) -> None:
    # The loops do not check bounds.
    if scale_index.size and int(scale_index.max()) >= N_SCALES:
        raise ValueError(f"a scale index is below {N_SCALES}, got {int(scale_index.max())}")
