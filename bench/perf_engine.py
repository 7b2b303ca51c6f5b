"""What offloading costs the thread that generates: the call itself, and the tokens that it decodes meanwhile.

The reference model decodes 256 tokens behind a prompt, with that prompt offloaded at the start or not, in turn; the
daemon compresses and commits at the same time, on the same cores.
"""

import copy
import itertools
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from first_light import Reference
from mlx_lm.generate import generate_step
from perf_base import Scale, checked, console, running, spread
from perf_restore import N_TOKENS, prefilled
from rich.progress import track

from kvcached_client import Client
from kvcached_mlx import Policy, PromptStore

N_DECODED = 256


def measure(scale: Scale, directory: Path) -> dict[str, Any]:
    """`put_cost_share`: the call of `offload` over decoding. `decode_speed_with_offload`: in time on the clock.

    by_cpu_time: the same in the engine's own CPU time, which others on the machine do not add to.
    """
    reference = prefilled()
    plain, offloading, calls = [], [], []
    cpu: dict[bool, list[float]] = {False: [], True: []}
    with running(directory, "--queue-bytes", "1GiB") as (target, _):
        for turn in track(range(scale.decode_rounds), "decoding while blocks are put", console=console):
            with_first = bool(turn % 2)
            for offloads in (with_first, not with_first):
                started = time.process_time()
                called, decoded = _decoding(reference, target if offloads else "", turn)
                cpu[offloads].append(time.process_time() - started)
                (offloading if offloads else plain).append(decoded)
                calls += [called] if offloads else []
    return {
        "put_cost_share": float(np.median(calls) / np.median(plain)),
        "decode_speed_with_offload": float(np.median(np.array(plain) / np.array(offloading))),
        "by_cpu_time": float(np.median(np.array(cpu[False]) / np.array(cpu[True]))),
        "offload_call_seconds": spread(calls),
        "decode_seconds": {"plain": spread(plain), "offloading": spread(offloading)},
        "decoded_tokens": N_DECODED,
        "offloaded_bytes": reference.source_bytes,
    }


def _decoding(reference: Reference, target: str, turn: int) -> tuple[float, float]:
    """Seconds of the call that offloads (into a namespace where nothing is held), and of decoding with what it does."""
    cache, store, called = copy.deepcopy(reference.cache), None, 0.0
    mx.eval([entry.state for entry in cache])
    start = time.perf_counter()
    if target:
        client = Client(reference.spec, namespace=f"turn {turn}", target=target)
        client.match([])  # connected and registered, as in an engine that runs
        store = PromptStore(reference.model, client, policy=Policy(store_as="exact"))
        start = time.perf_counter()
        n_taken = store.offload(reference.prompt[:-1], cache)
        called = time.perf_counter() - start
        checked(n_taken == N_TOKENS // reference.spec.block_size, f"{n_taken} blocks were taken")
    steps = generate_step(mx.array(reference.prompt[-1:]), reference.model, max_tokens=N_DECODED, prompt_cache=cache)
    n_decoded = sum(1 for _ in itertools.islice(steps, N_DECODED))
    seconds = time.perf_counter() - start
    checked(n_decoded == N_DECODED, f"{n_decoded} tokens were decoded")
    if store:
        checked(store.flush(60) and store.counts.sent == N_TOKENS // reference.spec.block_size, "offloading failed")
        store.close()
        store.client.close()
    return called, seconds
