"""Daemons that answer what a test wants. Nothing here asserts."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import METHODS, SERVICE

_HANDLERS: dict[tuple[bool, bool], Callable[..., Any]] = {  # by (sends_stream, answers_stream)
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


@contextmanager
def impostor(**answers: Callable[..., Any]) -> Iterator[str]:
    """A gRPC server with the right names, whose requests and answers are bytes of the test's choice."""

    def register(_request: bytes, _context: Any) -> bytes:
        return pb.RegisterModelResponse().SerializeToString()

    handlers = {}
    for name, answer in {"RegisterModel": register, **answers}.items():
        handlers[name] = _HANDLERS[METHODS[name].sends_stream, METHODS[name].answers_stream](answer)
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
