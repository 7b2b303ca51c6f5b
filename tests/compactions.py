"""Small bundles that compact, made by hand; blocks that are put to be compacted. Nothing here asserts."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
from bundles import STEPS, low_rank_chain, low_rank_tensors, make_bundle
from support import DaemonProcess, data_of, header_of, put_parts, tiny_spec

from kvcached import codec
from kvcached.block import BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec
from kvcached.codec import entropy, klt, planes, quantize
from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.codec.compactor import ANCHORS, COMPACTED_PROFILES, Anchor, Compaction
from kvcached.codec.klt import Basis, Moments
from kvcached.codec.tables import SIDES, Profile, Tables, storable
from kvcached.pool import Pipeline
from kvcached_client import Block, Client
from kvcached_client._proto import kvcached_pb2 as pb

FRACTIONS = (1 / 64, 1 / 8, 1 / 4, 1 / 2, 1.0)
SIZE = 64  # tokens of a block
_N_BLOCKS, _N_QUERIES = 8, 16
_serial = count()


def make_compaction(
    spec: ModelSpec, *, profiles: Sequence[str] = COMPACTED_PROFILES, bound: float = 1e6, seed: int = 0
) -> Compaction:
    """Budgets that differ from head to head, every head coded by itself. bound: of what blocks may lose."""
    rng = np.random.default_rng(seed)
    n_layers, n_kv_heads, _, key_dim = spec.dense_shapes()["keys"]
    value_dim = spec.dense_shapes()["values"][-1]
    importance = np.exp(rng.standard_normal((n_layers, n_kv_heads)))
    curves = importance[:, :, None] * (1 - np.sqrt(FRACTIONS))
    queries = rng.standard_normal((n_layers, spec.layers[0].n_query_heads, _N_QUERIES, key_dim))
    anchor = _anchor(spec, profiles, bound)
    return Compaction(
        fractions=np.array(FRACTIONS, np.float32),
        curves=(curves / curves.max()).astype(np.float32),
        queries=queries.astype(np.float16).astype(np.float32),
        output_metric=np.tile(np.eye(value_dim, dtype=np.float32), (n_layers, n_kv_heads, 1, 1)),
        anchors=dict.fromkeys(ANCHORS, anchor),
    )


def compacting(bundle: Bundle, **how: object) -> Bundle:
    """The bundle, which compacts too."""
    return replace(bundle, compaction=make_compaction(bundle.spec, **how))  # type: ignore[arg-type]


def make_compacting(spec: ModelSpec, seed: int = 0, **how: object) -> Bundle:
    """A bundle that compacts and says what its profiles lose, which nobody has measured."""
    return compacting(make_bundle(spec, seed, measured=tuple(PROFILES)), **how)


def _anchor(spec: ModelSpec, profiles: Sequence[str], bound: float) -> Anchor:
    n_heads = len(spec.dense_layers) * spec.dense_layers[0].n_kv_heads
    rows = {side: [np.concatenate(per_block) for per_block in zip(*_rows(spec, side), strict=True)] for side in SIDES}
    bases = {side: tuple(map(_fitted, rows[side])) for side in SIDES}
    made = {}
    for name in profiles:
        of_sides = {side: tuple(map(_tables, bases[side], rows[side], [STEPS[name]] * n_heads)) for side in SIDES}
        made[name] = Profile(PROFILES[name], 0.4, 0.05, of_sides["keys"], of_sides["values"])
    heads = tuple((head,) for head in range(n_heads))
    return Anchor(heads, bases["keys"], bases["values"], made, dict.fromkeys(profiles, bound))


def _rows(spec: ModelSpec, side: str) -> list[list[np.ndarray]]:
    """Of some blocks, those of each head, keys without rotary positions."""
    found = []
    for seed in range(_N_BLOCKS):
        block = KVBlock.dense(low_rank_tensors(spec, seed), spec.block_size, first_position=spec.block_size)
        (of_all,) = getattr(planes.split(block, spec, len(spec.dense_layers)), side)
        dim = spec.dense_shapes()[side][-1]
        found.append([of_all[:, at : at + dim] for at in range(0, of_all.shape[1], dim)])
    return found


def _fitted(rows: np.ndarray) -> Basis:
    return storable(klt.fit(Moments.of(rows), rows.shape[1]))


def _tables(basis: Basis, rows: np.ndarray, step: float) -> Tables:
    steps = np.where(basis.variances < 0.01, 0, step).astype(np.float32)
    return Tables(steps, entropy.choose_scale(quantize.quantize(klt.project(rows, basis), steps)))


# ---- blocks


def fresh_spec(**how: Any) -> ModelSpec:
    return tiny_spec(weights=f"compacted {next(_serial)}", **{"block_size": SIZE, **how})


def fresh(client: Client, n_blocks: int = 1) -> list[Block]:
    seed = next(_serial)
    return low_rank_chain(client, [seed, *range(n_blocks * client.spec.block_size - 1)], 10 * seed)


def put(client: Client, block: Block, **fields: Any) -> pb.PutResult:
    header = header_of(client, block)
    header.MergeFrom(pb.Header(**fields))
    (result,) = put_parts(client._connection.target, [header, *data_of(block)])
    return result


def put_fresh(client: Client, **fields: Any) -> pb.PutResult:
    return put(client, fresh(client)[0], **fields)


def stored_as(result: pb.PutResult) -> str:
    """As in settings, and a compacted one with its ratio."""
    if result.code != "OK":
        raise RuntimeError(f"not stored: {result}")
    found = result.fidelity
    if found.kind == pb.FIDELITY_KIND_COMPACTED:
        return f"compacted-{found.profile}@{round(found.am_ratio, 4):g}"
    return found.profile or "exact"


def configure(client: Client, **settings: str) -> None:
    client._connection.call("SetConfig", pb.SetConfigRequest(values=settings), 10.0)


def get(client: Client, *blocks: Block, **accepts: Any) -> list[Block | None]:
    wanted = {"floor": FidelityKind.COMPACTED, "accepts_compacted": True, **accepts}
    return list(client.get([block.block_hash for block in blocks], **wanted))


def counter(daemon: DaemonProcess, name: str, **labels: str) -> float:
    shown = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return daemon.status().counters.get(f"{name}_total{{{shown}}}" if shown else f"{name}_total", 0)


def here(bundle: Bundle, client: Client, block: Block, ratio: float, queries: np.ndarray | None = None) -> KVBlock:
    """What compaction makes of a block, without a daemon."""
    fidelity = Fidelity(FidelityKind.COMPACTED, "x8", ratio, bundle.bundle_id)
    compactor = Pipeline(client.spec, lambda _: bundle).compactor(fidelity)
    dense = {name: block.tensors[name] for name in ("keys", "values")}
    kv = KVBlock.dense(dense, client.spec.block_size, block.first_position)
    block_id = BlockId(client.model_id, "", block.block_hash)
    frame = codec.encode(block_id, codec.compact(kv, compactor, queries).block, coder=compactor)
    return codec.decode(block_id, frame, kv.nbytes, compactor)
