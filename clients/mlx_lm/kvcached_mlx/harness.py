"""mlx-lm's own harness for lm-eval (mlx_lm.evaluate), with a cache of ours between a prompt and what follows on it.

Imports lm-eval, which is not among our dependencies. Its data sets come from where its tasks say.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import mlx.core as mx
from lm_eval.tasks import TaskManager
from mlx_lm.evaluate import MLXLM

from .reading import CacheReader
from .road import Engine

_MAX_TOKENS = 256  # of an answer, where a task does not say
_HALF_WIDTH = 1.96  # standard errors, of an interval at 95 %

CacheOf = Callable[[Sequence[int]], list[Any]]


@dataclass(frozen=True, slots=True)
class Found:
    """A metric of a task. half_width: of its interval at 95 %; None where lm-eval has no standard error."""

    task: str
    metric: str
    value: float
    half_width: float | None
    n: int

    @property
    def bounded(self) -> tuple[float, float | None, float | None]:
        """With the bounds of the interval."""
        if self.half_width is None:
            return self.value, None, None
        return self.value, self.value - self.half_width, self.value + self.half_width


class CachedLM(MLXLM):  # type: ignore[misc] # untyped
    """A model that is loaded. cache_of: gives the cache of a prompt."""

    def __init__(self, engine: Engine, cache_of: CacheOf) -> None:
        super(MLXLM, self).__init__()  # MLXLM's own would load the model again
        self._model, self.tokenizer = engine.model, engine.tokenizer
        self._max_tokens, self._batch_size, self._sampler = None, 1, None
        self.use_chat_template = engine.tokenizer.chat_template is not None
        self._engine, self._cache_of = engine, cache_of

    def _process_prompt(self, prompt: Sequence[int], step_size: int = 0) -> tuple[Any, list[Any]]:
        """Logarithms of probabilities [1, vocabulary] of what comes next, and the cache of the prompt."""
        del step_size  # an engine has its own
        cache = self._cache_of(list(prompt[:-1]))
        logits = self._engine.model(mx.array([[prompt[-1]]]), cache=cache)[:, -1, :]
        log_probabilities = logits.astype(mx.float32) - mx.logsumexp(logits.astype(mx.float32), -1, keepdims=True)
        mx.eval(log_probabilities)
        return log_probabilities, cache

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Raises ValueError: nothing follows on a prefix there."""
        raise ValueError(f"{len(requests)} whole texts are to be judged, with no prefix to restore: see perplexity")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedily, one after another, for caches that are compacted know no batch."""
        return [self._generated(*request.args) for request in requests]

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        prompt = self.tokenizer.encode(context, add_special_tokens=not self.use_chat_template)
        reader = CacheReader(self._engine, self._cache_of(prompt[:-1]))
        until = options.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        return reader.generate(prompt[-1:], int(options.get("max_gen_toks", _MAX_TOKENS)), stops)


def run(engine: Engine, cache_of: CacheOf, task: str, *, limit: int, seed: int, directory: Path | None) -> list[Found]:
    """All metrics of a task, or of those of a group. directory: of descriptions of tasks beside those of lm-eval.

    Raises ValueError for a task that lm-eval does not know.
    """
    manager = TaskManager(include_path=str(directory) if directory else None)
    known = manager.all_tasks
    if task not in known:
        raise ValueError(f"lm-eval has {len(known):,} tasks, and none is called {task!r}")
    lm = CachedLM(engine, cache_of)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        apply_chat_template=lm.use_chat_template,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return list(_found(results))


def _found(results: dict[str, Any]) -> Iterator[Found]:
    """`{"results": {task: {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "n-samples": {task: {"effective": 50}}}`."""
    for task, figures in results["results"].items():
        n = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in figures.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            half_width = _HALF_WIDTH * error if isinstance(error, int | float) else None
            label = metric if filtered == "none" else f"{metric} ({filtered})"
            yield Found(task, label, float(value), half_width, int(n))
