"""Restoring a cache of the reference model: against prefill, against files, against the bare codec.

Restored are 1,536 tokens, exactly and at a loss; the prompt is 129 tokens longer, so that a lossy prefix is restored as
long as an exact one: what is computed behind either is timed by itself, up to the first token.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import zstandard
from engine import generate
from first_light import Reference
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from perf_base import Scale, checked, console, interleaved, ratio, running, spread
from reference_model import ReferenceModel, windows
from rich.progress import track
from safetensors.numpy import load_file, save_file

from kvcached import codec
from kvcached.block import BlockId, KVBlock, ModelSpec
from kvcached.calibration import Calibration
from kvcached.codec.bundle import Bundle
from kvcached_client import Client, Connection
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import Policy, PromptStore, fresh_cache

N_TOKENS, N_BEHIND = 1536, 129
PROFILES = ("x8", "x16")
KINDS = ("exact", *PROFILES)
_FIT = (6, 2048)  # windows of text that the bundle is fitted to, and tokens of each
_BLOCK_ID = BlockId(bytes(32), "", bytes(32))
N_CODEC_COPIES = 4  # of the prompt, in the comparison with the bare codec


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    reference = prefilled()
    with console.status("a bundle is fitted"):
        bundle = fitted(reference.spec)
    with running(directory / "d", "--queue-bytes", "1GiB") as (target, _):
        install(target, bundle)
        stores = {kind: opened(reference, target, kind) for kind in KINDS}
        for kind, store in stores.items():
            offloaded(reference, store, kind)
        found = _against_files(reference, stores, scale.rounds, directory)
        found |= _against_prefill(reference, stores, scale, found.pop("seconds"))
        codec_found = _against_codec(reference, bundle, target, scale.rounds)
        for store in stores.values():
            store.close()
    return found | codec_found


@cache
def prefilled() -> Reference:
    """The reference model with its prompt, once for all parts."""
    with console.status("the reference model computes its prompt"):
        return Reference(N_TOKENS + N_BEHIND - 1)


def fitted(spec: ModelSpec) -> Bundle:
    """A bundle of the reference model: speed is measured here, not loss, and no queries are needed for it."""
    model, calibration = ReferenceModel(), Calibration(spec)
    for i, token_ids in enumerate(windows("calibration", *_FIT)):
        added = model.run(token_ids).added
        tensors = {"keys": added.keys.astype(np.float16), "values": added.values.astype(np.float16)}
        calibration.add(KVBlock.dense(tensors, len(token_ids), 0), "tune" if i == 1 else "fit")
    return calibration.fit({name: float(name.removeprefix("x")) for name in PROFILES})


def install(target: str, bundle: Bundle) -> None:
    """Makes a bundle current in a daemon that ends with this bench: the figures attached are none."""
    content, size = bundle.pack(), 1 << 20
    pieces = [
        pb.InstallBundleRequest(total_bytes=0 if start else len(content), data=content[start : start + size])
        for start in range(0, len(content), size)
    ]
    measured = {name: pb.Measured(kl=0.01, compression=8, n_tokens=1, engine="bench") for name in PROFILES}
    with Connection(target) as connection:
        connection.call("RegisterModel", pb.RegisterModelRequest(spec=bundle.spec.to_proto()))
        installed = connection.install_bundle(iter(pieces), 60).bundle
        request = pb.AttachMeasurementsRequest(bundle_id=installed.bundle_id, profiles=measured)
        connection.call("AttachMeasurements", request)


def opened(reference: Reference, target: str, kind: str) -> PromptStore:
    """A store of a namespace of its own."""
    return PromptStore(
        reference.model, Client(reference.spec, namespace=kind, target=target), policy=Policy(store_as=kind)
    )


def offloaded(reference: Reference, store: PromptStore, kind: str) -> None:
    store.offload(reference.prompt[:-1], reference.cache)
    checked(store.flush(60) and not store.counts.refused, "offloading failed")
    held = store.client.match(store.client.chain(reference.prompt), floor=store.policy.floor).blocks
    found = {block.fidelity.profile or "exact" for block in held}
    checked(found == {kind} and len(held) == N_TOKENS // reference.spec.block_size, f"{kind} was stored as {found}")


def _restore(store: PromptStore, prompt: Sequence[int]) -> list[Any]:
    cache, n_tokens = store.restore(prompt)
    checked(n_tokens == N_TOKENS, f"{n_tokens} of {N_TOKENS} tokens were restored")
    mx.eval([entry.state for entry in cache])
    return cache


def _against_files(
    reference: Reference, stores: dict[str, PromptStore], rounds: int, directory: Path
) -> dict[str, Any]:
    """Restores and the same cache from files: mlx-lm's own, plain safetensors, zstd."""
    prompt = reference.prompt
    functions: dict[str, Callable[[], object]] = {
        kind: lambda store=store: _restore(store, prompt) for kind, store in stores.items()
    }
    functions |= _files(_restore(stores["exact"], prompt), directory)
    seconds = interleaved(functions, rounds, "restore, and load from files")
    over = {name: ratio(seconds["exact"], seconds[name]) for name in ("load_prompt_cache", "safetensors", "zstd")}
    return {"exact_restore_over_load_prompt_cache": over["load_prompt_cache"], "exact_over": over, "seconds": seconds}


def _files(cache: list[Any], directory: Path) -> dict[str, Callable[[], object]]:
    prompt_cache, plain, packed = (directory / name for name in ("cache.safetensors", "plain.safetensors", "zstd"))
    save_prompt_cache(str(prompt_cache), cache)
    arrays = {f"{i}.{j}": np.array(a) for i, entry in enumerate(cache) for j, a in enumerate(entry.state[:2])}
    save_file(arrays, plain)
    packed.write_bytes(zstandard.ZstdCompressor(level=1).compress(b"".join(a.tobytes() for a in arrays.values())))
    shapes = [(array.shape, array.dtype) for array in arrays.values()]
    return {
        "load_prompt_cache": lambda: mx.eval([entry.state for entry in load_prompt_cache(str(prompt_cache))]),
        "safetensors": lambda: mx.eval([mx.array(array) for array in load_file(plain).values()]),
        "zstd": lambda: _from_zstd(packed, shapes),
    }


def _from_zstd(file: Path, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> None:
    content = zstandard.ZstdDecompressor().decompress(file.read_bytes())
    arrays, start = [], 0
    for shape, dtype in shapes:
        n = int(np.prod(shape))
        arrays.append(mx.array(np.frombuffer(content, dtype, n, start).reshape(shape)))
        start += arrays[-1].nbytes
    mx.eval(arrays)


def _against_prefill(
    reference: Reference, stores: dict[str, PromptStore], scale: Scale, restored: dict[str, list[float]]
) -> dict[str, Any]:
    """Of the tokens that are restored; and the time to the first token behind them."""
    prefills, firsts = [], {kind: list[float]() for kind in ("prefill", *stores)}
    for _ in track(range(scale.prefills), "prefill, and first tokens", console=console):
        empty = fresh_cache(reference.model)
        prefills.append(generate(reference.model, reference.prompt[:N_TOKENS], empty, 1)[1])
        firsts["prefill"].append(prefills[-1] + generate(reference.model, reference.prompt[N_TOKENS:], empty, 1)[1])
        for kind, store in stores.items():
            start = time.perf_counter()
            cache = _restore(store, reference.prompt)
            began = time.perf_counter() - start
            firsts[kind].append(began + generate(reference.model, reference.prompt[N_TOKENS:], cache, 1)[1])
    by_kind = {kind: ratio(prefills, restored[kind]) for kind in stores}
    return {
        "restore_over_prefill": min(by_kind.values()),
        "restore_over_prefill_by_kind": by_kind,
        "tokens": N_TOKENS,
        "tokens_behind": N_BEHIND,
        "prefill_seconds": spread(prefills),
        "first_token_seconds": {kind: spread(each) for kind, each in firsts.items()},
        "restore_seconds": {name: spread(each) for name, each in restored.items()},
    }


def _against_codec(reference: Reference, bundle: Bundle, target: str, rounds: int) -> dict[str, Any]:
    """Blocks from the daemon to arrays of the client, against decoding the same frames on as many threads as cores."""
    coder = bundle.coder("x8")
    with Client(reference.spec, namespace="codec", target=target) as client:
        chains = [reference.blocks(client, copy) for copy in range(1, N_CODEC_COPIES + 1)]
        for chain in chains:
            checked(all(result.code == "OK" for result in client.put(chain, store_as="x8")), "a put failed")
        blocks = [block for chain in chains for block in chain]
        dense = [KVBlock.dense(b.tensors, len(b.token_ids), b.first_position) for b in blocks]
        frames = [codec.encode(_BLOCK_ID, block, coder=coder) for block in dense]
        with ThreadPoolExecutor(2) as threads:
            functions: dict[str, Callable[[], object]] = {
                "bare": lambda: list(threads.map(lambda f: codec.decode(_BLOCK_ID, f, dense[0].nbytes, coder), frames)),
                "daemon": lambda: _get([block.block_hash for block in blocks], client),
            }
            seconds = interleaved(functions, rounds, "coded blocks, and the bare codec")
    rates = {
        f"{name}_mb_a_second": sum(b.nbytes for b in dense) / 1e6 / float(np.median(s)) for name, s in seconds.items()
    }
    return {"restore_over_codec": ratio(seconds["bare"], seconds["daemon"]), "codec": rates}


def _get(hashes: Sequence[bytes], client: Client) -> None:
    found = list(client.get(hashes, floor=Policy().floor))
    checked(all(block is not None for block in found), "a get missed")
