"""What is compacted with which queries, and what is done with blocks that cannot be compacted."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from bundles import install, low_rank_chain, make_bundle
from compacting import SIZE, counter, fresh, fresh_spec, get, here, make_compacting, put, put_fresh, stored_as
from support import DaemonProcess, same_tensors

from kvcached.codec.bundle import PROFILES, Bundle
from kvcached_client import Client, FidelityKind

CODED = FidelityKind.CODED


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client of a model of its own, known to the daemon."""
    with shared_daemon.client(fresh_spec()) as client:
        client.match([])
        yield client


@pytest.fixture
def bundle(client: Client, shared_daemon: DaemonProcess) -> Bundle:
    """The client's model was calibrated, compaction included."""
    bundle = make_compacting(client.spec)
    install(shared_daemon, bundle)
    return bundle


# ---- what cannot be compacted


def fallen(daemon: DaemonProcess, reason: str) -> float:
    return counter(daemon, "coded_fallback_blocks", reason=reason)


def told(daemon: DaemonProcess) -> int:
    return daemon.log.read_text().count("block that was to be compacted is coded")


def test_what_would_lose_more_than_the_profile_allows_is_coded_counted_and_told_once(
    client: Client, shared_daemon: DaemonProcess
) -> None:
    install(shared_daemon, make_compacting(client.spec, bound=1e-9))
    before, lines = fallen(shared_daemon, "loss"), told(shared_daemon)
    for block in fresh(client, 3):
        result = put(client, block, store_as="compacted-x8")
        assert (stored_as(result), result.fidelity.am_ratio) == ("x8", 0)
        (found,) = get(client, block, floor=CODED, accepts_compacted=False)
        assert found
        assert found.fidelity.kind == CODED
        assert {k: v.shape for k, v in found.tensors.items()} == {k: v.shape for k, v in block.tensors.items()}
    assert fallen(shared_daemon, "loss") == before + 3
    assert told(shared_daemon) == lines + 1
    assert stored_as(put_fresh(client, store_as="compacted-x16")) == "x16"


@pytest.mark.parametrize(
    "how", ["no compaction", "not of this profile", "blocks too short"], ids=lambda how: how.replace(" ", "-")
)
def test_where_there_is_nothing_to_compact_with_blocks_are_coded_counted_and_told_once(
    shared_daemon: DaemonProcess, how: str
) -> None:
    spec = fresh_spec(block_size=16 if how == "blocks too short" else SIZE)
    bundles = {
        "no compaction": lambda: make_bundle(spec, measured=tuple(PROFILES)),
        "not of this profile": lambda: make_compacting(spec, profiles=["x16"]),
        "blocks too short": lambda: make_compacting(spec),
    }
    with shared_daemon.client(spec) as client:
        client.match([])
        install(shared_daemon, bundles[how]())
        before, lines = fallen(shared_daemon, "bundle"), told(shared_daemon)
        for _ in range(3):
            result = put_fresh(client, store_as="compacted-x8", am_ratio=8)
            assert stored_as(result) == "x8"
    assert fallen(shared_daemon, "bundle") == before + 3
    assert told(shared_daemon) == lines + 1


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30, 1e38])
def test_numbers_that_can_be_neither_compacted_nor_coded_are_kept_exactly_and_counted_twice(
    shared_daemon: DaemonProcess, number: float
) -> None:
    spec = fresh_spec(kv_dtype="float32")
    with shared_daemon.client(spec) as client:
        client.match([])
        install(shared_daemon, make_compacting(spec))
        good, bad, worse = fresh(client, 3)
        bad.tensors["values"][1, 1, 9, 3] = number
        worse.tensors["keys"][0, 1, 9, 3] = number
        before = [
            fallen(shared_daemon, "values"),
            counter(shared_daemon, "exact_fallback_blocks", reason="values"),
        ]
        results = [stored_as(put(client, block, store_as="compacted-x8")) for block in (good, bad, worse)]
        assert results == ["compacted-x8@4", "exact", "exact"]
        after = [
            fallen(shared_daemon, "values"),
            counter(shared_daemon, "exact_fallback_blocks", reason="values"),
        ]
        assert [a - b for a, b in zip(after, before, strict=True)] == [2, 2]
        for block in (bad, worse):
            (found,) = get(client, block)
            assert found
            assert same_tensors(dict(found.tensors), dict(block.tensors))


def test_blocks_of_another_size_than_the_bundles_are_compacted_by_the_same_ratio(shared_daemon: DaemonProcess) -> None:
    spec = fresh_spec(block_size=128)
    with shared_daemon.client(spec) as client:
        client.match([])
        install(shared_daemon, make_compacting(replace(spec, block_size=SIZE)))
        (block,) = fresh(client)
        assert stored_as(put(client, block, store_as="compacted-x8", am_ratio=2)) == "compacted-x8@2"
        (found,) = get(client, block)
    assert found
    assert found.tensors["lengths"].sum() == 4 * 128 / 2


# ---- queries


def asking(seed: int, n_queries: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 4, n_queries, 8)).astype(np.float16)


def sources(daemon: DaemonProcess) -> list[float]:
    return [counter(daemon, "compacted_blocks", queries=source) for source in ("engine", "bundle", "unusable")]


def test_the_queries_of_the_engine_say_what_is_kept_and_are_counted(
    client: Client, bundle: Bundle, shared_daemon: DaemonProcess
) -> None:
    before, found = sources(shared_daemon), []
    (block,) = fresh(client)
    for queries in (None, asking(1), asking(2)):
        beside = {} if queries is None else {"queries": queries}
        with Client(client.spec, namespace=f"{len(found)}", target=client._connection.target) as other:
            tokens = list(block.token_ids)
            (same,) = [replace(b, tensors={**block.tensors, **beside}) for b in low_rank_chain(other, tokens)]
            assert stored_as(put(other, same, store_as="compacted-x8")) == "compacted-x8@4"
            (back,) = get(other, same)
        assert back
        assert "queries" not in back.tensors
        expected = here(bundle, client, block, 4.0, None if queries is None else queries.astype(np.float32))
        assert same_tensors(dict(back.tensors), expected.to_tensors())
        found.append(back.tensors["bias"].tobytes())
    assert len(set(found)) == 3
    assert [a - b for a, b in zip(sources(shared_daemon), before, strict=True)] == [2, 1, 0]


def one_is(number: float) -> np.ndarray:
    queries = asking(1)
    queries[1, 2, 3, 4] = number
    return queries


UNUSABLE = {
    "NaN": one_is(np.nan),
    "infinite": one_is(-np.inf),
    "all equal": np.broadcast_to(asking(1, 1), (2, 4, 32, 8)),
    "all zero": np.zeros((2, 4, 32, 8), np.float16),
    "a single one": asking(1, 1),
}


@pytest.mark.parametrize("queries", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_instead_of_queries_that_say_nothing_those_of_the_bundle_are_used_and_that_is_counted(
    client: Client, bundle: Bundle, shared_daemon: DaemonProcess, queries: np.ndarray
) -> None:
    before = sources(shared_daemon)
    (block,) = fresh(client)
    sent = replace(block, tensors={**block.tensors, "queries": queries})
    assert stored_as(put(client, sent, store_as="compacted-x8")) == "compacted-x8@4"
    (found,) = get(client, block)
    assert found
    assert same_tensors(dict(found.tensors), here(bundle, client, block, 4.0).to_tensors())
    assert [a - b for a, b in zip(sources(shared_daemon), before, strict=True)] == [0, 0, 1]


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize("n_queries", [2, 3, 5, 256])
def test_few_queries_and_many_are_enough(client: Client, shared_daemon: DaemonProcess, n_queries: int) -> None:
    before = sources(shared_daemon)
    (block,) = fresh(client)
    sent = replace(block, tensors={**block.tensors, "queries": asking(3, n_queries)})
    assert stored_as(put(client, sent, store_as="compacted-x8", am_ratio=1.5)) == "compacted-x8@1.5"
    (found,) = get(client, block)
    assert found
    assert all(np.isfinite(found.tensors[name]).all() for name in ("keys", "values", "bias"))
    assert sources(shared_daemon)[0] == before[0] + 1


@pytest.mark.parametrize("scale", [1e10, 1e30, 3e38])
def test_huge_queries_never_make_numbers_that_are_none(shared_daemon: DaemonProcess, scale: float) -> None:
    spec = fresh_spec(kv_dtype="float32")
    with shared_daemon.client(spec) as client:
        client.match([])
        install(shared_daemon, make_compacting(spec))
        (block,) = fresh(client)
        queries = np.sign(asking(4).astype(np.float32)) * np.float32(scale)
        queries[..., ::2] *= np.float32(0.5)
        sent = replace(block, tensors={**block.tensors, "queries": queries})
        assert put(client, sent, store_as="compacted-x8").code == "OK"
        (found,) = get(client, block)
    assert found
    assert all(np.isfinite(tensor).all() for tensor in found.tensors.values())


@pytest.mark.usefixtures("bundle")
def test_a_block_at_the_last_positions_there_are_is_stored_and_comes_back(client: Client) -> None:
    (block,) = fresh(client)
    block = replace(block, first_position=2**31 - SIZE - 1)
    assert put(client, block, store_as="compacted-x8").code == "OK"
    (found,) = get(client, block)
    assert found
    assert all(np.isfinite(tensor).all() for tensor in found.tensors.values())
