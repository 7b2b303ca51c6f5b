"""What a profile costs, by the real road: a prefix through the daemon and back, then text that goes on after it.

The text is teacher-forced on the restored cache, the last tokens of the prefix computed anew, as PromptStore does; the
next-token distributions are compared with those on the exact cache. Intervals come from a bootstrap over stretches of
64 positions: neighbours are not independent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from kvcached_client import Block, Client, DaemonError, FidelityKind, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb

from . import blocks
from .texts import Window

STRETCH = 64  # positions
N_RESAMPLES, LEVEL = 1000, 0.95


@dataclass(frozen=True, slots=True)
class Course:
    """How a loss is measured, in tokens: `prefix` through the daemon (whole blocks), the last `recomputed` of them
    computed anew, then `continued` predictions.
    """

    prefix: int = 1024
    continued: int = 256
    recomputed: int = 128

    @property
    def length(self) -> int:
        """Of a window: the last prediction has a token to be compared with."""
        return self.prefix + self.continued + 1


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """A loaded model with all that it takes to run it on text."""

    model: Any
    tokenizer: Any
    spec: ModelSpec
    make_cache: Callable[[], list[Any]]

    def prefill(self, token_ids: Sequence[int], cache: list[Any]) -> Iterator[Any]:
        """Logits [n, vocabulary] of each chunk of a block's size, not evaluated."""
        for start in range(0, len(token_ids), self.spec.block_size):
            logits = self.model(mx.array([list(token_ids[start : start + self.spec.block_size])]), cache=cache)
            mx.eval([entry.state for entry in cache])
            yield logits[0]


@dataclass(slots=True, eq=False)
class _Sums:
    """Of one profile: means over stretches, and bytes."""

    kl: list[float] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)  # above the exact cache's, in nats
    n_tokens: int = 0
    n_values: int = 0
    source_bytes: int = 0
    stored_bytes: int = 0


def measure(
    engine: Engine,
    client: Client,
    bundle_id: bytes,
    profiles: Sequence[str],
    windows: Sequence[Window],
    course: Course,
    advance: Callable[[int], None] = lambda _n: None,
) -> dict[str, pb.Measured]:
    """What each profile of a bundle costs on windows of `course.length` tokens.

    client: in a namespace that nobody else uses; what is put there is deleted again. advance: told of tokens computed.

    Raises:
        DaemonError: the daemon did not store blocks as they were to be stored, or did not give them back.
    """
    sums = {name: _Sums() for name in profiles}
    for token_ids in (window.token_ids for window in windows):
        prefix = _prefix_blocks(engine, client, token_ids[: course.prefix])
        exact = _log_probabilities(engine, prefix, token_ids, course)
        advance(course.prefix + course.recomputed + course.continued)
        for name, total in sums.items():
            coded, results = _through_daemon(client, prefix, name, bundle_id)
            found = _log_probabilities(engine, coded, token_ids, course)
            _add_loss(total, exact, found, token_ids[course.prefix + 1 : course.length])
            total.n_values += sum(array.size for block in prefix for array in block.tensors.values())
            total.source_bytes += sum(result.source_bytes for result in results)
            total.stored_bytes += sum(result.stored_bytes for result in results)
            advance(course.recomputed + course.continued)
    n_documents = len({window.document for window in windows})
    return {name: _measured(total, n_documents) for name, total in sums.items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, over the last axis."""
    shifted: np.ndarray = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def n_tokens_to_compute(course: Course, n_windows: int, n_profiles: int) -> int:
    """What `measure` will have told `advance` in the end."""
    again = course.recomputed + course.continued
    return n_windows * (course.prefix + again * (1 + n_profiles))


def _prefix_blocks(engine: Engine, client: Client, token_ids: Sequence[int]) -> list[Block]:
    cache = engine.make_cache()
    for _ in engine.prefill(token_ids, cache):
        pass
    return blocks.to_blocks(engine.spec, token_ids, client.chain(token_ids), cache)


def _log_probabilities(engine: Engine, prefix: Sequence[Block], token_ids: Sequence[int], course: Course) -> np.ndarray:
    """float32 [n_continued, vocabulary], of the tokens after each position from the end of the prefix on."""
    cache = engine.make_cache()
    blocks.from_blocks(engine.spec, prefix, cache)
    start = course.prefix
    if can_trim_prompt_cache(cache):  # else nothing can be computed anew
        start -= trim_prompt_cache(cache, course.recomputed)
    logits = [np.array(chunk.astype(mx.float32)) for chunk in engine.prefill(token_ids[start:-1], cache)]
    return log_softmax(np.concatenate(logits)[-course.continued :])


def _through_daemon(
    client: Client, prefix: Sequence[Block], profile: str, bundle_id: bytes
) -> tuple[list[Block], list[pb.PutResult]]:
    """The blocks as a profile gives them back, and the results of putting them; they do not stay in the daemon."""
    hashes = [block.block_hash for block in prefix]
    client.delete(hashes)  # of somebody who was killed
    try:
        results = client.put(prefix, store_as=profile, store_as_bundle=bundle_id)
        for result in results:
            if result.code != "OK":
                raise DaemonError(result.code, f"a block was not stored as {profile}: {result.message}")
        kinds = {(result.fidelity.kind, result.fidelity.profile, result.fidelity.bundle_id) for result in results}
        if (pb.FIDELITY_KIND_CODED, profile, bundle_id) not in kinds:  # one that cannot be coded is stored exactly
            raise DaemonError("FAILED_PRECONDITION", f"no block was stored as {profile} of {bundle_id.hex()}")
        found = [block for block in client.get(hashes, floor=FidelityKind.CODED) if block]
        if len(found) != len(hashes):
            raise DaemonError("NOT_FOUND", f"of {len(hashes)} blocks stored as {profile}, {len(found)} came back")
        return found, results
    finally:
        client.delete(hashes)


def _add_loss(total: _Sums, exact: np.ndarray, found: np.ndarray, targets: Sequence[int]) -> None:
    for start in range(0, len(targets), STRETCH):
        part = slice(start, start + STRETCH)
        p, q = exact[part], found[part]
        at = (np.arange(len(p)), np.array(targets[part]))
        total.kl.append(float((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean()))
        total.surprise.append(float((p[at] - q[at]).astype(np.float64).mean()))
    total.n_tokens += len(targets)


def _measured(total: _Sums, n_documents: int) -> pb.Measured:
    kl, surprise = np.array(total.kl), np.array(total.surprise)
    chosen = np.random.default_rng(0).integers(0, len(kl), (N_RESAMPLES, len(kl)))
    bounds = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    kl_low, kl_high = np.quantile(kl[chosen].mean(1), bounds)
    low, high = _per_cent(np.quantile(surprise[chosen].mean(1), bounds))
    return pb.Measured(
        bits_per_value=8 * total.stored_bytes / total.n_values,
        compression=total.source_bytes / total.stored_bytes,
        kl=kl.mean(),
        kl_low=kl_low,
        kl_high=kl_high,
        perplexity_delta=_per_cent(surprise.mean()),
        perplexity_delta_low=low,
        perplexity_delta_high=high,
        n_tokens=total.n_tokens,
        n_documents=n_documents,
        engine=f"mlx-lm {mlx_lm.__version__}",
    )


def _per_cent(log_ratio: Any) -> Any:
    return 100 * np.expm1(log_ratio)
