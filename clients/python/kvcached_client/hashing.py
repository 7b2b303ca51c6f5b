"""Block hashes: a prompt as a chain of SHA-256 digests, one for each full block of tokens.

    block_hash := SHA-256( "kvcached/block/1" 0x00  parent:u8[32]  len(salt):u32  salt  n_tokens:u32  token_id:u32* )

Little-endian. The parent of the first block is 32 zero bytes; the salt is the namespace in UTF-8. Nothing here depends
on the process, the machine or a seed: tests/vectors/hashing.json holds vectors for other implementations.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 32
ROOT = bytes(HASH_BYTES)
_DOMAIN = b"kvcached/block/1\0"


def block_hash(parent_hash: bytes, token_ids: Sequence[int], namespace: str = "") -> bytes:
    """The hash of the block that holds `token_ids` after the prefix named by `parent_hash` (ROOT: no prefix).

    Raises:
        ValueError: the parent is not 32 bytes, or a token id is outside of 0 to 2**32 - 1.
    """
    if len(parent_hash) != HASH_BYTES:
        raise ValueError(f"a parent hash has {HASH_BYTES} bytes, got {len(parent_hash)}")
    salt = namespace.encode()
    content = _DOMAIN + parent_hash + _u32(len(salt)) + salt + _u32(len(token_ids)) + token_bytes(token_ids)
    return hashlib.sha256(content).digest()


def chain_hashes(token_ids: Sequence[int], block_size: int, namespace: str = "") -> list[bytes]:
    """Hashes of the full blocks of a prompt, first block first; a rest shorter than a block has none."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    hashes, parent = [], ROOT
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size], namespace)
        hashes.append(parent)
    return hashes


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian u32."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be a flat sequence of integers, got {ids.dtype} of shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() > 0xFFFFFFFF):
        raise ValueError(f"token ids must be 0 to 2**32 - 1, got {ids.min()} to {ids.max()}")
    return ids.astype("<u4").tobytes()


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")
