"""What tasks of `kvcachedctl eval` are: prompts, the questions that follow on each, and how an answer is scored.

A prompt goes through the daemon, a question is read on what came back of it. Answers score 1 or 0:

    Recall    each token of the answer is the model's most likely one: what greedy decoding would say (needle, multikey)
    Choice    the right one of some answers is the likeliest, by the sum over its tokens (mmlu, tracking)
    Answer    what greedy decoding says is right by a rule of the task's (gsm8k, litm)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Reader(Protocol):
    """A model with the cache of a prompt, for any number of questions."""

    def recalls(self, question: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether each token of an answer is the most likely one, those before it given."""

    def likelihoods(self, question: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        """Logarithms of the probabilities of whole answers."""

    def generate(self, question: Sequence[int], max_tokens: int, stops: Sequence[str]) -> str:
        """Greedily, up to the end of the text, or to the first of `stops`, which is left out."""


class Case(Protocol):
    """One question, in tokens."""

    @property
    def question(self) -> list[int]: ...

    def score(self, reader: Reader) -> float:
        """From 0 to 1."""


@dataclass(frozen=True, slots=True)
class Recall:
    question: list[int]
    answer: list[int]

    def score(self, reader: Reader) -> float:
        return float(reader.recalls(self.question, self.answer))


@dataclass(frozen=True, slots=True)
class Choice:
    """right: which of the answers is."""

    question: list[int]
    answers: list[list[int]]
    right: int

    def score(self, reader: Reader) -> float:
        return float(np.argmax(reader.likelihoods(self.question, self.answers)) == self.right)


@dataclass(frozen=True, slots=True)
class Answer:
    question: list[int]
    is_right: Callable[[str], bool]
    max_tokens: int
    stops: tuple[str, ...]

    def score(self, reader: Reader) -> float:
        return float(self.is_right(reader.generate(self.question, self.max_tokens, self.stops)))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens that go through the daemon, as far as they are whole blocks, and what is asked behind them."""

    token_ids: list[int]
    cases: Sequence[Case]


@dataclass(frozen=True, slots=True)
class Task:
    """drawn_by_case: cases are drawn one by one, whatever prompts they share; else those of a prompt together."""

    name: str
    prompts: Sequence[Prompt]
    drawn_by_case: bool = False
