"""Mistakes to make, and what to ask afterwards. Nothing here asserts."""

import contextlib
from collections.abc import Callable
from typing import Any

import grpc
from support import DaemonProcess, chain, data_of, header_of, tiny_spec

from kvcached_client import Block, Client, DaemonError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import SERVICE, Part

SPEC = tiny_spec(weights="bad input")
TOKENS = list(range(16))
MIB = 1 << 20
Change = Callable[[pb.Header], Any]

_seeds = iter(range(10**9))


def fresh_chain(client: Client, n_blocks: int = 3, ballast: int = 0) -> list[Block]:
    """Blocks that nobody has put yet."""
    seed = next(_seeds)
    return chain(client, [10_000 + seed, *TOKENS[1:], *range(100)][: 4 * n_blocks], seed, ballast)


def whole(client: Client, block: Block) -> list[Part]:
    return [header_of(client, block), *data_of(block)]


def is_held(client: Client, *blocks: Block) -> list[bool]:
    return [item is not None for item in client.get([block.block_hash for block in blocks])]


def set_tokens(*token_ids: int) -> Change:
    def change(header: pb.Header) -> None:
        header.token_ids[:] = token_ids

    return change


def set_tensor(n: int, **fields: Any) -> Change:
    def change(header: pb.Header) -> None:
        header.tensors[n].MergeFrom(pb.Tensor(**{k: v for k, v in fields.items() if k != "shape"}))
        if "shape" in fields:
            header.tensors[n].shape[:] = fields["shape"]

    return change


def set_fields(**fields: Any) -> Change:
    def change(header: pb.Header) -> None:
        for name, value in fields.items():
            setattr(header, name, value)

    return change


def raw_stream(daemon: DaemonProcess, name: str, messages: list[bytes]) -> tuple[str, str]:
    """Status of a stream of any bytes."""
    with grpc.insecure_channel(daemon.target) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{name}")(iter(messages), timeout=30)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        return call.code().name, call.details()


def failing(daemon: DaemonProcess, name: str, request: Any) -> str:
    """The message with which a call fails."""
    try:
        return f"answered: {daemon.call(name, request)}"
    except DaemonError as error:
        return str(error)
