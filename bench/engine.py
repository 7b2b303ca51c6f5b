"""An engine for demo and benchmarks: mlx-lm with the reference model, in a process of its own.

    engine.py plain                  prefill, then generate: what never was evicted
    engine.py offload SOCKET         prefill, hand everything over, then wait to be killed
    engine.py restore SOCKET         restore what is held, compute the rest, generate

Prints one JSON line. Prefill runs in chunks of one block in every role, so that all of them do the same arithmetic; the
tokens that the model computes for the prompt are counted where the model is called.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import trim_prompt_cache

from kvcached_client import Client
from kvcached_mlx import DEFAULT_BLOCK_SIZE, PromptStore, fresh_cache, model_spec

DATA = Path(__file__).resolve().parent.parent / "tests/data/model"
REFERENCE_MODEL = DATA / "qwen3-5m"
DOCUMENT = "library/cmd.rst.txt"  # of the held-out texts, the one that is continued with the most different tokens


class CountingModel:
    """A model that counts the tokens it computes."""

    def __init__(self, model: Any) -> None:
        self._model, self.n_tokens = model, 0

    def __call__(self, tokens: mx.array, **kwargs: Any) -> mx.array:
        self.n_tokens += tokens.shape[-1]
        return self._model(tokens, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def document(tokenizer: Any, n_tokens: int) -> list[int]:
    """The beginning of a text that the model never saw, with the BOS that it wants."""
    texts = (json.loads(line) for line in (DATA / "text/heldout.jsonl").open())
    text = next(item["text"] for item in texts if item["path"].endswith(DOCUMENT))
    # Cut before encoding: the tokenizer warns about texts longer than the model's context.
    token_ids = tokenizer.encode(text[: 3 * n_tokens])
    if len(token_ids) < n_tokens:
        raise SystemExit(f"{DOCUMENT} has only {len(token_ids)} tokens")
    return list(token_ids[:n_tokens])


def generate(model: CountingModel, prompt: list[int], cache: list[Any], n_tokens: int) -> tuple[list[int], float, int]:
    """Greedy tokens, seconds to the first of them, and prompt tokens computed until then."""
    start, before = time.perf_counter(), model.n_tokens
    generated: list[int] = []
    seconds, n_computed = 0.0, 0
    steps = generate_step(
        mx.array(prompt), model, max_tokens=n_tokens, prompt_cache=cache, prefill_step_size=DEFAULT_BLOCK_SIZE
    )
    for token, _ in steps:
        if not generated:
            seconds = time.perf_counter() - start
            n_computed = model.n_tokens - before - 1  # the step for the second token is under way already
        generated.append(int(token))
    return generated, seconds, n_computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["plain", "offload", "restore"])
    parser.add_argument("target", nargs="?", help="where the daemon listens")
    parser.add_argument("--tokens", type=int, default=1700, help="length of the document")
    parser.add_argument("--generate", type=int, default=64)
    arguments = parser.parse_args()
    loaded, tokenizer = load(str(REFERENCE_MODEL))
    model = CountingModel(loaded)
    prompt = document(tokenizer, arguments.tokens)
    if arguments.role == "plain":
        tokens, seconds, n_computed = generate(model, prompt, fresh_cache(model), arguments.generate)
        report = {"prefill_seconds": seconds, "computed_tokens": n_computed, "generated": tokens}
    else:
        store = PromptStore(model, Client(model_spec(model, REFERENCE_MODEL), target=arguments.target))
        report = (offload if arguments.role == "offload" else restore)(model, store, prompt, arguments.generate)
    if "generated" in report:
        report["text"] = tokenizer.decode(report["generated"])
    print(json.dumps(report), flush=True)
    if arguments.role == "offload":
        sys.stdin.read()  # until killed


def offload(model: CountingModel, store: PromptStore, prompt: list[int], _n_generate: int) -> dict[str, Any]:
    """What an engine does that is asked once, then evicts."""
    cache = fresh_cache(model)
    generate(model, prompt, cache, 1)
    trim_prompt_cache(cache, cache[0].offset - len(prompt))
    n_blocks = store.offload(prompt, cache)
    flushed = store.flush(timeout=120)
    return {"offloaded_blocks": n_blocks, "acknowledged_blocks": store.counts.sent, "flushed": flushed}


def restore(model: CountingModel, store: PromptStore, prompt: list[int], n_generate: int) -> dict[str, Any]:
    """What an engine does that is asked again."""
    start = time.perf_counter()
    cache, n_restored = store.restore(prompt)
    restore_seconds = time.perf_counter() - start
    tokens, seconds, n_computed = generate(model, prompt[n_restored:], cache, n_generate)
    return {
        "restore_seconds": restore_seconds,
        "first_token_seconds": restore_seconds + seconds,
        "restored_tokens": n_restored,
        "computed_tokens": n_computed,
        "generated": tokens,
    }


if __name__ == "__main__":
    main()
