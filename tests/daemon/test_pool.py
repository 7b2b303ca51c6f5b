"""The worker pool: one pipeline for each model, gets first, bytes bounded."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
from bundles import make_bundle
from compacting import make_compacting
from support import tiny_spec

from kvcached import pool as pool_module
from kvcached.block import Fidelity, FidelityKind, ModelSpec
from kvcached.codec.bundle import PROFILES, Bundle
from kvcached.errors import OverloadedError, ShuttingDownError, UnsupportedFrameError
from kvcached.pool import ByteBudget, Lane, Pipeline, Turns, WorkerPool, warm_kernels


@pytest.fixture
def pool() -> WorkerPool:
    return WorkerPool(n_workers=1, limit_bytes=100)


def test_32_threads_that_race_for_a_pipeline_get_the_same_one_built_once(pool: WorkerPool) -> None:
    built = []
    start = threading.Barrier(32)

    def build(spec: ModelSpec) -> Pipeline:
        built.append(spec)
        time.sleep(0.05)  # long enough for all others to arrive
        return Pipeline(spec)

    def ask(_: int) -> Pipeline:
        start.wait()
        return pool.pipeline(tiny_spec(), build)

    with ThreadPoolExecutor(32) as threads:
        pipelines = list(threads.map(ask, range(32)))
    assert len(built) == 1
    assert {id(pipeline) for pipeline in pipelines} == {id(pipelines[0])}
    pool.close()


def test_a_coder_is_built_once_and_gone_with_its_bundle(pool: WorkerPool) -> None:
    spec, asked = tiny_spec(block_size=16), []
    made = {bundle.bundle_id: bundle for bundle in (make_bundle(spec), make_bundle(spec, seed=1))}
    first, second = made

    def bundle_of(bundle_id: bytes) -> Bundle | None:
        asked.append(bundle_id)
        return made.get(bundle_id)

    pipeline = pool.pipeline(spec, lambda spec: Pipeline(spec, bundle_of))
    coders = {id(pipeline.coder(bundle_id, "x8")) for bundle_id in (first, second, first, second)}
    assert (len(coders), asked) == (2, [first, second])
    del made[first]
    pool.forget(first)
    with pytest.raises(UnsupportedFrameError, match=f"profile 'x8' of bundle {first.hex()} is needed"):
        pipeline.coder(first, "x8")
    assert id(pipeline.coder(second, "x8")) in coders
    with pytest.raises(UnsupportedFrameError, match="profile 'x64' of bundle"):
        pipeline.coder(second, "x64")
    pool.close()


def test_a_model_keeps_the_coders_that_were_used_last(pool: WorkerPool) -> None:
    bundle, asked = make_bundle(tiny_spec(block_size=16)), []
    pipeline = Pipeline(bundle.spec, lambda bundle_id: asked.append(bundle_id) or bundle)
    for profile in (*PROFILES, *PROFILES):
        pipeline.coder(bundle.bundle_id, profile)
    assert len(asked) == 4
    for bundle_id in (b"1", b"2", b"1", bundle.bundle_id):
        pipeline.coder(bundle_id, "x32")
    assert len(asked) == 6
    pool.close()


def test_a_compactor_is_kept_for_each_ratio_and_profile_and_gone_with_its_bundle(pool: WorkerPool) -> None:
    bundle, asked = make_compacting(tiny_spec(block_size=64)), []
    pipeline = pool.pipeline(bundle.spec, lambda spec: Pipeline(spec, lambda _: asked.append(1) or bundle))
    wanted = [Fidelity(FidelityKind.COMPACTED, p, r, bundle.bundle_id) for p in ("x8", "x16") for r in (2.0, 4.0)]
    made = {id(pipeline.compactor(fidelity)) for _ in range(2) for fidelity in wanted}
    assert (len(made), len(asked)) == (4, 4)
    assert [pipeline.compactor(fidelity).fidelity for fidelity in wanted] == wanted
    pipeline.coder(bundle.bundle_id, "x8")  # beside them
    pipeline.compactor(replace(wanted[0], am_ratio=3.0))
    pipeline.compactor(wanted[-1])
    assert len(asked) == 6
    pipeline.compactor(wanted[0])  # the one that was used least lately was let go
    assert len(asked) == 7
    pool.forget(bundle.bundle_id)
    pipeline.compactor(wanted[0])
    assert len(asked) == 8
    pool.close()


@pytest.mark.parametrize(
    ("block_size", "ratio", "profile", "message"),
    [
        (64, 4.0, "x32", "profile 'x32' of bundle"),
        (16, 8.0, "x8", "no block of 'tiny' is compacted so: "),
        (64, 9.0, "x8", "no block of 'tiny' is compacted so: "),
    ],
    ids=["profile", "blocks too short", "ratio beyond all"],
)
def test_a_compactor_that_a_bundle_does_not_make_is_not_supported(
    block_size: int, ratio: float, profile: str, message: str
) -> None:
    bundle = make_compacting(tiny_spec(block_size=64))
    pipeline = Pipeline(tiny_spec(block_size=block_size), lambda _: bundle)
    with pytest.raises(UnsupportedFrameError, match=message):
        pipeline.compactor(Fidelity(FidelityKind.COMPACTED, profile, ratio, bundle.bundle_id))


def test_kernels_are_warmed_once_however_many_ask_and_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, start = [], threading.Barrier(32)

    def warm() -> None:
        calls.append(1)
        time.sleep(0.05)  # long enough for all others to arrive
        if len(calls) == 1:
            raise MemoryError

    def ask(_: int) -> bool:
        start.wait()
        try:
            warm_kernels()
        except MemoryError:
            return False
        return True

    monkeypatch.setattr(pool_module, "_warm_once", cache(warm))
    with ThreadPoolExecutor(32) as threads:
        assert sorted(threads.map(ask, range(32))) == [False] + [True] * 31
    assert len(calls) == 2


def test_models_do_not_wait_for_one_another(pool: WorkerPool) -> None:
    others_done = threading.Event()

    def slow(spec: ModelSpec) -> Pipeline:
        assert others_done.wait(30)
        return Pipeline(spec)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.pipeline, tiny_spec(), slow)
        other = pool.pipeline(tiny_spec(weights="other"))
        others_done.set()
        assert waiting.result(30) is not other
    pool.close()


def test_a_build_that_fails_is_tried_again(pool: WorkerPool) -> None:
    def fail(_: ModelSpec) -> Pipeline:
        raise ValueError("no bundle")

    with pytest.raises(ValueError, match="no bundle"):
        pool.pipeline(tiny_spec(), fail)
    assert pool.pipeline(tiny_spec()).spec == tiny_spec()
    pool.close()


def held_job(pool: WorkerPool, lane: Lane) -> threading.Event:
    """Keeps a thread of the pool busy until this event is set."""
    started, gate = threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        assert gate.wait(30)

    pool.submit(lane, job)
    assert started.wait(30)
    return gate


def test_gets_go_before_puts_and_those_of_one_client_in_the_order_of_arrival(pool: WorkerPool) -> None:
    busy, reserve, order = held_job(pool, Lane.PUT), held_job(pool, Lane.GET), []
    jobs = [(Lane.PUT, "put 1"), (Lane.GET, "get 1"), (Lane.PUT, "put 2"), (Lane.GET, "get 2")]
    futures = [pool.submit(lane, order.append, name) for lane, name in jobs]
    assert pool.n_jobs == 4
    busy.set()
    for future in futures:
        future.result(30)
    assert order == ["get 1", "get 2", "put 1", "put 2"]
    reserve.set()
    pool.close()


def test_however_many_puts_are_under_way_gets_are_served(pool: WorkerPool) -> None:
    busy, order = held_job(pool, Lane.PUT), []
    waiting = pool.submit(Lane.PUT, order.append, "put")
    for name in ("get 1", "get 2"):
        pool.submit(Lane.GET, order.append, name).result(30)
    assert (order, pool.n_jobs, waiting.done()) == (["get 1", "get 2"], 1, False)
    busy.set()
    waiting.result(30)
    assert order == ["get 1", "get 2", "put"]
    pool.close()


@pytest.mark.parametrize("lane", list(Lane))
def test_a_client_with_a_thousand_jobs_delays_another_by_one(pool: WorkerPool, lane: Lane) -> None:
    busy, reserve, order = held_job(pool, Lane.PUT), held_job(pool, Lane.GET), []
    crowd = [pool.submit(lane, order.append, "crowd", client="crowd") for _ in range(1000)]
    others = [pool.submit(lane, order.append, name, client=name) for name in ("a", "b")]
    busy.set()
    for future in (*crowd, *others):
        future.result(30)
    assert order == ["crowd", "a", "b", *["crowd"] * 999]
    reserve.set()
    pool.close()


def test_clients_take_turns_each_in_its_own_order() -> None:
    turns = Turns[str]()
    for name in ("a1", "a2", "a3", "b1", "c1", "c2"):
        turns.add(name[0], name)
    assert [turns.take() for _ in range(3)] == ["a1", "b1", "c1"]
    turns.add("b", "b2")  # behind those who wait already
    assert len(turns) == 4
    assert [turns.take() for _ in range(4)] == ["a2", "c2", "b2", "a3"]
    with pytest.raises(KeyError):
        turns.take()


def test_a_job_that_fails_answers_with_its_error_and_the_worker_lives(pool: WorkerPool) -> None:
    failed = pool.submit(Lane.GET, int, "not a number")
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result(30)
    assert pool.submit(Lane.GET, int, "7").result(30) == 7
    pool.close()


def test_closing_finishes_what_runs_and_drops_what_waits(pool: WorkerPool) -> None:
    started, gate = threading.Event(), threading.Event()

    def job() -> str:
        started.set()
        assert gate.wait(30)
        return "done"

    running = pool.submit(Lane.PUT, job)
    assert started.wait(30)
    waiting = pool.submit(Lane.PUT, int, "7")
    closer = threading.Thread(target=pool.close)
    closer.start()
    with pytest.raises(ShuttingDownError):
        waiting.result(30)
    gate.set()
    closer.join(30)
    assert running.result(30) == "done"
    with pytest.raises(ShuttingDownError):
        pool.submit(Lane.GET, int, "7")


def test_a_budget_refuses_what_does_not_fit_and_says_how_much_is_under_way() -> None:
    budget = ByteBudget(100)
    budget.take(60)
    with pytest.raises(OverloadedError, match="60 of 100 bytes are under way, no room for 50"):
        budget.take(50)
    budget.give_back(60)
    budget.take(50)
    assert budget.used_bytes == 50


def test_one_block_larger_than_the_budget_is_let_in_alone() -> None:
    budget = ByteBudget(100)
    budget.take(500)
    with pytest.raises(OverloadedError):
        budget.take(1)


def test_however_much_one_client_sends_another_gets_in() -> None:
    budget = ByteBudget(80)
    for _ in range(7):
        budget.take(10, client="large")
    with pytest.raises(OverloadedError, match="70 of 80 bytes are under way, no room for 1"):
        budget.take(1, client="large")
    budget.take(5, client="small")
    with pytest.raises(OverloadedError):
        budget.take(1, client="small")  # it has some now
    budget.give_back(5, "small")
    budget.take(10, client="small")
    assert budget.used_bytes == 80


def test_a_budget_forgets_clients_that_have_nothing_under_way() -> None:
    budget = ByteBudget(100)
    for client in range(50):
        budget.take(1, client=client)
        budget.give_back(1, client)
    assert not budget._of


def test_waiting_for_room_ends_when_some_is_given_back() -> None:
    budget = ByteBudget(100)
    budget.take(100)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(budget.take, 80, 30.0)
        budget.give_back(100)
        waiting.result(30)
    assert budget.used_bytes == 80


def test_a_job_that_nobody_waits_for_any_more_does_not_run(pool: WorkerPool) -> None:
    started, go_on = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        started.set()
        go_on.wait(30)

    lanes = [pool.submit(Lane.PUT, first), pool.submit(Lane.PUT, ran.append, "abandoned")]
    started.wait(30)
    assert lanes[1].cancel()
    last = pool.submit(Lane.PUT, ran.append, "wanted")
    go_on.set()
    last.result(30)
    assert ran == ["wanted"]


def test_closing_does_not_mind_jobs_that_nobody_waits_for(pool: WorkerPool) -> None:
    started, go_on = threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        go_on.wait(30)

    pool.submit(Lane.PUT, first)
    started.wait(30)
    abandoned, dropped = pool.submit(Lane.PUT, print), pool.submit(Lane.PUT, print)
    abandoned.cancel()
    threading.Timer(0.1, go_on.set).start()
    pool.close()
    assert abandoned.cancelled()
    with pytest.raises(ShuttingDownError):
        dropped.result()
