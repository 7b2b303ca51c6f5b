"""Builders and harnesses for tests. Nothing here asserts."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvcached_client import Block, Client, Connection, Fingerprint, LayerSpec, Limits, ModelSpec, RopeSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.hashing import ROOT
from kvcached_client.protocol import CHUNK_BYTES, Part
from kvcached_client.segments import Lease
from kvcached_client.spec import kind_to_proto
from kvcached_client.tensors import DTYPES, describe, nbytes, pieces

ROOT_DIR = Path(__file__).resolve().parent.parent
REFERENCE_MODEL = ROOT_DIR / "tests/data/model/qwen3-5m"
HELD_OUT = ROOT_DIR / "tests/data/model/text/heldout.jsonl"


def tiny_spec(
    *, weights: str = "w0", kv_dtype: str = "float16", block_size: int = 4, n_layers: int = 2, opaque: bool = False
) -> ModelSpec:
    """A model of 2 heads and 8 dims."""
    layer = LayerSpec(
        n_query_heads=4, n_kv_heads=2, key_dim=8, value_dim=8, rope=RopeSpec(dims=8, theta=1e4), opaque=opaque
    )
    return ModelSpec(Fingerprint(weights=weights), kv_dtype, block_size, (layer,) * n_layers, name="tiny")


def dense_tensors(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    """Random keys and values for one block of a model."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape).astype(DTYPES[spec.kv_dtype]) for name, shape in spec.dense_shapes().items()
    }


def chain(client: Client, token_ids: Sequence[int], seed: int = 0, ballast: int = 0) -> list[Block]:
    """Blocks with random tensors for all full blocks of a prompt; `ballast` bytes that no coder makes smaller."""
    size, parent, blocks = client.spec.block_size, ROOT, []
    for index, block_hash in enumerate(client.chain(token_ids)):
        tokens = token_ids[index * size : (index + 1) * size]
        tensors = dense_tensors(client.spec, seed + index)
        if ballast:
            tensors["ballast"] = np.random.default_rng([seed, index]).integers(0, 256, ballast, np.uint8)
        blocks.append(Block(block_hash, parent, index, tokens, tensors, first_position=index * size))
        parent = block_hash
    return blocks


def put_all(client: Client, blocks: list[Block]) -> list[Block]:
    """The blocks, which the daemon now holds. Raises RuntimeError if it does not."""
    failed = [result for result in client.put(blocks) if result.code != "OK"]
    if failed:
        raise RuntimeError(f"not stored: {failed}")
    return blocks


def hashes_of(blocks: Sequence[Block]) -> list[bytes]:
    return [block.block_hash for block in blocks]


def header_of(client: Client, block: Block) -> pb.Header:
    """The header that opens a block in a Put stream."""
    described = describe(block.tensors)
    return pb.Header(
        model_id=client.model_id,
        namespace=client.namespace,
        block_hash=block.block_hash,
        parent_hash=block.parent_hash,
        index=block.index,
        token_ids=block.token_ids,
        n_tokens=len(block.token_ids),
        first_position=block.first_position,
        fidelity=block.fidelity.to_proto(),
        lineage=kind_to_proto(block.lineage),
        boundary=block.boundary,
        tensors=described,
        data_bytes=nbytes(described),
    )


def data_of(block: Block) -> Iterator[Part]:
    """The data that follows the header of a block."""
    return pieces(block.tensors, CHUNK_BYTES)


def put_parts(target: str, parts: Iterable[Part], timeout: float = 30.0) -> list[pb.PutResult]:
    """A Put stream by hand: its results. Raises DaemonError."""
    with Connection(target) as connection:
        return list(connection.put(parts, timeout))


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def same_tensors(a: dict, b: dict) -> bool:
    """Bit for bit, NaN included."""
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and x.tobytes() == b[name].tobytes()
        for name, x in a.items()
    )


class DaemonProcess:
    """`python -m kvcached` with a store and a socket in one directory."""

    def __init__(self, directory: Path, *flags: str, quota: str = "64MiB", road: str = "") -> None:
        self.directory, self.flags, self.quota, self.road = directory, flags, quota, road
        self.socket = directory / "s/kvcached.sock"
        self.store = directory / "store"
        self.log = directory / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        return f"unix:{self.socket}"

    def launch(self, *flags: str) -> "subprocess.Popen[bytes]":
        """Starts the process without waiting for it."""
        command = [sys.executable, "-W", "error", "-m", "kvcached", "--store-path", str(self.store)]
        command += [
            "--socket-path",
            str(self.socket),
            "--quota-bytes",
            self.quota,
            "--http-port",
            "0",
            *self.flags,
            *flags,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KVCACHED_")}
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def start(self, timeout: float = 30.0) -> None:
        """Starts the process, and waits until it answers."""
        self.process = self.launch()
        deadline = time.monotonic() + timeout
        with Connection(self.target) as connection:
            while not connection.is_serving(timeout=1.0):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the daemon did not start:\n{self.log.read_text()}")
                time.sleep(0.05)

    def restart(self, *flags: str) -> None:
        """Stops the process cleanly, and starts it again with these flags too, from now on."""
        self.stop()
        self.flags += flags
        self.start()

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """SIGKILL."""
        return self._end(signal.SIGKILL)

    def _end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def client(self, spec: ModelSpec, namespace: str = "") -> Client:
        """Raises RuntimeError if it is to share memory and is lent none."""
        limits = Limits(segment_bytes=0) if self.road == "in-band" else None
        client = Client(spec, namespace=namespace, target=self.target, limits=limits)
        if self.road == "segment":
            attached(client)
        return client

    def call(self, name: str, request: Any, timeout: float = 30.0) -> Any:
        """One call on a connection of its own. Raises DaemonError."""
        with Connection(self.target) as connection:
            return connection.call(name, request, timeout)

    def status(self) -> pb.StatusResponse:
        response: pb.StatusResponse = self.call("Status", pb.StatusRequest())
        return response


def attached(client: Client) -> Lease:
    """The memory that a client shares. Raises RuntimeError if there is none in time."""
    if (lease := client._leases.wait(20)) is None:
        raise RuntimeError("no memory was lent")
    return lease


def n_moved(daemon: DaemonProcess, method: str, road: str) -> int:
    """How many blocks went so."""
    return int(daemon.status().counters.get(f'moved_blocks_total{{method="{method}",road="{road}"}}', 0))


def damage_frame(daemon: DaemonProcess, block_hash: bytes) -> None:
    """Flips a bit of a block's payload in the file of a daemon that is stopped, in older copies in free pages too."""
    data = daemon.store / "db/data.mdb"
    content = bytearray(data.read_bytes())
    for found in re.finditer(rb"\x89KVF\r\n", bytes(content)):
        if content[found.start() + 104 : found.start() + 136] == block_hash:
            content[found.start() + 200] ^= 0x40
    data.write_bytes(content)
