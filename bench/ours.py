"""Our codec under test: whole frames of the daemon's own code, with bundles that its own calibration fits.

Nothing is reckoned here: a block becomes the bytes of a frame and comes back from them, and every byte of the frame
counts, header, records, checksums and sinks included. The bundle does not: it is paid once for a model.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from calibration import N_TOKENS, N_WINDOWS
from head_weights import head_weights
from jaxtyping import Float32, Int
from reference_model import REFERENCE_MODEL, ReferenceModel, windows
from under_test import Coded, Half

from kvcached import codec
from kvcached.block import BlockId, Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.calibration import Calibration
from kvcached.codec import container, entropy
from kvcached.codec.bundle import Coder
from kvcached.codec.container import Coding, SectionKind
from kvcached.codec.planes import n_sinks

N_TUNE_WINDOWS = 4
N_QUERIES = 512  # of a window
_BLOCK_ID = BlockId(bytes(32), "", bytes(32))
_MAX_BYTES = 1 << 30


def spec(block_size: int = 256) -> ModelSpec:
    """The reference model, as an adapter would describe it."""
    config = json.loads((REFERENCE_MODEL / "config.json").read_text())
    dim = config["head_dim"]
    layer = LayerSpec(
        n_query_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        key_dim=dim,
        value_dim=dim,
        softmax_scale=dim**-0.5,
        rope=RopeSpec(dim, float(config["rope_theta"])),
    )
    return ModelSpec(Fingerprint(weights="reference"), "float16", block_size, (layer,) * config["num_hidden_layers"])


def calibration(
    model: ReferenceModel,
    layers_per_group: int,
    *,
    weighted: bool = True,
    n_windows: int = N_WINDOWS,
    n_tokens: int = N_TOKENS,
    compacts: bool = False,
) -> Calibration:
    """As `kvcachedctl calibrate` does it, from the NumPy forward: as much text to fit as the baselines, more to tune.

    weighted: with the queries and the metric of the output projection. compacts: with what errors of heads weigh, too.
    """
    found = Calibration(spec(), layers_per_group)
    if weighted:
        found.set_output_metric(output_metric(model), head_weights(model) if compacts else None)
    token_ids = windows("calibration", n_windows + N_TUNE_WINDOWS, n_tokens)
    parts = ["tune" if i % (len(token_ids) // N_TUNE_WINDOWS) == 1 else "fit" for i in range(len(token_ids))]
    with ThreadPoolExecutor(2) as pool:
        traced = pool.map(lambda item: _text(model, *item), enumerate(token_ids))
        for part, (block, queries, positions) in zip(parts, traced, strict=True):
            asked = weighted and part == "fit"
            found.add(block, part, queries if asked else None, positions if asked else None)
    return found


def output_metric(model: ReferenceModel) -> Float32[np.ndarray, "n_layers n_kv_heads dim dim"]:
    """For each KV head the sum of W_h^T W_h over the query heads h that read it."""
    columns = np.stack([model.output_projection(layer) for layer in range(model.n_layers)])
    by_head = columns.reshape(model.n_layers, columns.shape[1], model.n_kv_heads, -1, model.head_dim)
    metric: Float32[np.ndarray, "n_layers n_kv_heads dim dim"] = np.einsum("lokgi,lokgj->lkij", by_head, by_head)
    return metric


def _text(
    model: ReferenceModel, seed: int, token_ids: Int[np.ndarray, " n"]
) -> tuple[KVBlock, Float32[np.ndarray, "l h n d"], np.ndarray]:
    """A window's cache, and some of the queries that the model made there."""
    trace = model.run(token_ids)
    n = len(token_ids)
    positions = np.sort(np.random.default_rng(seed).choice(n, min(N_QUERIES, n), replace=False)).astype(np.int32)
    keys, values = trace.added.keys.astype(np.float16), trace.added.values.astype(np.float16)
    return KVBlock.dense({"keys": keys, "values": values}, n, 0), trace.queries[:, :, positions], positions


@dataclass(frozen=True, slots=True, eq=False)
class Ours:
    """A profile of a bundle, as a codec under test."""

    coder: Coder

    @classmethod
    def family(cls, calibrated: Calibration, compressions: Sequence[float]) -> "list[Ours]":
        """A profile for each compression, of one bundle."""
        names = {f"{compression:g}": compression for compression in compressions}
        bundle = calibrated.fit(names)
        return [cls(bundle.coder(name)) for name in names]

    def __call__(self, keys: Half, values: Half, first_position: int) -> Coded:
        block = KVBlock.dense({"keys": keys, "values": values}, keys.shape[2], first_position)
        start = time.perf_counter()
        frame = codec.encode(_BLOCK_ID, block, coder=self.coder)
        encoded = time.perf_counter()
        back = codec.decode(_BLOCK_ID, frame, _MAX_BYTES, self.coder).to_tensors()
        decoded = time.perf_counter()
        n_coded = block.n_source_tokens - n_sinks(first_position, block.n_source_tokens)
        return Coded(
            back["keys"],
            back["values"],
            bits=8.0 * len(frame),
            paper_bits=8.0 * sum(len(payload) for _, _, payload in _streams(frame)),
            paper_values=(keys.size + values.size) // block.n_source_tokens * n_coded,
            seconds=(encoded - start, decoded - encoded),
        )

    def symbols(self, keys: Half, values: Half, first_position: int) -> tuple[list[np.ndarray], int]:
        """The symbols of each plane of a block, [n_rows, n_components], and the bits that their streams take."""
        block = KVBlock.dense({"keys": keys, "values": values}, keys.shape[2], first_position)
        found, bits = [], 0
        for kind, group, payload in _streams(codec.encode(_BLOCK_ID, block, coder=self.coder)):
            planes = self.coder.keys if kind == SectionKind.KEY_PLANE else self.coder.values
            n_rows = block.n_source_tokens - n_sinks(first_position, block.n_source_tokens)
            found.append(entropy.decode(payload, n_rows, planes[group].tables.scales))
            bits += 8 * len(payload)
        return found, bits


def _streams(frame: bytes) -> Iterator[tuple[SectionKind, int, bytes]]:
    for section in container.unpack(frame, _MAX_BYTES)[1]:
        if section.coding == Coding.TRANSFORM:
            yield section.kind, section.layer, bytes(section.payload)


def entropy_overhead(ours: Ours, blocks: Sequence[tuple[Half, Half, int]]) -> float:
    """Bits of all entropy sections over the empirical entropy of each component, pooled over the blocks; minus 1."""
    per_block, bits = zip(*(ours.symbols(*block) for block in blocks), strict=True)
    ideal = 0.0
    for planes in zip(*per_block, strict=True):
        pooled = np.concatenate(planes)
        ideal += sum(map(entropy_bits, pooled.T))
    return sum(bits) / ideal - 1


def entropy_bits(symbols: np.ndarray) -> float:
    """Of symbols by their own histogram."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float((counts * np.log2(len(symbols) / counts)).sum())
