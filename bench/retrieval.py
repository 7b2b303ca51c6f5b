"""Does the model still find what it was told? Look-ups in key-value tables that lie in a restored prefix.

A context is held-out text, then a table of names with values, then, after the prefix, the table's names in another
order: the model is asked for each one's value. Names share their first words, so that a blurred key finds the wrong
row, and values are digits or words. The reference model was trained on such tables; these are longer than it likes, so
that it answers five in six, and damage can show. A probe counts if every token of the value is the most
likely one. Rows that the engine computes anew are not asked for.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float64, Int
from loss import Interval, interval
from reference_model import BOS, Cache, ReferenceModel, tokenizer, windows
from under_test import Codec, Course, keep

TABLE_SHARE = 0.75  # of the prefix; more of it is harder
N_FIRST_WORDS = 40
_STYLES = [(" =", "\n"), (":", ",\n"), (" ->", ";\n")]  # between name and value, and after the value
N_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """A prefix with a table, the questions after it, and where their answers lie."""

    token_ids: Int[np.ndarray, " n_tokens"]
    answers: list[slice]


@dataclass(frozen=True, slots=True, eq=False)
class Retrieval:
    """Right answers with the codec and with the exact cache, context by context."""

    right: list[Bool[np.ndarray, " n_probes"]]
    exact: list[Bool[np.ndarray, " n_probes"]]

    def accuracy(self) -> Interval:
        """Share of probes answered."""
        return self._interval(self.right)

    def delta(self) -> Interval:
        """By how much accuracy is above the exact cache's (0.01: one point); paired, contexts resampled."""
        return self._interval([r.astype(int) - e for r, e in zip(self.right, self.exact, strict=True)])

    def _interval(self, answers: list[np.ndarray]) -> Interval:
        sums = np.array([[a.sum(), a.size] for a in answers], float)
        again = _context_weights(len(answers)) @ sums
        return interval(sums[:, 0].sum() / sums[:, 1].sum(), again[:, 0] / again[:, 1])


class Probes:
    """At least `n_probes` look-ups with the exact cache's answers."""

    def __init__(self, model: ReferenceModel, n_probes: int, course: Course | None = None, n_threads: int = 2) -> None:
        self.model, self.course, self.n_threads = model, course or Course(), n_threads
        rng = random.Random(0)
        texts = windows("heldout", 8, self.course.n_prefix)
        self._contexts: list[Context] = []
        while sum(len(context.answers) for context in self._contexts) < n_probes:
            text = texts[len(self._contexts) % len(texts)]
            self._contexts.append(table_context(rng, text, self.course))
        with ThreadPoolExecutor(n_threads) as pool:
            self._prefixes = list(pool.map(self._prefix, self._contexts))
        self.exact = self._answers(keep)

    @property
    def n_probes(self) -> int:
        return sum(len(context.answers) for context in self._contexts)

    def retrieval(self, codec: Codec) -> Retrieval:
        """What the model still finds behind `codec`."""
        return Retrieval(self._answers(codec), self.exact)

    def _prefix(self, context: Context) -> Cache:
        return self.model.run(context.token_ids[: self.course.n_prefix]).added.rounded()

    def _answers(self, codec: Codec) -> list[Bool[np.ndarray, " n_probes"]]:
        def answers(context: Context, prefix: Cache) -> Bool[np.ndarray, " n_probes"]:
            restored, _ = self.course.restore(codec, prefix)
            logits = self.course.resume(self.model, context.token_ids, restored).logits
            best = np.empty(len(context.token_ids), int)
            best[restored.n_tokens + 1 :] = logits[:-1].argmax(-1)
            return np.array([(best[where] == context.token_ids[where]).all() for where in context.answers])

        with ThreadPoolExecutor(self.n_threads) as pool:
            return list(pool.map(answers, self._contexts, self._prefixes))


def table_context(rng: random.Random, text: Int[np.ndarray, " n"], course: Course) -> Context:
    """Text and table that fill the prefix, then as many look-ups as the continuation has room for."""
    separator, end = rng.choice(_STYLES)
    rows: list[list[list[int]]] = []
    n_table, names = 0, _names(rng)
    while n_table < TABLE_SHARE * course.n_prefix:
        row = [_encode(next(names) + separator), _encode(" " + _value(rng)), _encode(end)]
        rows.append(row)
        n_table += sum(map(len, row))
    table = [token for row in rows for part in row for token in part]
    token_ids = [BOS, *text[1 : course.n_prefix - len(table)].tolist(), *table]
    stored = _rows_before(rows, course.n_prefix - len(table), course.n_prefix - course.n_recomputed)
    answers = []
    for name, value, rest in rng.sample(stored, len(stored)):
        if len(token_ids) + len(name) + len(value) + len(rest) > course.n_tokens:
            break
        start = len(token_ids) + len(name)
        answers.append(slice(start, start + len(value)))
        token_ids += name + value + rest
    return Context(np.array(token_ids), answers)


def _rows_before(rows: list[list[list[int]]], start: int, end: int) -> list[list[list[int]]]:
    """The rows that are over at token `end`, when the first begins at token `start`."""
    ends = start + np.cumsum([sum(map(len, row)) for row in rows])
    return [row for row, row_end in zip(rows, ends.tolist(), strict=True) if row_end <= end]


def _names(rng: random.Random) -> Iterator[str]:
    """Distinct names of two words; a first word comes back again and again."""
    first_words = rng.sample(_words(), N_FIRST_WORDS)
    given: set[str] = set()
    while True:
        name = f"{rng.choice(first_words)} {rng.choice(_words())}"
        if name not in given:
            given.add(name)
            yield name


def _value(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choice("0123456789") for _ in range(5))
    return f"{rng.choice(_words())} {rng.choice(_words())}"


def _encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


@cache
def _words() -> list[str]:
    """Lower-case words that are one token after a space."""
    pieces = (piece for piece in tokenizer().get_vocab() if piece.startswith("\u0120") and len(piece) > 4)
    words = (piece[1:] for piece in pieces)
    return sorted(word for word in words if word.isascii() and word.isalpha() and word.islower())


@cache
def _context_weights(n_contexts: int) -> Float64[np.ndarray, "n_resamples n_contexts"]:
    return (
        np.random.default_rng(1).multinomial(n_contexts, np.full(n_contexts, 1 / n_contexts), N_RESAMPLES).astype(float)
    )
