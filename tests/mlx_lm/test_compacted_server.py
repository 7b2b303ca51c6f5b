"""Our server on a daemon that compacts: the answers of the sequential reference, alone and beside others."""

import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from bundles import install
from compacting_engines import held
from mlx_lm import load, stream_generate
from mlx_models import prefill
from mlx_servers import ServerProcess, text
from ours import calibration
from reference_model import ReferenceModel
from support import REFERENCE_MODEL, DaemonProcess, wait_until

from kvcached.codec.bundle import Bundle
from kvcached_client import FidelityKind
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx import Policy, PromptStore, fresh_cache, model_spec
from kvcached_mlx.compacted import CompactedKVCache

pytestmark = pytest.mark.slow  # every test starts servers that load a model

CODED, COMPACTED = FidelityKind.CODED, FidelityKind.COMPACTED
BLOCK, N_RESTORED, MAX_TOKENS = 256, 1536, 16
PROMPTS = [text("timeit.rst.txt", 4750), text("cmd.rst.txt", 5050)]  # 1690 tokens each
FRESH = text("wal-configuration.html", 700)  # less than a block: nothing of it is ever restored
FLAGS = ("--floor", "compacted", "--fidelity", "compacted-x8")
ACTIVE_BYTES = re.compile(r"restored cache: (\d+) tokens in (\d+) active bytes")
Serving = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """The model and its tokenizer, in this process."""
    model, tokenizer, *_ = load(str(REFERENCE_MODEL))
    return model, tokenizer


@pytest.fixture(scope="module")
def bundle(reference: tuple[Any, Any]) -> Bundle:
    """A small calibration of the reference model, a real one, with as little text as will do; its loss is made up."""
    fitted = calibration(ReferenceModel(), layers_per_group=6, n_windows=4, n_tokens=1024).fit({"x8": 8.0})
    spec = model_spec(reference[0], REFERENCE_MODEL)
    return replace(fitted, spec=spec).with_measured({"x8": pb.Measured(kl=0.01, engine="test")})


@pytest.fixture
def serving(run_dir: Path, daemon: DaemonProcess) -> Iterator[Serving]:
    """Starts servers of ours on one daemon; whatever becomes of a test, none of them is left behind."""
    started: list[ServerProcess] = []

    def start(name: str, *flags: str) -> ServerProcess:
        directory = run_dir / name
        directory.mkdir(parents=True)
        started.append(ServerProcess(directory, "offloading", "--target", daemon.target, *flags))
        return started[-1].start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def stored(serving: Serving, daemon: DaemonProcess, reference: tuple[Any, Any], bundle: Bundle) -> None:
    """Two conversations, which the daemon has compacted."""
    with daemon.client(bundle.spec) as client:
        client.match([])  # registers
    install(daemon, bundle)
    server = serving("first", "--offload-turns", *FLAGS)
    for prompt in PROMPTS:
        server.complete(prompt, max_tokens=1)
    assert wait_until(lambda: daemon.status().store.n_blocks == 2 * N_RESTORED // BLOCK)
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()
    with opened(daemon, reference) as store:
        for prompt in PROMPTS:
            blocks = held(store, reference[1].encode(prompt))
            assert [(block.fidelity.kind, block.fidelity.am_ratio) for block in blocks] == [(COMPACTED, 4.0)] * 6


@contextmanager
def opened(
    daemon: DaemonProcess, reference: tuple[Any, Any], floor: FidelityKind = COMPACTED
) -> Generator[PromptStore, None, None]:
    """A store in this process, as another engine would have it."""
    store = PromptStore(
        reference[0], daemon.client(model_spec(reference[0], REFERENCE_MODEL)), policy=Policy(floor=floor)
    )
    yield store
    store.close()


def active_bytes(server: ServerProcess) -> list[tuple[int, int]]:
    """Tokens of the caches that were restored, and what these took in memory then."""
    found = ACTIVE_BYTES.findall(server.log.read_text())
    return [(int(n_tokens), int(n_bytes)) for n_tokens, n_bytes in found]


def plain_bytes(reference: tuple[Any, Any], prompt: str) -> int:
    """What the cache of as many tokens takes that was computed."""
    model, tokenizer = reference
    cache = fresh_cache(model)
    prefill(model, cache, tokenizer.encode(prompt)[:N_RESTORED], chunk=BLOCK)
    return sum(entry.nbytes for entry in cache)


def sequential_reference(daemon: DaemonProcess, reference: tuple[Any, Any], prompts: Sequence[str]) -> list[str]:
    """What the model says one by one and without a server, on compacted prefixes where there are such."""
    model, tokenizer = reference
    answers = []
    with opened(daemon, reference) as store:
        for prompt in prompts:
            token_ids = tokenizer.encode(prompt)
            cache, n_restored = store.restore(token_ids)
            if prompt in PROMPTS:
                assert n_restored == N_RESTORED
                assert {type(entry) for entry in cache} == {CompactedKVCache}
            rest: dict[str, Any] = {"prompt": mx.array(token_ids[n_restored:]), "prompt_cache": cache}
            pieces = stream_generate(model, tokenizer, **rest, max_tokens=MAX_TOKENS, prefill_step_size=BLOCK)
            answers.append("".join(piece.text for piece in pieces))
    return answers


def at_once(server: ServerProcess, prompts: Sequence[str]) -> list[str]:
    answers = [""] * len(prompts)

    def ask(i: int) -> None:
        answers[i] = server.complete(prompts[i], max_tokens=MAX_TOKENS)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.usefixtures("stored")
def test_conversations_go_on_from_compacted_prefixes_alone_and_beside_others(
    serving: Serving, daemon: DaemonProcess, reference: tuple[Any, Any]
) -> None:
    prompts = [PROMPTS[0], FRESH, PROMPTS[1]]
    expected = sequential_reference(daemon, reference, prompts)
    assert len(set(expected)) == 3
    alone = serving("alone", *FLAGS)
    assert [alone.complete(prompt, max_tokens=MAX_TOKENS) for prompt in prompts] == expected
    beside = serving("beside", *FLAGS)
    assert at_once(beside, prompts) == expected  # compacted ones beside each other, and beside a plain one
    n_plain = plain_bytes(reference, PROMPTS[0])
    for server in (alone, beside):
        assert server.computed() < 2 * (BLOCK + 128) + BLOCK
        restored = active_bytes(server)
        assert [n_tokens for n_tokens, _ in restored] == [N_RESTORED] * 2
        assert min(n_plain / n_bytes for _, n_bytes in restored) >= 3.5
        assert server.stop() == 0
        assert "requests are served one after another" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.usefixtures("stored")
def test_a_conversation_goes_on_for_turns_and_what_it_adds_is_stored_as_what_it_is(
    serving: Serving, daemon: DaemonProcess, reference: tuple[Any, Any]
) -> None:
    server = serving("turns", *FLAGS, "--offload-turns")
    first = server.complete(PROMPTS[0], max_tokens=MAX_TOKENS)
    server.computed()
    longer = PROMPTS[0] + first + " And then: " + "more words, " * 60
    second = server.complete(longer, max_tokens=MAX_TOKENS)
    assert server.computed() < 2 * BLOCK  # the second turn goes on from the first one's cache
    assert server.complete(PROMPTS[0], max_tokens=MAX_TOKENS) == first  # which cannot be cut: restored again
    assert wait_until(lambda: daemon.status().store.n_blocks == 2 * N_RESTORED // BLOCK + 1)
    server.stop()
    assert "Traceback" not in server.log.read_text()
    # All that is held is compacted, or was computed on that: for those who accept such.
    plain = serving("plain", "--offload-turns")
    plain.complete(longer, max_tokens=MAX_TOKENS)
    again = serving("again", *FLAGS)
    again.complete(longer + second, max_tokens=MAX_TOKENS)
    restored = [[n_tokens for n_tokens, _ in active_bytes(server)] for server in (plain, again)]
    assert restored == [[], [N_RESTORED + BLOCK]]
    assert "requests are served one after another" not in plain.log.read_text()
    # What the plain one computed is better than that, and replaces it.
    tokens = reference[1].encode(longer)
    with opened(daemon, reference, floor=CODED) as store:
        assert wait_until(lambda: {block.fidelity.kind for block in held(store, tokens)} == {CODED})
        assert store.restore([*tokens, 1])[1] >= N_RESTORED
