"""What a fidelity costs, by the real road: a prefix through the daemon and back, then text that goes on after it.

The text is teacher-forced on the restored cache, the last tokens of the prefix computed anew, as PromptStore does: of a
compacted prefix, in whole blocks. The next-token distributions are compared with those on the exact cache. Intervals
come from a bootstrap over stretches of 64 positions: neighbours are not independent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache

from kvcached_client import Block, Client, FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb

from . import road
from .intervals import Interval
from .road import Engine, Wish
from .texts import Window

STRETCH = 64  # positions


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


@dataclass(slots=True, eq=False)
class Loss:
    """Of one fidelity: means over stretches, bytes, and how blocks came back."""

    kl: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)  # surprise on the exact cache, in nats
    added: list[float] = field(default_factory=list)  # surprise above that
    documents: set[int] = field(default_factory=set)
    n_tokens: int = 0
    n_values: int = 0
    source_bytes: int = 0
    stored_bytes: int = 0

    def add(self, exact: np.ndarray, found: np.ndarray, targets: Sequence[int]) -> None:
        """Of one text: float32 [len(targets), vocabulary] log-probabilities with the exact cache, and with another."""
        for start in range(0, len(targets), STRETCH):
            part = slice(start, start + STRETCH)
            p, q = exact[part], found[part]
            at = (np.arange(len(p)), np.array(targets[part]))
            self.kl.append(float((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean()))
            self.exact.append(float(-p[at].astype(np.float64).mean()))
            self.added.append(float((p[at] - q[at]).astype(np.float64).mean()))
        self.n_tokens += len(targets)

    def mean_kl(self) -> Interval:
        """Nats per token."""
        return Interval.of_mean(self.kl)

    def perplexity_delta(self) -> Interval:
        """Per cent above the exact cache's."""
        return Interval(*map(_per_cent, Interval.of_mean(self.added)))

    def perplexity(self) -> Interval:
        """Of geometric means over stretches."""
        return Interval(*map(_exp, Interval.of_mean(np.array(self.exact) + self.added)))

    def measured(self) -> pb.Measured:
        """As a bundle has it."""
        kl, delta = self.mean_kl(), self.perplexity_delta()
        return pb.Measured(
            bits_per_value=8 * self.stored_bytes / self.n_values,
            compression=self.source_bytes / self.stored_bytes,
            kl=kl.value,
            kl_low=kl.low,
            kl_high=kl.high,
            perplexity_delta=delta.value,
            perplexity_delta_low=delta.low,
            perplexity_delta_high=delta.high,
            n_tokens=self.n_tokens,
            n_documents=len(self.documents),
            engine=f"mlx-lm {mlx_lm.__version__}",
        )


def measure(
    engine: Engine,
    client: Client,
    bundle_id: bytes,
    wishes: Sequence[Wish],
    windows: Sequence[Window],
    course: Course,
    advance: Callable[[int], None] = lambda _n: None,
) -> list[Loss]:
    """What each wish costs on windows of `course.length` tokens.

    client: in a namespace that nobody else uses; what is put there is deleted again. bundle_id: that blocks are coded
    with. advance: told of tokens computed.

    Raises:
        DaemonError: the daemon did not store any block as it was to be stored, or did not give them back.
        ValueError: the model cannot go on from compacted blocks.
    """
    if any(wish.compacts for wish in wishes):
        engine.check_compaction()
    losses = [Loss() for _ in wishes]
    for window in windows:
        token_ids = window.token_ids
        prefix = road.prefix_blocks(engine, client, token_ids[: course.prefix], engine.make_cache())
        exact = _log_probabilities(engine, prefix, token_ids, course)
        advance(course.prefix + course.recomputed + course.continued)
        for wish, loss in zip(wishes, losses, strict=True):
            trip = road.through_daemon(client, prefix, wish, bundle_id)
            found = _log_probabilities(engine, trip.blocks, token_ids, course)
            loss.add(exact, found, token_ids[course.prefix + 1 : course.length])
            loss.documents.add(window.document)
            loss.n_values += _n_values(prefix)
            loss.source_bytes += trip.source_bytes
            loss.stored_bytes += trip.stored_bytes
            advance(course.recomputed + course.continued)
    return losses


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, over the last axis."""
    shifted: np.ndarray = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def n_tokens_to_compute(course: Course, n_windows: int, n_profiles: int) -> int:
    """What `measure` will have told `advance` in the end."""
    again = course.recomputed + course.continued
    return n_windows * (course.prefix + again * (1 + n_profiles))


def _log_probabilities(engine: Engine, prefix: Sequence[Block], token_ids: Sequence[int], course: Course) -> np.ndarray:
    """float32 [n_continued, vocabulary], of the tokens after each position from the end of the prefix on."""
    start = course.prefix
    if can_trim_prompt_cache(engine.make_cache()) and not engine.spec.needs_boundary:  # else nothing can be cut
        start -= course.recomputed
    if any(block.fidelity.kind == FidelityKind.COMPACTED for block in prefix):
        start -= start % engine.spec.block_size
    cache = road.cache_of(engine, prefix, start)
    logits = [np.array(chunk.astype(mx.float32)) for chunk in engine.prefill(token_ids[start:-1], cache)]
    return log_softmax(np.concatenate(logits)[-course.continued :])


def _n_values(prefix: Sequence[Block]) -> int:
    """Numbers in the tensors that are stored."""
    return sum(array.size for block in prefix for name, array in block.tensors.items() if name != "queries")


def _per_cent(log_ratio: float) -> float:
    return float(100 * np.expm1(log_ratio))


def _exp(log: float) -> float:
    return float(np.exp(log))
