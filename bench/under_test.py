"""The seam of the codec bench: what a codec under test is, and the protocol that all of them go through.

A prefix is stored in blocks, through the codec. The rows of its last tokens are then computed anew on top of what came
back, as the adapter does, and a continuation runs on that. Exact and lossy caches take the same road.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float16, Float32, Int
from reference_model import Cache, ReferenceModel, Trace

Half = Float16[np.ndarray, "n_layers n_kv_heads n_tokens head_dim"]
SOURCE_BITS = 16  # of a value, as the engine holds it
N_SINKS = 4  # absolute positions 0 to 3


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """What came back of a block, and what it cost."""

    keys: Half
    values: Half
    bits: float  # everything that is stored for the block, but no calibration
    paper_bits: float  # as the KVTC paper counts: the payload of the coded tokens; no sinks, window or headers
    paper_values: int  # the keys' and values' numbers that `paper_bits` stand for
    seconds: tuple[float, float] | None = None  # to encode and to decode, where these are two steps
    bias: Float32[np.ndarray, "n_layers n_kv_heads n_tokens"] | None = None  # -inf: dropped by that head


class Codec(Protocol):
    """A codec under test. Called from several threads."""

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        """A block there and back. Keys have rotary positions applied, on both sides."""


@dataclass(frozen=True, slots=True)
class Course:
    """How many tokens are stored, lie in a block, are computed anew (of those stored), and run on top."""

    n_prefix: int = 1536
    block_size: int = 256
    n_recomputed: int = 128
    n_continued: int = 512

    @property
    def n_tokens(self) -> int:
        return self.n_prefix + self.n_continued

    def restore(self, codec: Codec, prefix: Cache) -> tuple[Cache, list[Coded]]:
        """The rows of a prefix that an engine gets back, without those that it computes anew."""
        keys, values = prefix.keys.astype(np.float16), prefix.values.astype(np.float16)
        blocks = []
        for start in range(0, self.n_prefix, self.block_size):
            rows = slice(start, start + self.block_size)
            blocks.append(codec(keys[:, :, rows], values[:, :, rows], start))
        bias = [block.bias for block in blocks if block.bias is not None]
        back = Cache(
            _joined([block.keys for block in blocks]),
            _joined([block.values for block in blocks]),
            _joined(bias) if bias else None,
        )
        return back.first(self.n_prefix - self.n_recomputed), blocks

    def resume(self, model: ReferenceModel, token_ids: Int[np.ndarray, " n"], restored: Cache) -> Trace:
        """The model from where the restored rows end; the first `n_recomputed` tokens are the prefix's own."""
        return model.run(token_ids[restored.n_tokens :], restored)


def keep(keys: Half, values: Half, first_position: int) -> Coded:  # noqa: ARG001
    """The codec that does nothing: the exact cache, 16 bits a value."""
    bits = float(SOURCE_BITS * (keys.size + values.size))
    return Coded(keys, values, bits, bits, keys.size + values.size)


def _joined(rows: Sequence[Half]) -> np.ndarray:
    return np.concatenate(rows, axis=2).astype(np.float32)
