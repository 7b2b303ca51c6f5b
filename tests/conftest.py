"""What all tests share: tiny models and blocks, real stores, real daemons."""

import faulthandler
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import DaemonProcess

faulthandler.enable()
settings.register_profile("quick", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("quick")

_serial = itertools.count()


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose path is short enough for sockets."""
    return tmp_path_factory.mktemp("k")


@pytest.fixture(scope="module")
def road() -> str:
    """How tensors travel, "segment" or "in-band"; empty: as it comes."""
    return ""


@pytest.fixture
def daemon(run_dir: Path, road: str) -> Iterator[DaemonProcess]:
    """A real daemon in a process of its own, on a real socket and a real disk."""
    yield from _run_daemon(run_dir, road)


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory, road: str) -> Iterator[DaemonProcess]:
    """The same for all tests of a module that look at nothing but their own models and blocks."""
    yield from _run_daemon(tmp_path_factory.mktemp("k"), road)


def _run_daemon(directory: Path, road: str) -> Iterator[DaemonProcess]:
    process = DaemonProcess(directory, road=road)
    process.start()
    yield process
    process.stop()
    log = process.log.read_text()
    assert "Traceback" not in log, log  # whatever a test does to a daemon, it knows what to say
