"""What engines do with a client, on a real daemon, from threads and from other processes."""

import hashlib
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from support import ROOT_DIR, DaemonProcess, chain, dense_tensors, put_all, same_tensors, tiny_spec, wait_until

from kvcached_client import ROOT, Block, CircuitBreaker, Client, Limits, Match
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec()
TOKENS = list(range(16))


# ---- the main road


def test_what_is_put_is_matched_and_comes_back(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, TOKENS)
        assert [r.outcome for r in client.put(blocks)] == [pb.OUTCOME_STORED] * 4
        match = client.match(client.chain([*TOKENS, *range(90, 99)]))
        assert match.n_tokens == 16
        assert match.hashes == tuple(b.block_hash for b in blocks)
        for block, again in zip(blocks, client.get(match.hashes), strict=True):
            assert again is not None
            assert same_tensors(dict(block.tensors), dict(again.tensors))
            assert (again.parent_hash, again.index, again.first_position) == (
                block.parent_hash,
                block.index,
                block.first_position,
            )


def test_get_yields_one_item_for_each_hash_and_none_for_a_miss(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        first, second, *_ = blocks = chain(client, TOKENS)
        client.put(blocks[:2])
        asked = [b"\1" * 32, second.block_hash, first.block_hash, b"\2" * 32, second.block_hash]
        found = [block and block.block_hash for block in client.get(asked)]
        assert found == [None, second.block_hash, first.block_hash, None, second.block_hash]


def test_what_is_put_big_endian_comes_back_equal(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        (block,) = chain(client, TOKENS[:4])
        swapped = {name: array.astype(">f2") for name, array in block.tensors.items()}
        swapped["opaque"] = np.arange(7, dtype=">f4")
        put_all(client, [Block(block.block_hash, ROOT, 0, block.token_ids, swapped, 0)])
        (again,) = client.get([block.block_hash])
        assert again is not None
        assert again.tensors.keys() == swapped.keys()
        assert all(np.array_equal(again.tensors[name], array) for name, array in swapped.items())


def test_nothing_asked_is_nothing_answered(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        assert client.match([]) == Match()
        assert list(client.get([])) == []
        assert client.put([]) == []


def test_a_consumer_may_leave_get_early_and_come_back(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        hashes = [b.block_hash for b in put_all(client, chain(client, TOKENS, ballast=1 << 20))]
        for _ in range(5):
            items = client.get(hashes)
            assert next(items) is not None
            items.close()  # type: ignore[attr-defined]
        assert all(client.get(hashes))
    assert wait_until(lambda: daemon.status().pool.get_bytes == 0)


def test_more_bytes_than_may_be_in_flight_are_put_nevertheless(daemon: DaemonProcess) -> None:
    limits = Limits(in_flight_bytes=1 << 20)
    with Client(SPEC, target=daemon.target, limits=limits) as client:
        blocks = chain(client, range(40), ballast=600_000)
        put_all(client, blocks)
        for block, again in zip(blocks, client.get([b.block_hash for b in blocks]), strict=True):
            assert again is not None
            assert same_tensors(dict(block.tensors), dict(again.tensors))


def test_no_more_than_the_window_is_sent_ahead_of_results(daemon: DaemonProcess) -> None:
    """Under a daemon that refuses what exceeds its queue, an unbounded sender would lose blocks."""
    size = 900_000
    limits = Limits(in_flight_bytes=2 * size + 2000)
    daemon.restart("--queue-bytes", "2MiB")
    with Client(SPEC, target=daemon.target, limits=limits) as client:
        put_all(client, chain(client, range(80), ballast=size))


@pytest.mark.parametrize(
    ("request_id", "logged"),
    [("x" * (5 << 20), "x" * 64), ("füñf\n7", "f??f?7"), ("\ud800", "?"), ("nice-1", "nice-1")],
    ids=["larger than a message", "not ASCII", "half a character", "as it should be"],
)
def test_no_request_id_breaks_a_call(daemon: DaemonProcess, request_id: str, logged: str) -> None:
    with daemon.client(SPEC) as client:
        blocks = chain(client, TOKENS)
        assert {result.code for result in client.put(blocks, request_id=request_id)} == {"OK"}
        assert client.match(client.chain(TOKENS), request_id=request_id).n_tokens == 16
        assert all(client.get(client.chain(TOKENS), request_id=request_id))
    for call in ("put", "match", "get"):  # which ends after the client has what it wanted
        assert wait_until(lambda call=call: is_logged(daemon, call, logged)), call  # type: ignore[misc]


def is_logged(daemon: DaemonProcess, call: str, request_id: str) -> bool:
    lines = daemon.log.read_text().splitlines()
    return any(f"] {call} " in line and f"request_id={request_id}" in line.split() for line in lines)


def test_eight_threads_share_a_client(daemon: DaemonProcess) -> None:
    problems: list[str] = []

    def work(client: Client, seed: int) -> None:
        for n in range(5):
            blocks = chain(client, [seed, n, *range(14)], seed=100 * seed + n)
            if any(r.code != "OK" for r in client.put(blocks)):
                problems.append(f"put {seed} {n}")
            hashes = client.match([b.block_hash for b in blocks]).hashes
            again = list(client.get(hashes))
            if len(again) != 4 or not all(
                a and same_tensors(dict(a.tensors), dict(b.tensors)) for a, b in zip(again, blocks, strict=True)
            ):
                problems.append(f"get {seed} {n}")

    with daemon.client(SPEC) as client:
        threads = [threading.Thread(target=work, args=(client, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert daemon.status().store.n_blocks == 8 * 5 * 4


def test_a_model_that_cannot_be_registered_is_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="block_size must be 1 to 65536, got 0"):
        Client(tiny_spec(block_size=0))


def test_a_block_that_cannot_be_sent_is_the_callers_fault_too(daemon: DaemonProcess) -> None:
    """And not the daemon's: the circuit breaker stays closed."""
    with Client(SPEC, target=daemon.target, breaker=CircuitBreaker(n_failures=1)) as client:
        (block,) = chain(client, TOKENS[:4])
        bad = {name: array.astype("complex64") for name, array in block.tensors.items()}
        with pytest.raises(ValueError, match="tensor 'keys' has dtype complex64"):
            client.put([Block(block.block_hash, ROOT, 0, block.token_ids, bad, 0)])
        put_all(client, [block])


# ---- other processes

NUMPY_ONLY = """
import hashlib, json, sys
import numpy as np
from kvcached_client import Client, ModelSpec, LayerSpec, RopeSpec, Fingerprint

target, tokens = sys.argv[1], json.loads(sys.argv[2])
layer = LayerSpec(n_query_heads=4, n_kv_heads=2, key_dim=8, value_dim=8, rope=RopeSpec(dims=8, theta=1e4))
client = Client(ModelSpec(Fingerprint(weights="w0"), "float16", 4, (layer, layer), name="a stranger"), target=target)
match = client.match(client.chain(tokens))
digests = [
    {name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() for name, array in block.tensors.items()}
    for block in client.get(match.hashes)
]
print(json.dumps({"n_tokens": match.n_tokens, "digests": digests}))
"""


def digests_of(blocks: list[Block]) -> list[dict[str, str]]:
    return [{n: hashlib.sha256(a.tobytes()).hexdigest() for n, a in block.tensors.items()} for block in blocks]


def test_a_process_with_bare_numpy_shares_the_prefix_that_another_one_put(daemon: DaemonProcess) -> None:
    with daemon.client(SPEC) as client:
        blocks = put_all(client, chain(client, TOKENS))
        prompt = [*TOKENS[:12], 99, 98, 97, 96]
        command = [sys.executable, "-W", "error", "-c", NUMPY_ONLY, daemon.target, json.dumps(prompt)]
        strangers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        while any(stranger.poll() is None for stranger in strangers):  # this process goes on meanwhile
            assert client.match(client.chain(TOKENS)).n_tokens == 16
        for stranger in strangers:
            output, _ = stranger.communicate(timeout=60)
            assert stranger.returncode == 0
            assert json.loads(output) == {"n_tokens": 12, "digests": digests_of(blocks[:3])}


IMPORTS = """
import sys
import google.protobuf, grpc, ml_dtypes, numpy
before = set(sys.modules)
import kvcached_client.client
heavy = {"lmdb", "scipy", "zstandard", "kvcached", "kvcached_mlx", "mlx", "pydantic", "structlog", "rich", "torch"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
added = {name for name in set(sys.modules) - before if getattr(sys.modules[name], "__file__", None)}
print(*sorted({name.partition(".")[0] for name in added if "site-packages" in sys.modules[name].__file__}))
"""


def test_the_client_imports_nothing_but_its_four_dependencies() -> None:
    command = [sys.executable, "-I", "-W", "error", "-c", IMPORTS]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) <= {"grpc", "google", "numpy", "ml_dtypes"}


def test_the_package_itself_imports_nothing() -> None:
    script = "import sys, kvcached_client; assert not {'grpc', 'numpy', 'google'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-I", "-c", script], check=True, timeout=60, cwd=ROOT_DIR)


def test_blocks_of_a_model_with_bfloat16_are_bfloat16_again(daemon: DaemonProcess) -> None:
    spec = tiny_spec(kv_dtype="bfloat16")
    with daemon.client(spec) as client:
        block = Block(client.chain([1, 2, 3, 4])[0], ROOT, 0, [1, 2, 3, 4], dense_tensors(spec, 7), first_position=0)
        put_all(client, [block])
        (again,) = client.get([block.block_hash])
        assert again is not None
        assert again.tensors["keys"].dtype.name == "bfloat16"
        assert same_tensors(dict(again.tensors), dict(block.tensors))
