"""Interleaved range coding (rANS) of small integers: the loops under entropy.py, compiled where they are first needed.

A state x in [2^15, 2^31) holds the symbols pushed onto it. With frequencies that sum to 2^12, of which the symbol has
f from `start` on:

    push    x >= f * 2^19 gives off its low 16 bits as a word; then x := (x // f) * 2^12 + start + x % f
    pop     slot := x % 2^12; x := f * (x // 2^12) + slot - start; x < 2^15 takes a word in below

Symbol i of a stream uses state i % 32, so that the processor works on many at once, while one stream of words serves
all. Symbols are pushed last to first and popped first to last; the states then are back where pushing began, at 2^15.

A component of shift s > 0 is wide: its symbols are rounded to multiples of 2^s, the table codes the multiple, and the
s low bits follow, pushed as x := x * 2^s + bits.

Everything is integers that stay below 2^63, so that the same source runs compiled and as plain Python. Where a
word is given off or taken in no processor predicts: the loops compute with the answer instead of branching on it.
Source: J. Duda, arXiv 1311.2540; interleaved as in F. Giesen, arXiv 1402.3392.
"""

from collections.abc import Callable
from functools import cache
from inspect import unwrap
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt16, UInt32

N_LANES = 32
TABLE_BITS = 12
STATE_MIN, STATE_BITS = 1 << 15, 31
MAX_WORDS = 2  # of a symbol: one for its table, one for its low bits


class Tables(NamedTuple):
    """Distributions by scale index. Index 0 .. 2 * reach stands for -reach .. reach, 2 * reach + 1 for an escape."""

    shifts: Int64[np.ndarray, "n_scales"]
    reaches: Int64[np.ndarray, "n_scales"]
    frequencies: Int64[np.ndarray, "n_scales n_indices"]
    starts: Int64[np.ndarray, "n_scales n_indices"]
    reciprocals: Int64[np.ndarray, "n_scales n_indices"]  # factor << 6 | shift: x // f == x * factor >> shift
    slots: UInt32[np.ndarray, "n_scales 4096"]  # (frequency - 1) << 20 | (slot - start) << 8 | index


class Kernels(NamedTuple):
    """Both loops, compiled or plain."""

    encode: Callable[..., tuple[int, int]]
    decode: Callable[..., bool]


def encode(
    symbols: Int32[np.ndarray, "n_components n_rows"],
    scale_index: UInt8[np.ndarray, "n_components"],
    tables: Tables,
    states: Int64[np.ndarray, "32"],
    words: UInt16[np.ndarray, "n_free"],
    escapes: Int32[np.ndarray, "n_symbols"],
) -> tuple[int, int]:
    """Fills `words` and `escapes` from their ends, leaves the final `states`; returns where both begin.

    `words` has room for MAX_WORDS of each symbol and one more, which is written and never used.
    """
    word, escape = len(words), len(escapes)
    states[:] = STATE_MIN
    n_components, n_rows = symbols.shape
    at = n_components * n_rows
    for component in range(n_components - 1, -1, -1):
        scale = scale_index[component]
        shift, reach = tables.shifts[scale], tables.reaches[scale]
        half = (1 << shift) >> 1
        frequencies, starts = tables.frequencies[scale], tables.starts[scale]
        reciprocals = tables.reciprocals[scale]
        for row in range(n_rows - 1, -1, -1):
            at -= 1
            value = np.int64(symbols[component, row]) + half
            index = (value >> shift) + reach
            if index < 0 or index > 2 * reach:
                index = 2 * reach + 1
                escape -= 1
                escapes[escape] = symbols[component, row]
            x = states[at & (N_LANES - 1)]
            if shift:
                emit = int(x >> (STATE_BITS - shift) > 0)
                words[word - 1] = x & 0xFFFF
                word -= emit
                x >>= 16 * emit
                x = (x << shift) | (value & ((1 << shift) - 1))
            frequency = frequencies[index]
            emit = int(x >= frequency << (STATE_BITS - TABLE_BITS))
            words[word - 1] = x & 0xFFFF
            word -= emit
            x >>= 16 * emit
            reciprocal = reciprocals[index]
            quotient = (x * (reciprocal >> 6)) >> (reciprocal & 63)
            states[at & (N_LANES - 1)] = x + starts[index] + quotient * ((1 << TABLE_BITS) - frequency)
    return word, escape


def decode(
    symbols: Int32[np.ndarray, "n_components n_rows"],
    scale_index: UInt8[np.ndarray, "n_components"],
    tables: Tables,
    states: Int64[np.ndarray, "32"],
    words: UInt16[np.ndarray, "n_words"],
    escapes: Int32[np.ndarray, "n_escapes"],
) -> bool:
    """Fills `symbols`; False where words and escapes do not end with the symbols, or the states not at 2^15.

    One more word follows the last, which is read and never used. Whatever words and states in [2^15, 2^31) come,
    nothing is read or written out of bounds.
    """
    word = escape = at = 0
    n_components, n_rows = symbols.shape
    for component in range(n_components):
        scale = scale_index[component]
        shift, reach = tables.shifts[scale], tables.reaches[scale]
        half = (1 << shift) >> 1
        slots = tables.slots[scale]
        for row in range(n_rows):
            x = states[at & (N_LANES - 1)]
            slot = np.int64(slots[x & ((1 << TABLE_BITS) - 1)])
            x = ((slot >> 20) + 1) * (x >> TABLE_BITS) + ((slot >> 8) & 0xFFF)
            take = int(x < STATE_MIN)
            x = (x << 16 * take) | (np.int64(words[word]) * take)
            word += take
            if word == len(words):
                return False
            value = ((slot & 0xFF) - reach) << shift
            if shift:
                value += (x & ((1 << shift) - 1)) - half
                x >>= shift
                take = int(x < STATE_MIN)
                x = (x << 16 * take) | (np.int64(words[word]) * take)
                word += take
                if word == len(words):
                    return False
            if (slot & 0xFF) > 2 * reach:
                if escape == len(escapes):
                    return False
                value = np.int64(escapes[escape])
                escape += 1
            symbols[component, row] = value
            states[at & (N_LANES - 1)] = x
            at += 1
    for lane in range(N_LANES):
        if states[lane] != STATE_MIN:
            return False
    return word == len(words) - 1 and escape == len(escapes)


PLAIN = Kernels(encode, decode)


@cache
def compiled() -> Kernels:
    """Both loops as machine code that releases the GIL; made once per machine and kept on disk by numba."""
    import numba  # here, not above: what never codes (kvcachedctl, say) does without its 0.4 s and 120 MB

    # Unwrapped, because tests wrap every function to check shapes.
    compile_ = numba.njit(nogil=True, cache=True, error_model="numpy")
    return Kernels(*(compile_(unwrap(kernel)) for kernel in PLAIN))
