"""Bundles on disk: whole or not there, newest first, and never a reason not to start."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from bundles import make_bundle
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_spec

from kvcached import bundles as module
from kvcached.bundles import Bundles
from kvcached.codec.bundle import Bundle, Outline
from kvcached.errors import (
    CorruptBundleError,
    InvalidRequestError,
    PreconditionError,
    QuotaExceededError,
    StoreError,
    UnsupportedBundleError,
)
from kvcached_client import Fingerprint
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec(block_size=16)
OTHER = replace(SPEC, fingerprint=Fingerprint(weights="others"))


@pytest.fixture(scope="module")
def made() -> list[Bundle]:
    """Three bundles of one model."""
    return [make_bundle(SPEC, seed) for seed in range(3)]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where bundles are; nothing unfinished is ever left there."""
    yield tmp_path / "bundles"
    assert not list((tmp_path / "bundles").glob("*.unfinished"))


@cache
def packed() -> bytes:
    return make_bundle(SPEC).pack()


def ids(bundles: Bundles) -> list[bytes]:
    return [installed.bundle_id for installed in bundles.all()]


def test_what_was_installed_is_there_after_a_restart_newest_first(directory: Path, made: list[Bundle]) -> None:
    before = Bundles(directory)
    installed = [before.install(bundle) for bundle in made]
    after = Bundles(directory)
    assert ids(before) == ids(after) == [bundle.bundle_id for bundle in reversed(made)]
    assert [(i.n_bytes, i.installed) for i in after.all()] == [(i.n_bytes, i.installed) for i in reversed(installed)]
    assert [i.n_bytes for i in installed] == [len(bundle.pack()) for bundle in made]
    again = after.get(made[0].bundle_id)
    assert again
    assert again.pack() == made[0].pack() == installed[0].bundle.pack()


def test_a_bundle_that_is_installed_again_is_the_newest_one_even_when_the_clock_jumps_back(
    directory: Path, made: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = Bundles(directory)
    for bundle in made[:2]:
        bundles.install(bundle)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000)
    bundles.install(made[0])
    assert ids(bundles) == ids(Bundles(directory)) == [made[0].bundle_id, made[1].bundle_id]


def test_measurements_stay_when_a_bundle_without_them_is_installed_again(directory: Path, made: list[Bundle]) -> None:
    bundles = Bundles(directory)
    bundles.install(made[0].with_measured({"x8": pb.Measured(kl=0.25), "x16": pb.Measured(kl=0.5)}))
    bundles.install(made[0])
    bundles.install(made[0].with_measured({"x8": pb.Measured(kl=0.125)}))
    for found in (bundles, Bundles(directory)):
        assert {name: m.kl for name, m in found.all()[0].outline.measured.items()} == {"x8": 0.125, "x16": 0.5}


def test_a_bundle_is_current_once_it_was_measured_and_for_models_that_it_fits(
    directory: Path, made: list[Bundle]
) -> None:
    bundles = Bundles(directory)
    first, second, _ = made
    for bundle in (first, second):
        bundles.install(bundle)
    assert bundles.current(SPEC) is None
    attached = bundles.attach(first.bundle_id, {"x16": pb.Measured(kl=0.5)})
    for found in (bundles, Bundles(directory)):
        current = found.current(SPEC)
        assert current
        assert current.bundle_id == first.bundle_id
        assert found.current(replace(SPEC, block_size=32)) is current
        assert found.current(OTHER) is None
    assert attached.bundle.measured["x16"].kl == 0.5
    bundles.attach(second.bundle_id, {"x8": pb.Measured(kl=0.5)})
    assert bundles.newest(SPEC) == bundles.installed(second.bundle_id)


def test_measurements_are_attached_to_what_is_there_only(directory: Path, made: list[Bundle]) -> None:
    bundles = Bundles(directory)
    with pytest.raises(PreconditionError, match=f"unknown bundle {made[0].bundle_id.hex()}"):
        bundles.attach(made[0].bundle_id, {"x8": pb.Measured()})
    bundles.install(made[0])
    for measured, message in (
        ({"x64": pb.Measured(kl=1)}, r"near-lossless, x8, x16, x32, got measurements of \['x64'\]"),
        ({"x8": pb.Measured(kl=float("nan"))}, "finite measurements"),
        ({}, "finite measurements"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            bundles.attach(made[0].bundle_id, measured)
    assert bundles.current(SPEC) is None


@pytest.mark.parametrize("how", ["cut short", "a bit flipped", "no bundle", "empty", "another name"])
def test_a_damaged_or_foreign_file_is_moved_aside_and_the_others_serve(
    how: str, directory: Path, made: list[Bundle]
) -> None:
    for bundle in made[:2]:
        Bundles(directory).install(bundle)
    path = directory / f"{made[0].bundle_id.hex()}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    damaged = {
        "cut short": path.read_bytes()[:-1],
        "a bit flipped": bytes(content),
        "no bundle": b"\0" * 100,
        "empty": b"",
        "another name": made[2].pack(),
    }[how]
    path.write_bytes(damaged)
    found = Bundles(directory)
    assert found.get(made[0].bundle_id) is None  # if not at the start, then when it is read
    assert ids(found) == [made[1].bundle_id]
    assert path.with_suffix(".damaged").read_bytes() == damaged
    found.install(made[0])
    assert found.get(made[0].bundle_id)


def test_a_file_that_is_not_named_by_an_id_is_moved_aside(directory: Path, made: list[Bundle]) -> None:
    directory.mkdir()
    (directory / "mine.safetensors").write_bytes(made[0].pack())
    (directory / "notes.txt").write_text("of somebody else")
    assert ids(Bundles(directory)) == []
    assert sorted(path.name for path in directory.iterdir()) == ["mine.damaged", "notes.txt"]


def test_at_the_start_no_more_is_read_than_what_bundles_say_of_themselves(
    directory: Path, made: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    Bundles(directory).install(made[0].with_measured({"x8": pb.Measured(kl=0.25)}))
    with monkeypatch.context() as patched:
        patched.setattr(Bundle, "unpack", lambda _: 1 / 0)
        found = Bundles(directory)
    newest, current = found.newest(SPEC), found.current(SPEC)
    assert newest
    assert current
    assert newest.outline == current.outline
    assert newest.outline.profiles == {name: p.target_compression for name, p in made[0].profiles.items()}


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=4))
def test_whatever_stands_at_the_beginning_of_a_file_is_an_outline_or_one_of_two_errors(at: int, other: bytes) -> None:
    content = packed()
    damaged = content[:at] + other + content[at + len(other) :]
    with suppress(CorruptBundleError, UnsupportedBundleError):
        outline = Outline.unpack(damaged)
        assert outline.spec.problems() == []
        assert 1 <= outline.layers_per_group <= 2


def test_a_bundle_of_a_later_version_is_left_alone(directory: Path, made: list[Bundle]) -> None:
    Bundles(directory).install(made[0])
    (path,) = directory.iterdir()
    path.write_bytes(path.read_bytes().replace(b"kvcached bundle 1", b"kvcached bundle 3"))
    assert ids(Bundles(directory)) == []
    assert path.exists()


def test_what_a_killed_install_left_is_removed(directory: Path, made: list[Bundle]) -> None:
    Bundles(directory).install(made[0])
    (directory / f"{made[1].bundle_id.hex()}.unfinished").write_bytes(made[1].pack()[:1000])
    assert ids(Bundles(directory)) == [made[0].bundle_id]
    assert len(list(directory.iterdir())) == 1


def test_an_install_that_fails_leaves_what_was_there(
    directory: Path, made: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = Bundles(directory)
    bundles.install(made[0])
    for number, error in ((28, QuotaExceededError), (5, StoreError)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda _, number=number: (_ for _ in ()).throw(OSError(number, "no")))
            with pytest.raises(error):
                bundles.install(made[1])
    assert ids(bundles) == ids(Bundles(directory)) == [made[0].bundle_id]


def test_a_bundle_that_rots_while_the_daemon_runs_is_gone_and_nothing_else(directory: Path, made: list[Bundle]) -> None:
    bundles = Bundles(directory)
    for bundle in made:  # more than are kept in memory
        bundles.install(bundle)
    path = directory / f"{made[0].bundle_id.hex()}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert bundles.get(made[0].bundle_id) is None
    assert ids(bundles) == [made[2].bundle_id, made[1].bundle_id]


def test_a_disk_that_fails_once_does_not_cost_a_bundle(
    directory: Path, made: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    Bundles(directory).install(made[0])
    bundles = Bundles(directory)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(OSError(5, "no")))
        assert bundles.get(made[0].bundle_id) is None
    assert ids(bundles) == [made[0].bundle_id]
    assert bundles.get(made[0].bundle_id)


def test_only_the_bundles_last_used_stay_in_memory(directory: Path, made: list[Bundle]) -> None:
    bundles = Bundles(directory)
    for bundle in made:
        bundles.install(bundle)
    again = bundles.get(made[0].bundle_id)
    assert again
    assert again is not made[0]
    assert bundles.get(made[2].bundle_id) is made[2]
    assert bundles.get(made[0].bundle_id) is again


def test_a_bundle_is_removed_once(directory: Path, made: list[Bundle]) -> None:
    bundles = Bundles(directory)
    installed = bundles.install(made[0])
    assert bundles.remove(made[0].bundle_id)
    assert not bundles.remove(made[0].bundle_id)
    assert (bundles.get(made[0].bundle_id), ids(bundles), ids(Bundles(directory))) == (None, [], [])
    with pytest.raises(PreconditionError, match="unknown bundle"):
        _ = installed.bundle


def test_so_many_bundles_can_be_installed_and_no_more(
    directory: Path, made: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BUNDLES", 2)
    bundles = Bundles(directory)
    for bundle in made[:2]:
        bundles.install(bundle)
    with pytest.raises(QuotaExceededError, match="2 bundles are installed"):
        bundles.install(made[2])
    bundles.install(made[0])
    assert ids(bundles) == [made[0].bundle_id, made[1].bundle_id]


def test_threads_that_install_and_ask_at_once_leave_all_bundles_whole(directory: Path, made: list[Bundle]) -> None:
    bundles = Bundles(directory)

    def work(n: int) -> bool:
        bundle = made[n % 3]
        installed = bundles.install(bundle)
        return installed.bundle.bundle_id == bundle.bundle_id and bundles.get(bundle.bundle_id) is not None

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(48)))
    assert sorted(ids(Bundles(directory))) == sorted(ids(bundles)) == sorted(b.bundle_id for b in made)
