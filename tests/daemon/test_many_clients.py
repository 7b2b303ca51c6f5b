"""Many clients of one daemon at once: nobody fails, everybody gets on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from support import DaemonProcess, chain, hashes_of, put_all, same_tensors, tiny_spec

from kvcached_client import Connection
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import CLIENT_KEY

SPEC = tiny_spec(weights="many")
N_CLIENTS, N_ROUNDS = 16, 5


def rounds(daemon: DaemonProcess, number: int, start: threading.Barrier) -> list[int]:
    """What one client does; how many blocks it got back in each round."""
    with daemon.client(SPEC) as client:
        start.wait(30)
        found = []
        for turn in range(N_ROUNDS):
            blocks = chain(client, [number, turn, *range(14)], seed=100 * number + turn, ballast=200_000)
            put_all(client, blocks)
            assert client.match(hashes_of(blocks)).n_tokens == 16
            back = list(client.get(hashes_of(blocks)))
            found.append(
                sum(b is not None and same_tensors(a.tensors, b.tensors) for a, b in zip(blocks, back, strict=True))
            )
        return found


def test_16_clients_put_match_and_get_at_once_and_none_fails(daemon: DaemonProcess) -> None:
    start = threading.Barrier(N_CLIENTS)
    with ThreadPoolExecutor(N_CLIENTS) as threads:
        found = list(threads.map(lambda number: rounds(daemon, number, start), range(N_CLIENTS)))
    assert found == [[4] * N_ROUNDS] * N_CLIENTS
    status = daemon.status()
    assert status.store.n_blocks == 4 * N_ROUNDS * N_CLIENTS
    assert status.counters.get("corrupt_blocks_total", 0) == 0


def test_all_calls_of_a_connection_are_of_one_client_and_connections_differ() -> None:
    seen = []

    def status(_: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(dict(context.invocation_metadata())[CLIENT_KEY])
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(status)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kvcached.v1.KvCache", {"Status": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for _ in range(2):
        with Connection(f"127.0.0.1:{port}") as connection:
            for _ in range(2):
                connection.call("Status", pb.StatusRequest())
    server.stop(None).wait()
    assert len(seen) == 4
    assert len(set(seen)) == 2
    assert seen[0] == seen[1]
