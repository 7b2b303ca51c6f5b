"""The nouns: BlockId names a block, KVBlock is its content as the codec sees it.

ModelSpec and Fidelity come from the client, which speaks of them too. A block on the wire is named tensors; a KVBlock
is packed rows, so that a compacted block with heads of unequal length is the same type as a dense one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import BFloat16, Float16, Float32, Int32, Shaped

from kvcached_client.spec import Fidelity, FidelityKind, Fingerprint, LayerKind, LayerSpec, ModelSpec, RopeSpec
from kvcached_client.tensors import DTYPES

__all__ = [
    "Allocate",
    "BlockId",
    "Fidelity",
    "FidelityKind",
    "Fingerprint",
    "KVBlock",
    "LayerKind",
    "LayerSpec",
    "ModelSpec",
    "RopeSpec",
    "fresh",
]

Allocate = Callable[[str, tuple[int, ...], np.dtype], Shaped[np.ndarray, "..."]]


def fresh(_name: str, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Memory of its own for a tensor of a block: what decodes is told where its results are to lie by an `Allocate`.

    An Allocate answers with a writable, C-contiguous array of that shape and dtype, whatever it holds, or raises
    ValueError for a shape that no array has.
    """
    return np.empty(shape, dtype)


@dataclass(frozen=True, slots=True)
class BlockId:
    """Which block: of which model, in which namespace, after which prefix (the namespace is salt in the hash)."""

    model_id: bytes
    namespace: str
    block_hash: bytes

    def __str__(self) -> str:
        return f"{self.block_hash.hex()[:16]} of model {self.model_id.hex()[:16]}"


KeyRows = Float16[np.ndarray, "n_rows key_dim"] | BFloat16[np.ndarray, "n_rows key_dim"]
KeyRows32 = Float32[np.ndarray, "n_rows key_dim"]
ValueRows = Float16[np.ndarray, "n_rows value_dim"] | BFloat16[np.ndarray, "n_rows value_dim"]
ValueRows32 = Float32[np.ndarray, "n_rows value_dim"]


@dataclass(frozen=True, slots=True, eq=False)
class KVBlock:
    """Keys and values of one block. Rows are ordered by layer, KV head, token; one row is one kept token of one head.

    keys have rotary positions applied, as engines hold them. positions are absolute. bias is added to the attention
    logits (0: plain attention). lengths counts the rows of each layer and head: all equal to n_source_tokens in a
    dense block. opaque tensors belong to layers that are not rows of tokens, and are only ever coded exactly.
    """

    keys: KeyRows | KeyRows32
    values: ValueRows | ValueRows32
    positions: Int32[np.ndarray, " n_rows"]
    bias: Float32[np.ndarray, " n_rows"]
    lengths: Int32[np.ndarray, "n_layers n_kv_heads"]
    first_position: int
    n_source_tokens: int
    opaque: Mapping[str, Shaped[np.ndarray, "..."]] = field(default_factory=dict)

    @classmethod
    def dense(
        cls,
        tensors: Mapping[str, Shaped[np.ndarray, "..."]],
        n_tokens: int,
        first_position: int,
    ) -> "KVBlock":
        """From the tensors of the wire: keys and values [n_layers, n_kv_heads, n_tokens, dim], the others opaque.

        Views where the tensors are contiguous. Inverse: `to_tensors`.
        """
        none = np.zeros((0, 0, n_tokens, 0), DTYPES["float16"])
        keys, values = tensors.get("keys", none), tensors.get("values", none)
        n_layers, n_kv_heads = keys.shape[:2]
        n_rows = n_layers * n_kv_heads * n_tokens
        return cls(
            keys=keys.reshape(n_rows, keys.shape[-1]),
            values=values.reshape(n_rows, values.shape[-1]),
            positions=_dense_positions(n_layers * n_kv_heads, n_tokens, first_position),
            bias=np.zeros(n_rows, np.float32),
            lengths=np.full((n_layers, n_kv_heads), n_tokens, np.int32),
            first_position=first_position,
            n_source_tokens=n_tokens,
            opaque={name: array for name, array in tensors.items() if name not in ("keys", "values")},
        )

    def to_tensors(self) -> dict[str, Shaped[np.ndarray, "..."]]:
        """The tensors of the wire: those of `dense`, or for a compacted block its rows as they are, packed."""
        if not self.lengths.size:
            return dict(self.opaque)
        if not self.is_dense:
            packed = ("keys", "values", "lengths", "positions", "bias")
            return {**{name: getattr(self, name) for name in packed}, **self.opaque}
        heads = (*self.lengths.shape, self.n_source_tokens)
        keys = self.keys.reshape(*heads, self.keys.shape[-1])
        values = self.values.reshape(*heads, self.values.shape[-1])
        return {"keys": keys, "values": values, **self.opaque}

    @property
    def is_dense(self) -> bool:
        """Whether every head keeps every token, at its own position, without bias."""
        dense = _dense_positions(self.lengths.size, self.n_source_tokens, self.first_position)
        return (
            bool((self.lengths == self.n_source_tokens).all())
            and not self.bias.any()
            and np.array_equal(self.positions, dense)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that an engine holds for this block."""
        return self.keys.nbytes + self.values.nbytes + sum(array.nbytes for array in self.opaque.values())


def _dense_positions(n_heads: int, n_tokens: int, first_position: int) -> Int32[np.ndarray, " n_rows"]:
    if not n_heads:  # a block without dense layers may stand for any number of tokens
        return np.empty(0, np.int32)
    return np.tile(np.arange(first_position, first_position + n_tokens, dtype=np.int32), n_heads)
