"""When fetching a prefix beats computing it: from speeds measured on this machine, with this model and this daemon."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import mlx.core as mx

from kvcached_client import Client, ModelSpec

from . import blocks

log = logging.getLogger(__name__)

_PROBE_BLOCKS = 2
_WARM_UP_TOKENS = 16
_MIN_PATIENCE_SECONDS = 0.25
_WEIGHT_OF_LATEST = 0.5


@dataclass(slots=True)
class BreakEven:
    """Two speeds in tokens per second, and the rule that they yield. 0: not measured, then every gain is taken."""

    prefill: float = 0.0
    restore: float = 0.0  # from the first byte asked for to a cache that can be used

    @property
    def min_gain(self) -> float:
        """The part of a held prefix that must be new to the engine for fetching it to pay. 0 if not measured."""
        return self.prefill / self.restore if self.restore else 0.0

    def pays(self, n_local: int, n_held: int) -> bool:
        """Whether to fetch `n_held` tokens where the first `n_local` of them are at hand anyway."""
        return n_held > self.least(n_local)

    def least(self, n_local: int) -> float:
        """How many held tokens do not yet pay; all above do. Infinite if none ever do."""
        return n_local / (1 - self.min_gain) if self.min_gain < 1 else inf

    def patience(self, n_local: int, n_held: int) -> float | None:
        """Seconds after which computing would have been faster; None if that is not known."""
        return max((n_held - n_local) / self.prefill, _MIN_PATIENCE_SECONDS) if self.prefill else None

    def restored(self, n_tokens: int, seconds: float) -> None:
        """Learns from a restore."""
        latest = n_tokens / max(seconds, 1e-6)
        self.restore += (latest - self.restore) * (_WEIGHT_OF_LATEST if self.restore else 1.0)

    def __str__(self) -> str:
        prefill = f"prefill {self.prefill:,.0f} tokens/s" if self.prefill else "prefill not measured"
        if not self.restore:
            return f"{prefill}, restore not measured yet: what the daemon holds is fetched"
        rule = f"a prefix is fetched where more than {self.min_gain:.1%} of it is not at hand"
        if self.min_gain >= 1:
            rule = "computing is faster, nothing is fetched"
        return f"{prefill}, restore {self.restore:,.0f} tokens/s: {rule}"


def measure(model: Any, make_cache: Callable[[], list[Any]], probe: Client) -> BreakEven:
    """Computes two blocks of a prompt, puts them, gets them back, and removes them again.

    probe: a client in a namespace of its own, with short limits. Without a daemon only prefill is measured.
    """
    token_ids = [i * 7 % 61 for i in range(_PROBE_BLOCKS * probe.spec.block_size)]  # any model knows so few
    _prefill(model, make_cache, token_ids[:_WARM_UP_TOKENS])  # compiles kernels
    start = time.perf_counter()
    cache = _prefill(model, make_cache, token_ids)
    break_even = BreakEven(prefill=len(token_ids) / (time.perf_counter() - start))
    seconds = _time_restore(probe.spec, token_ids, cache, make_cache, probe)
    if seconds:
        break_even.restored(len(token_ids), seconds)
    return break_even


def _prefill(model: Any, make_cache: Callable[[], list[Any]], token_ids: list[int]) -> list[Any]:
    """What mlx-lm does with a prompt: logits are left alone."""
    cache = make_cache()
    model(mx.array([token_ids]), cache=cache)
    mx.eval([entry.state for entry in cache])
    return cache


def _time_restore(
    spec: ModelSpec, token_ids: list[int], cache: list[Any], make_cache: Callable[[], list[Any]], probe: Client
) -> float:
    """Seconds from asking for blocks to a cache made of them; 0 if there is no daemon to do it with."""
    hashes = probe.chain(token_ids)
    results = probe.put(blocks.to_blocks(spec, token_ids, hashes, cache), store_as="exact")
    if any(result.code != "OK" for result in results):
        return 0.0
    start = time.perf_counter()
    fetched = [blocks.own(block, for_mlx=True) for block in probe.get(hashes) if block]
    if len(fetched) == len(hashes):
        blocks.from_blocks(spec, fetched, make_cache())
        seconds = time.perf_counter() - start
    else:
        seconds = 0.0
    probe.delete(hashes)
    return seconds
