"""An engine for demo and benchmarks: mlx-lm with the reference model, in a process of its own.

    engine.py plain                  prefill, then generate: what never was evicted
    engine.py offload SOCKET         prefill, hand everything over, then wait to be killed
    engine.py restore SOCKET         restore what is held, compute the rest, generate
    engine.py calibrate SOCKET       make a bundle for the model

With --fidelity blocks are stored as this profile of the bundle says; with --exact-file `plain` writes there what it
predicts for the document's own next tokens, and `restore` compares its own predictions with that.

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
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import trim_prompt_cache

from kvcached_client import Client, FidelityKind
from kvcached_mlx import DEFAULT_BLOCK_SIZE, Policy, PromptStore, fresh_cache, model_spec
from kvcached_mlx.calibrate import calibrate
from kvcached_mlx.loss import log_softmax

DATA = Path(__file__).resolve().parent.parent / "tests/data/model"
REFERENCE_MODEL = DATA / "qwen3-5m"
CALIBRATION_TOKENS = 4000  # a small budget: a demo is to end within minutes on a slow machine
MEASURED_TOKENS = 128
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


def predict(model: CountingModel, cache: list[Any], token_ids: list[int], n_cached: int) -> np.ndarray:
    """Logarithms of probabilities [MEASURED_TOKENS, vocabulary] of what follows the first n_cached tokens.

    cache: of these tokens and perhaps of others that were generated.
    """
    trim_prompt_cache(cache, cache[0].offset - n_cached + 1)
    logits = model(mx.array([token_ids[n_cached - 1 : -1]]), cache=cache)[0]
    return log_softmax(np.array(logits.astype(mx.float32)))


def loss(exact: np.ndarray, found: np.ndarray, next_tokens: list[int]) -> dict[str, float]:
    """Of predictions to those on the exact cache: KL in nats a token, and per cent of perplexity."""
    at = np.arange(len(next_tokens)), next_tokens
    surprise = (exact[at] - found[at]).astype(np.float64)
    return {
        "kl": float((np.exp(exact) * (exact - found)).sum(-1, dtype=np.float64).mean()),
        "perplexity_delta": float(100 * np.expm1(surprise.mean())),
        "measured_tokens": len(next_tokens),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["plain", "offload", "restore", "calibrate"])
    parser.add_argument("target", nargs="?", help="where the daemon listens")
    parser.add_argument("--tokens", type=int, default=1700, help="length of the document")
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--fidelity", default="", help="a profile of the bundle")
    parser.add_argument("--exact-file", type=Path, help="predictions on the exact cache")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.role == "calibrate":
        profiles = (arguments.fidelity,)
        calibrate(str(REFERENCE_MODEL), target=arguments.target, n_tokens=CALIBRATION_TOKENS, profiles=profiles)
        print(json.dumps({"calibrated": arguments.fidelity}), flush=True)
        return
    loaded, tokenizer = load(str(REFERENCE_MODEL))
    model = CountingModel(loaded)
    n_next = MEASURED_TOKENS if arguments.exact_file else 0
    token_ids = document(tokenizer, arguments.tokens + n_next)
    report = {"plain": plain, "offload": offload, "restore": restore}[arguments.role](model, token_ids, arguments)
    if "generated" in report:
        report["text"] = tokenizer.decode(report["generated"])
    print(json.dumps(report), flush=True)
    if arguments.role == "offload":
        sys.stdin.read()  # until killed


def open_store(model: CountingModel, arguments: argparse.Namespace) -> PromptStore:
    client = Client(model_spec(model, REFERENCE_MODEL), target=arguments.target)
    return PromptStore(model, client, policy=Policy(store_as=arguments.fidelity))


def plain(model: CountingModel, token_ids: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """What an engine does that has room for everything."""
    cache = fresh_cache(model)
    prompt = token_ids[: arguments.tokens]
    tokens, seconds, n_computed = generate(model, prompt, cache, arguments.generate)
    if arguments.exact_file:
        np.save(arguments.exact_file, predict(model, cache, token_ids, len(prompt)))
    return {"prefill_seconds": seconds, "computed_tokens": n_computed, "generated": tokens}


def offload(model: CountingModel, token_ids: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """What an engine does that is asked once, then evicts."""
    store, cache = open_store(model, arguments), fresh_cache(model)
    prompt = token_ids[: arguments.tokens]
    generate(model, prompt, cache, 1)
    trim_prompt_cache(cache, cache[0].offset - len(prompt))
    n_blocks = store.offload(prompt, cache)
    flushed = store.flush(timeout=120)
    return {"offloaded_blocks": n_blocks, "acknowledged_blocks": store.counts.sent, "flushed": flushed}


def restore(model: CountingModel, token_ids: list[int], arguments: argparse.Namespace) -> dict[str, Any]:
    """What an engine does that is asked again."""
    store, prompt = open_store(model, arguments), token_ids[: arguments.tokens]
    start = time.perf_counter()
    cache, n_restored = store.restore(prompt)
    restore_seconds = time.perf_counter() - start
    tokens, seconds, n_computed = generate(model, prompt[n_restored:], cache, arguments.generate)
    report = {
        "restore_seconds": restore_seconds,
        "first_token_seconds": restore_seconds + seconds,
        "restored_tokens": n_restored,
        "computed_tokens": n_computed,
        "generated": tokens,
    }
    if arguments.exact_file:
        found = predict(model, cache, token_ids, len(prompt))
        report |= loss(np.load(arguments.exact_file), found, token_ids[len(prompt) :])
        held = store.client.match(store.client.chain(prompt), floor=FidelityKind.CODED, before_put=True).blocks
        report["fidelities"] = sorted({block.fidelity.profile or "exact" for block in held})
    return report


if __name__ == "__main__":
    main()
