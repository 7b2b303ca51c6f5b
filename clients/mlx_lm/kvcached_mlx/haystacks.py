"""Needle-type tasks, made up from a seed: facts hidden in text that has nothing to do with them.

    needle    one pass key in each haystack, at a depth of its own; recalled whole
    multikey  several in each, some of them asked for one after another; recalled whole
    tracking  chains of assignments, `a = 12345`, `b = a`, `c = b`: which of the values has the last name?

After RULER (arXiv 2404.06654), in few words. What an engine computes anew is no evidence, so nothing is hidden there.
A value is in its haystack exactly once.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .tasks import Choice, Prompt, Recall, Task

_GIVEN, _ASKED = "\nThe pass key for {} is", "\nWhat is the pass key for {}? The pass key for {} is"
_SET, _READ = "\n{} =", "\nlookup {} ="
_N_KEYS, _N_ASKED = 8, 4  # of a multikey haystack
_N_CHAINS, _N_HOPS = 4, 2  # of a tracking haystack; hops: assignments behind the first
_DIGITS = 5
_WORD = re.compile(r"\b[a-z]{4,10}\b")
_MIN_WORDS = 100

Tokens = list[int]


@dataclass(frozen=True)
class Corpus:
    """Text to hide things in.

    windows: tokens of some stretches of it, all of one length, opened as the tokenizer opens a text. n_opening: how
    many tokens that takes. n_hidden: facts lie within so many first tokens. encode: without what opens a text.
    """

    text: str
    windows: Sequence[Tokens]
    n_opening: int
    n_hidden: int
    encode: Callable[[str], Tokens]

    @cached_property
    def words(self) -> list[str]:
        """That names are made of. Raises ValueError where there are too few."""
        found = sorted(set(_WORD.findall(self.text)))
        if len(found) < _MIN_WORDS:
            raise ValueError(
                f"{_MIN_WORDS} words of 4 to 10 small letters are needed for names, the text has {len(found)}"
            )
        return found


def needle(corpus: Corpus, n_questions: int, seed: int) -> Task:
    """A haystack for each question, the depths spread evenly. Raises ValueError where a haystack is too small."""
    rng = random.Random(f"needle {seed}")
    prompts = []
    for i in range(n_questions):
        (fact,) = _facts(corpus, rng, 1)
        window = corpus.windows[i % len(corpus.windows)]
        token_ids = _hide(corpus, window, [fact.given], [(i + rng.random()) / n_questions])
        prompts.append(Prompt(token_ids, [fact.case]))
    return Task("needle", prompts)


def multikey(corpus: Corpus, n_questions: int, seed: int) -> Task:
    """Raises ValueError where a haystack is too small."""
    rng = random.Random(f"multikey {seed}")
    prompts = []
    for i in range(-(-n_questions // _N_ASKED)):
        facts = _facts(corpus, rng, _N_KEYS)
        token_ids = _scatter(corpus, rng, i, [fact.given for fact in facts])
        n_asked = min(_N_ASKED, n_questions - i * _N_ASKED)
        prompts.append(Prompt(token_ids, [fact.case for fact in rng.sample(facts, n_asked)]))
    return Task("multikey", prompts)


def tracking(corpus: Corpus, n_questions: int, seed: int) -> Task:
    """The last name of each chain is asked for, and all chains' values are offered. Raises ValueError as `needle`."""
    rng = random.Random(f"tracking {seed}")
    prompts = []
    for i in range(-(-n_questions // _N_CHAINS)):
        names, values = iter(rng.sample(corpus.words, _N_CHAINS * (_N_HOPS + 1))), _values(corpus, rng)
        chains = [([next(values)], [next(names) for _ in range(_N_HOPS + 1)]) for _ in range(_N_CHAINS)]
        rows = [_rows(corpus, [*value, *chain[:-1]], chain) for value, chain in chains]
        order = rng.sample([n for n in range(_N_CHAINS) for _ in range(_N_HOPS + 1)], _N_CHAINS * (_N_HOPS + 1))
        token_ids = _scatter(corpus, rng, i, [next(rows[n]) for n in order])
        answers = [corpus.encode(f" {value}") for (value,), _ in chains]
        asked = [Choice(corpus.encode(_READ.format(chain[-1])), answers, n) for n, (_, chain) in enumerate(chains)]
        prompts.append(Prompt(token_ids, asked[: n_questions - i * _N_CHAINS]))
    return Task("tracking", prompts)


GENERATED = {"needle": needle, "multikey": multikey, "tracking": tracking}


@dataclass(frozen=True, slots=True)
class _Fact:
    """As it is hidden, and as it is asked for."""

    given: Tokens
    case: Recall


def _facts(corpus: Corpus, rng: random.Random, n: int) -> list[_Fact]:
    """Pass keys of different names. The value's tokens are the same where it is given and where it is expected."""
    facts = []
    for name, value in zip(rng.sample(corpus.words, n), _values(corpus, rng), strict=False):
        answer = corpus.encode(f" {value}")
        given = [*corpus.encode(_GIVEN.format(name)), *answer, *corpus.encode(".\n")]
        facts.append(_Fact(given, Recall(corpus.encode(_ASKED.format(name, name)), answer)))
    return facts


def _rows(corpus: Corpus, sources: Sequence[str], names: Sequence[str]) -> Iterator[Tokens]:
    """Assignments of a chain, one after another."""
    for source, name in zip(sources, names, strict=True):
        yield [*corpus.encode(_SET.format(name)), *corpus.encode(f" {source}"), *corpus.encode("\n")]


def _values(corpus: Corpus, rng: random.Random) -> Iterator[str]:
    """Different numbers that the text does not have."""
    given: set[str] = set()
    while True:
        value = "".join(rng.choices("0123456789", k=_DIGITS))
        if value not in given and value not in corpus.text:
            given.add(value)
            yield value


def _scatter(corpus: Corpus, rng: random.Random, index: int, pieces: Sequence[Tokens]) -> Tokens:
    """Hides pieces in this order, anywhere."""
    depths = sorted(rng.random() for _ in pieces)
    return _hide(corpus, corpus.windows[index % len(corpus.windows)], pieces, depths)


def _hide(corpus: Corpus, window: Tokens, pieces: Sequence[Tokens], depths: Sequence[float]) -> Tokens:
    """A window with pieces at depths from 0 to 1 of where they may lie, and as long as it was."""
    n_pieces = sum(map(len, pieces))
    n_text = corpus.n_hidden - corpus.n_opening - n_pieces  # before the last piece
    if n_text < n_pieces:
        raise ValueError(
            f"{n_pieces} tokens are to be hidden in the first {corpus.n_hidden} of a prompt, among as many others at "
            "least: make it longer"
        )
    token_ids, at = window[: corpus.n_opening], corpus.n_opening
    for piece, depth in zip(pieces, depths, strict=True):
        until = corpus.n_opening + int(depth * n_text)
        token_ids += [*window[at:until], *piece]
        at = until
    return [*token_ids, *window[at : len(window) - n_pieces]]
