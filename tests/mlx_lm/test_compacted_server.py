"""Our server where prefixes come back compacted: the answers of the sequential reference, alone and beside another."""

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from compacted_blocks import Compacting
from mlx_lm import load, stream_generate
from mlx_servers import ServerProcess, text
from support import REFERENCE_MODEL, DaemonProcess, wait_until

from kvcached_client import FidelityKind
from kvcached_mlx import Policy, PromptStore, model_spec
from kvcached_mlx.compacted import CompactedKVCache

pytestmark = pytest.mark.slow  # every test starts servers that load a model

BLOCK, N_RESTORED, MAX_TOKENS = 256, 1536, 16
PROMPTS = [text("timeit.rst.txt", 4750), text("cmd.rst.txt", 5050)]  # 1690 tokens each
COMPACTED = ("--floor", "compacted")
ACTIVE_BYTES = re.compile(r"a cache of (\d+) tokens in (\d+) bytes")
Serving = Callable[..., ServerProcess]


@pytest.fixture
def serving(run_dir: Path, daemon: DaemonProcess) -> Iterator[Serving]:
    """Starts servers of ours on one daemon; whatever becomes of a test, none of them is left behind."""
    started: list[ServerProcess] = []

    def start(name: str, *flags: str) -> ServerProcess:
        directory = run_dir / name
        directory.mkdir(parents=True)
        started.append(ServerProcess(directory, "compacting", "--target", daemon.target, *flags))
        return started[-1].start()

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def stored(serving: Serving, daemon: DaemonProcess) -> None:
    """Two conversations, exactly, with the daemon."""
    server = serving("first", "--offload-turns")
    for prompt in PROMPTS:
        server.complete(prompt, max_tokens=1)
    assert wait_until(lambda: daemon.status().store.n_blocks == 2 * N_RESTORED // BLOCK)
    server.stop()


def active_bytes(server: ServerProcess) -> list[tuple[int, int]]:
    """Tokens and bytes of the caches that were restored."""
    found = ACTIVE_BYTES.findall(server.log.read_text())
    return [(int(n_tokens), int(n_bytes)) for n_tokens, n_bytes in found]


def sequential_reference(daemon: DaemonProcess) -> list[str]:
    """What the model says after compacted prefixes, one by one and without a server."""
    model, tokenizer = load(str(REFERENCE_MODEL))
    client = Compacting(model_spec(model, REFERENCE_MODEL), target=daemon.target)
    store = PromptStore(model, client, policy=Policy(floor=FidelityKind.COMPACTED))
    answers = []
    for prompt in PROMPTS:
        token_ids = tokenizer.encode(prompt)
        cache, n_restored = store.restore(token_ids)
        assert n_restored == N_RESTORED
        assert {type(entry) for entry in cache} == {CompactedKVCache}
        rest: dict[str, Any] = {"prompt": mx.array(token_ids[n_restored:]), "prompt_cache": cache}
        pieces = stream_generate(model, tokenizer, **rest, max_tokens=MAX_TOKENS, prefill_step_size=BLOCK)
        answers.append("".join(piece.text for piece in pieces))
    store.close()
    return answers


def at_once(server: ServerProcess) -> list[str]:
    answers = [""] * len(PROMPTS)

    def ask(i: int) -> None:
        answers[i] = server.complete(PROMPTS[i], max_tokens=MAX_TOKENS)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.usefixtures("stored")
def test_conversations_go_on_from_compacted_prefixes_alone_and_beside_each_other(
    serving: Serving, daemon: DaemonProcess
) -> None:
    expected = sequential_reference(daemon)
    assert expected[0] != expected[1]
    alone = serving("alone", *COMPACTED)
    assert [alone.complete(prompt, max_tokens=MAX_TOKENS) for prompt in PROMPTS] == expected
    assert alone.computed() < 2 * (BLOCK + 128)
    beside = serving("beside", *COMPACTED)
    assert at_once(beside) == expected
    assert beside.computed() < 2 * (BLOCK + 128)
    dense = 6 * 2 * 64 * 2 * 2  # bytes of a token: layers, heads, key and value in half precision
    for server in (alone, beside):
        restored = active_bytes(server)
        assert [n_tokens for n_tokens, _ in restored] == [N_RESTORED] * 2
        assert all(n_bytes / n_tokens <= dense / 3.5 for n_tokens, n_bytes in restored)
        assert server.stop() == 0
        assert "requests are served one after another" in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


@pytest.mark.usefixtures("stored")
def test_a_conversation_goes_on_for_turns_and_what_it_adds_is_stored_as_what_it_is(
    serving: Serving, daemon: DaemonProcess
) -> None:
    server = serving("turns", *COMPACTED, "--offload-turns")
    first = server.complete(PROMPTS[0], max_tokens=MAX_TOKENS)
    server.computed()
    longer = PROMPTS[0] + first + " And then: " + "more words, " * 60
    second = server.complete(longer, max_tokens=MAX_TOKENS)
    assert server.computed() < 2 * BLOCK  # the second turn goes on from the first one's cache
    assert server.complete(PROMPTS[0], max_tokens=MAX_TOKENS) == first  # which cannot be cut: restored again
    assert wait_until(lambda: daemon.status().store.n_blocks == 2 * N_RESTORED // BLOCK + 1)
    server.stop()
    assert "Traceback" not in server.log.read_text()
    # The block that was computed on a compacted prefix is for those who accept such.
    plain = serving("plain")
    plain.complete(longer, max_tokens=MAX_TOKENS)
    again = serving("again", *COMPACTED)
    again.complete(longer + second, max_tokens=MAX_TOKENS)
    restored = [[n_tokens for n_tokens, _ in active_bytes(server)] for server in (plain, again)]
    assert restored == [[N_RESTORED], [N_RESTORED + BLOCK]]
    assert "requests are served one after another" not in plain.log.read_text()
