"""The circuit breaker, with a clock that the test moves."""

import threading

import pytest

from kvcached_client import CircuitBreaker


class Clock:
    """Time stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(n_failures=3, pause_seconds=1.0, max_pause_seconds=5.0, clock=clock)


def fail(breaker: CircuitBreaker, times: int = 3) -> None:
    for _ in range(times):
        breaker.failed()


def test_calls_pass_until_enough_have_failed_in_a_row(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    assert breaker.allows()
    assert not breaker.is_open
    fail(breaker, 1)
    assert not breaker.allows()
    assert breaker.is_open


def test_a_success_in_between_starts_the_count_anew(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    breaker.succeeded()
    fail(breaker, 2)
    assert breaker.allows()


def test_one_call_may_try_when_the_pause_is_over(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += 0.99
    assert not breaker.allows()
    clock.now += 0.01
    assert breaker.allows()
    assert not breaker.allows()


def test_a_try_that_succeeds_closes_the_circuit(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += 1
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.is_open
    assert all(breaker.allows() for _ in range(9))


def test_the_pause_doubles_with_each_failed_try_up_to_its_bound(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    for pause in (1, 2, 4, 5, 5):
        clock.now += pause - 0.01
        assert not breaker.allows()
        clock.now += 0.01
        assert breaker.allows()
        breaker.failed()


def test_after_a_success_the_pause_is_short_again(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    for pause in (1, 2):
        clock.now += pause
        breaker.allows()
        breaker.failed()
    clock.now += 4
    breaker.succeeded()
    fail(breaker)
    clock.now += 1
    assert breaker.allows()


def test_a_try_that_never_reports_back_does_not_keep_the_circuit_open_for_ever(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    fail(breaker)
    clock.now += 1
    assert breaker.allows()
    clock.now += 5
    assert breaker.allows()


def test_of_many_threads_one_gets_the_try(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += 1
    barrier, allowed = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        allowed.append(breaker.allows())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 7 + [True]
