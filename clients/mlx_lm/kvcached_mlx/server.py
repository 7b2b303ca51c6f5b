"""mlx_lm.server with kvcached behind its prompt cache: the same flags, and those below.

    python -m kvcached_mlx.server --model PATH [--namespace NAME] [--offload-turns] ...

Prompt caches are offloaded when mlx-lm evicts them and at shutdown (SIGTERM, Ctrl-C), and fetched when the daemon holds
a longer prefix than mlx-lm does, by enough to pay. mlx-lm's classes are replaced by ours where its main() and run()
look them up; nothing else of it is touched. A daemon that is absent, hung, full or killed costs speed only.
"""

import argparse
import functools
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm import server

from kvcached_client import Client, Connection, FidelityKind, Fingerprint, Limits
from kvcached_client.paths import check_target
from kvcached_client.protocol import check_am_ratio

from .breakeven import BreakEven, measure
from .calibrate import DEFAULT_TOKENS, Plan, calibrate_engine
from .fingerprint import fingerprint, fresh_cache, model_directory, model_spec
from .policy import Policy
from .prompt_cache import OffloadingPromptCache
from .road import Engine, bundle_of
from .store import PromptStore

log = logging.getLogger("kvcached_mlx.server")

# A local daemon answers in milliseconds; nobody who generates waits longer than this for one that hangs.
_LIMITS = Limits(match_seconds=1.0)
_PROBE_LIMITS = Limits(match_seconds=1.0, get_seconds=5.0, put_seconds=5.0)
_PROBE_NAMESPACE = "kvcached/probe"
_LAST_SECONDS = 30.0  # for what is still to be sent when the server stops


class Stores:
    """The PromptStore of each model that this server has loaded, by what the model was and not by where it lies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._current: dict[Any, PromptStore] = {}  # by mlx-lm's model key
        self._all: dict[bytes, PromptStore] = {}  # by model id

    def of(self, model_key: Any) -> PromptStore | None:
        """None for a model whose cache is not offloaded."""
        return self._current.get(model_key)

    def loaded(self, provider: Any, files_before: Fingerprint | None) -> None:
        """Makes ready for the model that a provider has just loaded; says in the log how, or why not."""
        key = provider.model_key
        self._current.pop(key, None)
        try:
            if reason := _unsupported(provider):
                log.warning("prompt caches are not offloaded: %s", reason)
            else:
                self._current[key] = self._open(provider, files_before)
        except Exception as error:  # noqa: BLE001 - whatever a model is, it can be served without us
            log.warning("prompt caches are not offloaded: %r", error)

    def close(self) -> None:
        for store in self._all.values():
            store.close(_LAST_SECONDS)
            log.info("kvcached, since the start: %s", store.counts)

    def _open(self, provider: Any, files_before: Fingerprint | None) -> PromptStore:
        path, adapter, _ = provider.model_key
        flags = provider.cli_args
        kv_bits, kv_group_size = getattr(flags, "kv_bits", None), getattr(flags, "kv_group_size", 64)
        spec = model_spec(
            provider.model, model_directory(path), adapter_path=adapter, kv_bits=kv_bits, kv_group_size=kv_group_size
        )
        if files_before not in (None, spec.fingerprint):
            raise RuntimeError("the files of the model changed while it was loaded")
        if spec.model_id in self._all:
            return self._all[spec.model_id]
        make_cache = functools.partial(_fresh_cache, provider, kv_bits, kv_group_size)
        if self._options.calibrate:
            self._calibrate(Engine(provider.model, provider.tokenizer, spec, make_cache))
        store = PromptStore(
            provider.model,
            self._client(spec, self._options.namespace, _LIMITS),
            make_cache=make_cache,
            policy=self._policy(flags.quantized_kv_start if kv_bits else 0),
            break_even=self._break_even(provider.model, spec, make_cache),
            queue_bytes=self._options.offload_queue_bytes,
            name=f"mlx_lm.server {mlx_lm.__version__}",
        )
        log.info("kvcached, model %s: %s", spec.model_id.hex()[:12], store.break_even)
        store.announce()
        self._all[spec.model_id] = store
        return store

    def _calibrate(self, engine: Engine) -> None:
        """Unless the model has a bundle that was measured; whatever goes wrong, it is served, and kept exactly."""
        try:
            with Connection(self._options.target) as connection:
                bundle = bundle_of(connection, engine.spec.model_id)
            if bundle is None:
                plan = Plan(self._options.calibrate_tokens)
                log.info("calibrating on %d tokens, before serving", plan.n_tokens)
                paths = self._options.calibrate_text
                bundle = calibrate_engine(
                    engine, plan, target=self._options.target, paths=paths, progress=ProgressInLog()
                )
            for profile in filter(lambda profile: profile.HasField("measured"), bundle.profiles):
                log.info("bundle %s, %s: %s", bundle.bundle_id.hex()[:12], profile.name, _figures(profile.measured))
        except Exception as error:  # noqa: BLE001 - whatever a model is, it can be served without us
            log.warning("not calibrated, prompt caches are kept exactly: %s", error)

    def _policy(self, min_tokens: int) -> Policy:
        """min_tokens: mlx-lm keeps shorter caches in full precision."""
        options = self._options
        floor = FidelityKind[options.floor.upper()]
        return Policy(
            floor=floor,
            recompute=options.recompute,
            store_as=options.fidelity or "",
            am_ratio=options.am_ratio,
            min_tokens=min_tokens,
        )

    def _break_even(self, model: Any, spec: Any, make_cache: Any) -> BreakEven:
        with self._client(spec, _PROBE_NAMESPACE, _PROBE_LIMITS) as probe:
            return measure(model, make_cache, probe)

    def _client(self, spec: Any, namespace: str, limits: Limits) -> Client:
        return Client(spec, namespace=namespace, target=self._options.target, limits=limits)


class ProgressInLog:
    """Progress as lines in the log, one for each tenth of each step."""

    def __init__(self) -> None:
        self._told: tuple[str, int] = ("", 0)

    def __call__(self, what: str, done: int, total: int) -> None:
        if (now := (what, 10 * done // max(total, 1))) != self._told:
            self._told = now
            log.info("calibration, %s: %d of %d", what, done, total)


def _figures(measured: Any) -> str:
    """What was measured, in a line."""
    return (
        f"{measured.compression:.1f}x smaller, KL {measured.kl:.2g} nats a token, perplexity "
        f"{measured.perplexity_delta:+.2f} % ({measured.perplexity_delta_low:+.2f} to "
        f"{measured.perplexity_delta_high:+.2f})"
    )


def _fresh_cache(provider: Any, kv_bits: int | None, kv_group_size: int) -> list[Any]:
    """Of the model that is loaded now: a closure over the model itself would keep it in memory for ever."""
    return fresh_cache(provider.model, kv_bits, kv_group_size)


def _unsupported(provider: Any) -> str:
    """Why the cache of a loaded model cannot be offloaded; empty if it can."""
    if provider.draft_model is not None:
        return "with a draft model, a prompt has two caches"
    return "the model is distributed over several processes" if provider.is_distributed else ""


def install(options: argparse.Namespace) -> Stores:
    """Puts our classes in the place of mlx_lm.server's."""
    stores = Stores(options)

    class Provider(server.ModelProvider):  # type: ignore[misc] # mlx_lm is untyped
        def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
            local = Path(model_path).is_dir() and any(Path(model_path).glob("*.safetensors"))
            before = fingerprint(Path(model_path), adapter_path) if local else None
            super()._load(model_path, adapter_path, draft_model_path)
            stores.loaded(self, before)
            store = stores.of(self.model_key)
            if store is not None and store.policy.accepts_compacted:  # such a cache is of one sequence
                self.is_batchable = False
                log.info("requests are served one after another: prefixes may be restored compacted")

    class Generator(server.ResponseGenerator):  # type: ignore[misc] # mlx_lm is untyped
        def _generate(self) -> None:
            cache = self.prompt_cache
            try:
                super()._generate()
            finally:  # on this thread, for mlx arrays may be touched nowhere else
                cache.offload_all(time.monotonic() + _LAST_SECONDS)
                mx.clear_streams()  # or mlx may work on while Python ends, and abort (0.32.4 does, without us too)

    server.ModelProvider, server.ResponseGenerator = Provider, Generator
    server.LRUPromptCache = functools.partial(OffloadingPromptCache, stores.of, each_turn=options.offload_turns)
    return stores


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and all the others, which are mlx-lm's."""
    parser = argparse.ArgumentParser(
        prog="python -m kvcached_mlx.server", usage="%(prog)s [kvcached's flags] [mlx_lm.server's flags]",
        add_help=False, allow_abbrev=False,
    )  # fmt: skip
    group = parser.add_argument_group("kvcached")
    group.add_argument(
        "--target", type=_target, help="where the daemon listens: unix:PATH or HOST:PORT (default: its own default)"
    )
    group.add_argument(
        "--namespace", default="", help="blocks are shared within a namespace only (default: the empty one)"
    )
    group.add_argument(
        "--offload-turns",
        action="store_true",
        help="offload after each answer too, so that other servers share it and a kill -9 loses nothing",
    )
    group.add_argument(
        "--offload-queue-bytes",
        type=_positive,
        default=1 << 30,
        metavar="N",
        help="memory for what waits to be sent; when it is full, the oldest is dropped (default: 1 GiB)",
    )
    _add_fidelity_flags(group)
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        print("\nand all flags of mlx_lm.server:\n")
    options, others = parser.parse_known_args(arguments)
    if options.am_ratio and not (options.fidelity or "").startswith("compacted"):
        parser.error("--am-ratio is of a compacted --fidelity")
    return options, others


def _add_fidelity_flags(group: Any) -> None:
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="before serving a model that has no measured bundle, make one: minutes; what fails is logged only",
    )
    group.add_argument(
        "--calibrate-text", nargs="+", type=Path, default=(), metavar="FILE",
        help="text for that, UTF-8 (default: a small corpus of code, prose and markup)",
    )  # fmt: skip
    group.add_argument(
        "--calibrate-tokens", type=_positive, default=DEFAULT_TOKENS, metavar="N",
        help=f"tokens of it to fit on (default: {DEFAULT_TOKENS})",
    )  # fmt: skip
    group.add_argument(
        "--fidelity",
        choices=["exact", "near-lossless", "x8", "x16", "x32", "compacted-x8", "compacted-x16"],
        help="how blocks are stored (default: as the daemon's settings say: x8 once a model is calibrated); "
        "compacted ones only with --floor compacted",
    )
    group.add_argument(
        "--am-ratio", type=_am_ratio, default=0.0, metavar="R",
        help="of a compacted fidelity, tokens before over tokens after, 1 to 8 (default: as the daemon's settings say)",
    )  # fmt: skip
    group.add_argument(
        "--floor", choices=["exact", "coded", "compacted"], default="coded",
        help="the lowest fidelity that is restored (default: coded); with compacted, requests are served in sequence",
    )  # fmt: skip
    group.add_argument(
        "--recompute", type=_not_negative, default=Policy().recompute, metavar="N",
        help="tokens at the end of a prompt to compute anew where its prefix is not exact (default: 128)",
    )  # fmt: skip


def _target(text: str) -> str:
    try:
        return check_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _am_ratio(text: str) -> float:
    try:
        return check_am_ratio(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    options, others = parse(sys.argv[1:] if arguments is None else arguments)
    sys.argv = ["mlx_lm.server", *others]
    stores = install(options)
    # Service managers stop with SIGTERM, mlx-lm listens for Ctrl-C only: what it holds is offloaded in both cases.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.main()
    finally:
        stores.close()


if __name__ == "__main__":
    main()
