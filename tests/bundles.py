"""Small valid bundles, and blocks like those that they were fitted to. Nothing here asserts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from support import DaemonProcess, chain

from kvcached.block import KVBlock, ModelSpec
from kvcached.codec import entropy, klt, planes, quantize
from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.codec.klt import Basis, Moments
from kvcached.codec.tables import SIDES, Profile, Tables, storable
from kvcached_client import Block, Client
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.tensors import DTYPES

STEPS: Mapping[str, float] = {"near-lossless": 0.125, "x8": 0.5, "x16": 1.0, "x32": 2.0}
_N_FACTORS = 4
_N_FITTED = 8  # blocks


def low_rank_tensors(spec: ModelSpec, seed: int, mixing_seed: int = 7) -> dict[str, np.ndarray]:
    """Keys and values of one block, of 4 factors in each head; the same mixing seed gives the same factors."""
    rng, mixing = np.random.default_rng(seed), np.random.default_rng(mixing_seed)
    tensors = {}
    for name, shape in spec.dense_shapes().items():
        factors = mixing.standard_normal((_N_FACTORS, shape[-1]))
        tensors[name] = (rng.standard_normal((*shape[:-1], _N_FACTORS)) @ factors).astype(DTYPES[spec.kv_dtype])
    return tensors


def low_rank_chain(client: Client, token_ids: Sequence[int], seed: int = 0) -> list[Block]:
    """Blocks of a prompt that a bundle codes well."""
    blocks = chain(client, token_ids)
    return [replace(b, tensors=low_rank_tensors(client.spec, 1000 + seed + b.index)) for b in blocks]


def make_bundle(
    spec: ModelSpec,
    seed: int = 0,
    *,
    layers_per_group: int = 2,
    profiles: Sequence[str] = tuple(PROFILES),
    measured: Sequence[str] = (),
) -> Bundle:
    """A bundle fitted to random low-rank data; of another seed, another one.

    measured: profiles that say what they lose, which nobody has measured.
    """
    layers_per_group = min(layers_per_group, len(spec.dense_layers))
    blocks = [_split(spec, layers_per_group, 100 * seed + n) for n in range(_N_FITTED)]
    bases = {side: tuple(map(_fitted, zip(*(getattr(b, side) for b in blocks), strict=True))) for side in SIDES}
    made = {}
    for name in profiles:
        tables = {
            side: tuple(map(_tables, bases[side], getattr(blocks[0], side), [STEPS[name]] * len(bases[side])))
            for side in SIDES
        }
        made[name] = Profile(PROFILES[name], 0.4, 0.05, tables["keys"], tables["values"])
    losses = {name: pb.Measured(kl=0.01, compression=PROFILES[name], n_tokens=100, engine="test") for name in measured}
    return Bundle(spec, layers_per_group, bases["keys"], bases["values"], made, losses)


def pieces(content: bytes, size: int = 1 << 20) -> Iterator[pb.InstallBundleRequest]:
    """The stream that installs a bundle."""
    for start in range(0, max(len(content), 1), size):
        total = len(content) if start == 0 else 0
        yield pb.InstallBundleRequest(total_bytes=total, data=content[start : start + size])


def install(daemon: DaemonProcess, bundle: Bundle) -> pb.BundleStatus:
    """Installs a bundle over the wire. Raises DaemonError."""
    response: pb.InstallBundleResponse = daemon.call("InstallBundle", pieces(bundle.pack()))
    return response.bundle


def _split(spec: ModelSpec, layers_per_group: int, seed: int) -> planes.Planes:
    block = KVBlock.dense(low_rank_tensors(spec, seed), spec.block_size, first_position=spec.block_size)
    return planes.split(block, spec, layers_per_group)


def _fitted(rows: Sequence[np.ndarray]) -> Basis:
    moments = [Moments.of(r) for r in rows]
    total = sum(moments[1:], moments[0])
    return storable(klt.fit(total, len(total.total)))


def _tables(basis: Basis, rows: np.ndarray, step: float) -> Tables:
    steps = np.where(basis.variances < 0.01, 0, step).astype(np.float32)
    return Tables(steps, entropy.choose_scale(quantize.quantize(klt.project(rows, basis), steps)))
