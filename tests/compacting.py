"""Bundles that compact, and blocks that are put to be compacted. Nothing here asserts."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
from bundles import low_rank_chain, make_bundle
from compactions import make_compaction
from support import DaemonProcess, data_of, header_of, put_parts, tiny_spec

from kvcached import codec
from kvcached.block import BlockId, Fidelity, FidelityKind, KVBlock, ModelSpec
from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.codec.compactor import COMPACTED_PROFILES
from kvcached.pool import Pipeline
from kvcached_client import Block, Client
from kvcached_client._proto import kvcached_pb2 as pb

SIZE = 64  # tokens of a block
_serial = count()


def make_compacting(
    spec: ModelSpec, *, profiles: Sequence[str] = COMPACTED_PROFILES, bound: float = 1e6, whole: Sequence[int] = ()
) -> Bundle:
    """A bundle that compacts and says what its profiles lose, which nobody has measured. See make_compaction."""
    made = make_compaction(spec, step=1 / 8, bound=bound, whole=whole)
    anchors = {
        ratio: replace(anchor, profiles={name: anchor.profiles[name] for name in profiles})
        for ratio, anchor in made.anchors.items()
    }
    return replace(make_bundle(spec, measured=tuple(PROFILES)), compaction=replace(made, anchors=anchors))


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
