"""A model that reads on from the cache of a prompt, as often as it is asked: answers, and how likely they are."""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import stream_generate

from .loss import log_softmax
from .road import Engine


class CacheReader:
    """See `tasks.Reader`. cache: of a prompt; it stays as it is. Questions have one token at least."""

    def __init__(self, engine: Engine, cache: list[Any]) -> None:
        self._engine, self._cache = engine, cache

    def log_probabilities(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [len(token_ids), vocabulary], of what comes after each of these tokens behind the prompt."""
        return self._read(token_ids, copy.deepcopy(self._cache))

    def recalls(self, question: Sequence[int], answer: Sequence[int]) -> bool:
        found = self.log_probabilities([*question, *answer[:-1]])[-len(answer) :]
        return bool(np.array_equal(found.argmax(-1), answer))

    def likelihoods(self, question: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        asked = copy.deepcopy(self._cache)
        first = self._read(question, asked)[-1:]
        found = []
        for answer in answers:
            rows = first
            if len(answer) > 1:
                rows = np.concatenate([first, self._read(answer[:-1], copy.deepcopy(asked))])
            found.append(float(rows[np.arange(len(answer)), list(answer)].sum(dtype=np.float64)))
        return found

    def generate(self, question: Sequence[int], max_tokens: int, stops: Sequence[str]) -> str:
        rest: dict[str, Any] = {"prompt": mx.array(list(question)), "prompt_cache": copy.deepcopy(self._cache)}
        text: str = ""
        for piece in stream_generate(self._engine.model, self._engine.tokenizer, max_tokens=max_tokens, **rest):
            text += piece.text
            if found := [at for stop in stops if stop and (at := text.find(stop)) >= 0]:
                return text[: min(found)]
        return text

    def _read(self, token_ids: Sequence[int], cache: list[Any]) -> np.ndarray:
        chunks = [np.array(chunk.astype(mx.float32)) for chunk in self._engine.prefill(token_ids, cache)]
        return log_softmax(np.concatenate(chunks))
