"""Entropy coding of a block's symbols on one core: speed and size, against ideal entropy and what else could be used.

Symbols are Laplacian, 512 components of decaying magnitude, blocks of 256 rows; tables are fixed on other blocks than
those that are coded, as a bundle would. `python bench/entropy.py --json bench/results/entropy.json`.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table

from kvcached.codec import entropy

N_ROWS, N_COMPONENTS, N_BLOCKS = 256, 512, 16  # blocks to calibrate on, and as many to code
MAGNITUDES = {"low": (3, 60), "middle": (8, 150), "high": (50, 250)}  # of component 0, and components until 1/e of it
N_ROUNDS = 9
PACKED_BASES = {1: (3, 5), 2: (5, 3), 7: (15, 2)}  # largest magnitude: base, and how many symbols fill a byte


@dataclass(frozen=True)
class Coder:
    """One way to code a block; `decode` gives back what `encode` was given."""

    name: str
    encode: Callable[[np.ndarray], Any]
    decode: Callable[[Any], np.ndarray]
    n_bytes: Callable[[Any], int] = len


def blocks(magnitude: float, decay: float, n_blocks: int, seed: int) -> np.ndarray:
    """Symbols of some blocks, each column by column in memory, as a projection can leave them."""
    scale = magnitude * np.exp(-np.arange(N_COMPONENTS) / decay)
    values = np.random.default_rng(seed).laplace(size=(n_blocks, N_ROWS, N_COMPONENTS)) * scale
    columns = np.ascontiguousarray(np.rint(values).astype(np.int32).transpose(0, 2, 1))
    return columns.transpose(0, 2, 1)


def ideal_bits(symbols: np.ndarray) -> float:
    """Empirical entropy per symbol, each component by its own frequencies over all blocks."""
    total = 0.0
    for column in symbols.transpose(2, 0, 1).reshape(N_COMPONENTS, -1):
        p = np.unique(column, return_counts=True)[1] / column.size
        total -= float(p @ np.log2(p))
    return total / N_COMPONENTS


def ours(calibration: np.ndarray) -> Coder:
    """What the codec does."""
    scale_index = entropy.choose_scale(calibration.reshape(-1, N_COMPONENTS))
    return Coder(
        "ours: rANS, 32 lanes",
        lambda symbols: entropy.encode(symbols, scale_index),
        lambda stream: entropy.decode(stream, N_ROWS, scale_index),
    )


def zstd_plain(level: int) -> Coder:
    """Symbols as int8, or int16 where that is too narrow, component by component, through zstd."""

    def encode(symbols: np.ndarray) -> bytes:
        narrow = np.ascontiguousarray(symbols.T).astype(np.int8 if np.abs(symbols).max() < 128 else np.int16)
        return bytes([narrow.itemsize]) + zstandard.ZstdCompressor(level=level).compress(narrow.tobytes())

    def decode(stream: bytes) -> np.ndarray:
        narrow = np.frombuffer(zstandard.ZstdDecompressor().decompress(stream[1:]), f"<i{stream[0]}")
        return narrow.astype(np.int32).reshape(N_COMPONENTS, N_ROWS).T

    return Coder(f"zstd {level} over int8 or int16", encode, decode)


def zstd_packed(calibration: np.ndarray, level: int) -> Coder:
    """Symbols of small components packed in base 3, 5 or 15, others as int16, through zstd.

    A component's base is fixed by its largest magnitude in calibration, or in the block if that is larger.
    """
    known = np.abs(calibration).max(axis=(0, 1))

    def encode(symbols: np.ndarray) -> tuple[np.ndarray, bytes]:
        columns = np.ascontiguousarray(symbols.T)
        reach = np.maximum(known, np.abs(columns).max(axis=1))
        planes = [columns[members(reach, size)] for size in (*PACKED_BASES, None)]
        packed = [pack(plane, size) for plane, size in zip(planes, PACKED_BASES, strict=False)]
        data = b"".join([*packed, planes[-1].astype(np.int16).tobytes()])
        return reach, zstandard.ZstdCompressor(level=level).compress(data)

    def decode(coded: tuple[np.ndarray, bytes]) -> np.ndarray:
        reach, stream = coded
        data, at = zstandard.ZstdDecompressor().decompress(stream), 0
        columns = np.empty((N_COMPONENTS, N_ROWS), np.int32)
        for size, (_, digits) in PACKED_BASES.items():
            chosen = members(reach, size)
            n_bytes = -(-int(chosen.sum()) * N_ROWS // digits)
            columns[chosen] = unpack(data[at : at + n_bytes], size, int(chosen.sum()))
            at += n_bytes
        chosen = members(reach, None)
        columns[chosen] = np.frombuffer(data[at:], "<i2").reshape(-1, N_ROWS)
        return columns.T

    return Coder(
        f"zstd {level} over base 3/5/15 packed", encode, decode, lambda coded: len(coded[1]) + N_COMPONENTS // 4
    )


def members(reach: np.ndarray, size: int | None) -> np.ndarray:
    """Which components are packed for magnitudes up to `size`; None: for all larger ones."""
    sizes = [0, *PACKED_BASES]
    if size is None:
        return reach > sizes[-1]
    smaller = sizes[sizes.index(size) - 1] if size != sizes[1] else -1
    return (reach > smaller) & (reach <= size)


def pack(plane: np.ndarray, size: int) -> bytes:
    """Symbols of magnitudes up to `size`, several to a byte."""
    base, digits = PACKED_BASES[size]
    padded = np.zeros(-(-plane.size // digits) * digits, np.uint8)
    padded[: plane.size] = plane.reshape(-1) + size
    packed = np.zeros(len(padded) // digits, np.uint8)
    for digit in range(digits):
        packed = packed * np.uint8(base) + padded[digit::digits]
    return packed.tobytes()


def unpack(data: bytes, size: int, n_components: int) -> np.ndarray:
    """Inverse of `pack`."""
    base, digits = PACKED_BASES[size]
    rest = np.frombuffer(data, np.uint8)
    plane = np.empty((len(rest), digits), np.int32)
    for digit in range(digits - 1, -1, -1):
        rest, plane[:, digit] = np.divmod(rest, np.uint8(base))
    return plane.reshape(-1)[: n_components * N_ROWS].reshape(n_components, N_ROWS) - size


def constriction_ans(calibration: np.ndarray) -> Coder | None:
    """`constriction`'s ANS, one stream, a categorical model per component; None where it is not installed."""
    try:
        import constriction  # not a dependency: pip install constriction
    except ImportError:
        return None
    limits = 2 * np.abs(calibration).max(axis=(0, 1)) + 2
    models = []
    for component, limit in enumerate(limits):
        counts = np.bincount(calibration[:, :, component].reshape(-1) + limit, minlength=2 * limit + 1) + 0.01
        models.append(constriction.stream.model.Categorical(counts / counts.sum(), perfect=False))

    def encode(symbols: np.ndarray) -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        columns = np.ascontiguousarray(symbols.T) + limits[:, None].astype(np.int32)
        for component in range(N_COMPONENTS - 1, -1, -1):
            coder.encode_reverse(columns[component], models[component])
        return coder.get_compressed()

    def decode(stream: np.ndarray) -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder(stream)
        columns = np.array([coder.decode(model, N_ROWS) for model in models])
        return (columns - limits[:, None]).T

    return Coder("constriction, ANS, a model per component", encode, decode, lambda stream: stream.nbytes)


def nanoseconds(function: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Per symbol: the mean over the blocks of the best of some rounds, because the machine is shared."""
    best = [float("inf")] * len(inputs)
    for _ in range(N_ROUNDS):
        for i, item in enumerate(inputs):
            start = time.perf_counter()
            function(item)
            best[i] = min(best[i], time.perf_counter() - start)
    return 1e9 * sum(best) / (len(inputs) * N_ROWS * N_COMPONENTS)


def measure(rate: str, coder: Coder, coded: np.ndarray, ideal: float) -> dict[str, Any]:
    """A row of the table; what comes back is compared first."""
    streams = [coder.encode(block) for block in coded]
    for block, stream in zip(coded, streams, strict=True):
        assert np.array_equal(coder.decode(stream), block), coder.name
    bits = 8 * sum(map(coder.n_bytes, streams)) / coded.size
    return {
        "rate": rate,
        "coder": coder.name,
        "bits_per_symbol": bits,
        "ideal_bits_per_symbol": ideal,
        "over_ideal": bits / ideal,
        "encode_ns_per_symbol": nanoseconds(coder.encode, list(coded)),
        "decode_ns_per_symbol": nanoseconds(coder.decode, streams),
    }


def run() -> list[dict[str, Any]]:
    """All coders at all rates."""
    rows = []
    for rate, (magnitude, decay) in MAGNITUDES.items():
        calibration, coded = (blocks(magnitude, decay, N_BLOCKS, seed) for seed in (0, 1))
        ideal = ideal_bits(coded)
        coders = [
            ours(calibration),
            zstd_plain(1),
            zstd_plain(9),
            zstd_packed(calibration, 1),
            zstd_packed(calibration, 9),
        ]
        rows += [measure(rate, coder, coded, ideal) for coder in coders]
        by_rows = Coder("ours, symbols row by row", coders[0].encode, coders[0].decode)
        rows.insert(len(rows) - 4, measure(rate, by_rows, np.ascontiguousarray(coded), ideal))
        other = constriction_ans(calibration)
        rows.append(
            measure(rate, other, coded, ideal) if other else {"rate": rate, "coder": "constriction", "absent": True}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table("rate", "coder", "bits", "over ideal", "encode ns", "decode ns")
    for row in rows:
        if row.get("absent"):
            shown.add_row(row["rate"], row["coder"], "absent")
            continue
        numbers = ("bits_per_symbol", "over_ideal", "encode_ns_per_symbol", "decode_ns_per_symbol")
        shown.add_row(row["rate"], row["coder"], *(f"{row[name]:.3f}" for name in numbers))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    entropy.warm()
    rows = run()
    Console().print(table(rows))
    if arguments.json:
        command = f"python bench/entropy.py --json {arguments.json}"
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
        arguments.json.write_text(json.dumps({"command": command, "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
