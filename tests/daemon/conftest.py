"""What the tests of mistakes share."""

from collections.abc import Iterator

import pytest
from mistakes import SPEC
from support import DaemonProcess

from kvcached_client import Client


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[Client]:
    """A client whose model the shared daemon knows."""
    with shared_daemon.client(SPEC) as client:
        client.match([])
        yield client
