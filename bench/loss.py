"""What a codec costs: next-token KL, perplexity and attention error of text that goes on after a restored prefix.

KL is that of the next-token distribution to the exact cache's, in nats, over the continuation's positions. The relative
error of attention is ‖o' - o‖ / ‖o‖ of what each layer's attention adds to the residual stream, with the damage of the
layers below it included. Cosines are no evidence (shared/design/codec.md, "Measuring loss").

Intervals come from a bootstrap in two stages, documents and then stretches of 64 positions within them; every codec is
resampled alike, so differences and ratios of two codecs are paired.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int
from reference_model import Cache, ReferenceModel, Rows, log_softmax, windows
from under_test import Codec, Coded, Course, Half, keep

STRETCH = 64  # positions that are resampled together: neighbours are not independent
N_RESAMPLES = 1000
LEVEL = 0.95

Stretches = Float64[np.ndarray, "n_documents n_stretches"]


class Interval(NamedTuple):
    """A figure and the bounds of its interval at `LEVEL`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class _Exact:
    """A document with all that the exact cache makes of it; computed once, compared with every codec."""

    token_ids: Int[np.ndarray, " n_tokens"]
    prefix: Cache
    log_probabilities: Float32[np.ndarray, "n_continued n_vocabulary"]
    attention: Float32[np.ndarray, "n_layers n_continued width"]


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """Means over stretches of positions, and sums over documents."""

    kl: Stretches
    surprise: Stretches  # of the true next token, in nats
    exact_surprise: Stretches
    attention_errors: Float64[np.ndarray, "n_documents n_layers"]  # squared
    attention_norms: Float64[np.ndarray, "n_documents n_layers"]  # squared
    squared_errors: Float64[np.ndarray, "n_documents 2"]  # mean over the prefix's keys, and its values
    bits: float
    n_values: int
    paper_bits: float
    paper_values: int

    def mean_kl(self) -> Interval:
        return interval(self.kl.mean(), resampled(self.kl))

    def perplexity_delta(self) -> Interval:
        """By which part of it perplexity is above the exact cache's: 0.01 is 1 %."""
        difference = self.surprise - self.exact_surprise
        return interval(np.expm1(difference.mean()), np.expm1(resampled(difference)))

    def attention_error(self) -> tuple[Interval, Interval]:
        """Relative error: mean over layers, and that of the worst layer."""
        weights = resamples(*self.kl.shape).sum(2)
        every = np.sqrt(self.attention_errors.sum(0) / self.attention_norms.sum(0))
        again = np.sqrt((weights @ self.attention_errors) / (weights @ self.attention_norms))
        return interval(every.mean(), again.mean(1)), interval(every.max(), again.max(1))


class HeldOut:
    """Held-out documents with their exact runs."""

    def __init__(
        self, model: ReferenceModel, n_documents: int, course: Course | None = None, n_threads: int = 2
    ) -> None:
        self.model, self.course, self.n_threads = model, course or Course(), n_threads
        with ThreadPoolExecutor(n_threads) as pool:
            self._documents = list(pool.map(self._exact, windows("heldout", n_documents, self.course.n_tokens + 1)))

    def loss(self, codec: Codec) -> Loss:
        """What `codec` costs on these documents."""
        with ThreadPoolExecutor(self.n_threads) as pool:
            parts = list(pool.map(lambda document: self._document_loss(codec, document), self._documents))
        coded = [block for _, blocks in parts for block in blocks]
        stacked = [np.stack(items) for items in zip(*(figures for figures, _ in parts), strict=True)]
        return Loss(
            *stacked,
            bits=sum(block.bits for block in coded),
            n_values=sum(block.keys.size + block.values.size for block in coded),
            paper_bits=sum(block.paper_bits for block in coded),
            paper_values=sum(block.paper_values for block in coded),
        )

    def blocks(self, n_blocks: int) -> Iterator[tuple[Half, Half, int]]:
        """Keys, values and first position of the first blocks of the documents' prefixes."""
        size = self.course.block_size
        starts = range(0, self.course.n_prefix, size)
        for document, start in islice(product(self._documents, starts), n_blocks):
            keys, values = (x[:, :, start : start + size] for x in (document.prefix.keys, document.prefix.values))
            yield keys.astype(np.float16), values.astype(np.float16), start

    def _exact(self, token_ids: Int[np.ndarray, " n_tokens"]) -> _Exact:
        course = self.course
        prefix = self.model.run(token_ids[: course.n_prefix]).added.rounded()
        trace = course.resume(self.model, token_ids[:-1], course.restore(keep, prefix)[0])
        continued = slice(-course.n_continued, None)
        return _Exact(token_ids, prefix, log_softmax(trace.logits[continued]), trace.attention[:, continued])

    def _document_loss(self, codec: Codec, exact: _Exact) -> tuple[tuple[np.ndarray, ...], list[Coded]]:
        course, n = self.course, self.course.n_continued
        restored, blocks = course.restore(codec, exact.prefix)
        trace = course.resume(self.model, exact.token_ids[:-1], restored)
        p, q = exact.log_probabilities, log_softmax(trace.logits[-n:])
        kl = (np.exp(p) * (p - q)).sum(-1, dtype=np.float64)
        targets = (np.arange(n), exact.token_ids[-n:])
        errors = ((trace.attention[:, -n:] - exact.attention) ** 2).sum((1, 2), dtype=np.float64)
        norms = (exact.attention**2).sum((1, 2), dtype=np.float64)
        lost = np.array([_mean_square(blocks, getattr(exact.prefix, side), side) for side in ("keys", "values")])
        return (_stretches(kl), _stretches(-q[targets]), _stretches(-p[targets]), errors, norms, lost), blocks


@cache
def resamples(n_documents: int, n_stretches: int) -> Float64[np.ndarray, "n_resamples n_documents n_stretches"]:
    """Weights of the stretches in each resample; each sums to 1."""
    rng = np.random.default_rng(0)
    documents = rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), N_RESAMPLES)
    drawn = rng.multinomial(documents * n_stretches, np.full(n_stretches, 1 / n_stretches))
    return drawn / (n_documents * n_stretches)


def resampled(figure: Stretches) -> Float64[np.ndarray, " n_resamples"]:
    """The mean of a figure in each resample."""
    return np.tensordot(resamples(*figure.shape), figure, 2)


def interval(value: float, again: Float64[np.ndarray, " n_resamples"]) -> Interval:
    """A value with the bounds that its resamples give it."""
    low, high = np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def _stretches(figure: np.ndarray) -> np.ndarray:
    return figure.astype(np.float64).reshape(-1, min(STRETCH, len(figure))).mean(1)


def _mean_square(blocks: list[Coded], exact: Rows, name: str) -> float:
    """Mean squared error of the keys or values of a prefix; rotary positions do not change it."""
    back = np.concatenate([getattr(block, name) for block in blocks], axis=2).astype(np.float32)
    return float(np.square(back - exact).mean(dtype=np.float64))
