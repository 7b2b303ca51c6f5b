"""The two streams of the protocol: blocks coming in for Put, blocks going out for Get. No policy.

A Put is read in a thread of its own, so that results go out while blocks come in. Room in memory is reserved before a
block's data is received, and before a block is decoded; what is refused is read past.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import grpc
import structlog

from kvcached import border
from kvcached.block import BlockId, KVBlock
from kvcached.cache import Cache, Fetch
from kvcached.errors import InvalidRequestError, KvcachedError
from kvcached_client import protocol, tensors
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import CHUNK_BYTES, Part

log = structlog.get_logger()


class PutReceiver:
    """The reading side of a Put stream, in a thread of its own."""

    def __init__(self, cache: Cache, parts: Iterator[Part]) -> None:
        self._cache, self._parts = cache, parts

    def run(self, emit: Callable[[Any], None]) -> None:
        """Emits (header, future or error) for each block; an error of the stream; None at the end, always."""
        try:
            for part in self._parts:
                if not isinstance(part, pb.Header):
                    raise InvalidRequestError(f"expected a header, got {len(part)} bytes of data")
                emit((part, self._block(part)))
        except KvcachedError as error:
            emit(error)
        except grpc.RpcError as error:  # the caller is gone
            log.debug("put stream ended early", error=str(error))
        except Exception:
            log.exception("receiving failed")
            emit(KvcachedError("internal error, see the daemon's log"))
        finally:
            emit(None)

    def _block(self, header: pb.Header) -> "Future[tuple[pb.Outcome, pb.Entry]] | KvcachedError":
        """Admits a block, receives it and puts it. Raises InvalidRequestError if the stream cannot go on."""
        try:
            spec = self._cache.model(header.model_id)
            block_id, entry = border.entry_of(header, spec, self._cache.config.max_block_bytes)
            self._cache.pool.puts.take(entry.source_bytes)
        except KvcachedError as error:
            self._cache.count_refused(error)
            self._skip(header.data_bytes)
            return error
        try:
            payload = protocol.read_payload(self._parts, header.data_bytes)
            arrays = tensors.views(header.tensors, payload)
            block = KVBlock.dense(arrays, header.n_tokens, header.first_position)
        except ValueError as error:
            self._cache.pool.puts.give_back(entry.source_bytes)
            raise InvalidRequestError(str(error)) from None
        except BaseException:
            self._cache.pool.puts.give_back(entry.source_bytes)
            raise
        return self._cache.put(block_id, entry, block)

    def _skip(self, n_bytes: int) -> None:
        """Reads past the data of a refused block."""
        while n_bytes > 0 and (part := next(self._parts, None)) is not None:
            if isinstance(part, pb.Header) or len(part) > n_bytes:
                raise InvalidRequestError(f"{n_bytes} bytes of data expected, got {protocol.describe_part(part)}")
            n_bytes -= len(part)


def put_result(header: pb.Header, answer: "Future[tuple[pb.Outcome, pb.Entry]] | KvcachedError") -> pb.PutResult:
    try:
        if isinstance(answer, KvcachedError):
            raise answer
        outcome, entry = answer.result()
    except KvcachedError as error:
        request_id = border.printable(header.request_id)
        log.info("block refused", block=header.block_hash.hex()[:16], request_id=request_id, reason=str(error))
        return pb.PutResult(
            block_hash=header.block_hash, outcome=pb.OUTCOME_REFUSED, code=error.code, message=str(error)
        )
    return pb.PutResult(
        block_hash=header.block_hash,
        outcome=outcome,
        code="OK",
        source_bytes=entry.source_bytes,
        stored_bytes=entry.stored_bytes,
        fidelity=entry.fidelity,
    )


def send_fetched(fetch: Fetch, counts: Counter[str]) -> Iterator[Part]:
    """Header and data of one block, or the header of a miss; counted as "sent" or "missed"."""
    try:
        found = fetch.found.result()
        counts["sent" if found else "missed"] += 1
        yield from _block_parts(fetch.block_id, found)
    finally:
        fetch.release()


def _block_parts(block_id: BlockId, found: tuple[pb.Entry, KVBlock] | None) -> Iterator[Part]:
    header = pb.Header(model_id=block_id.model_id, namespace=block_id.namespace, block_hash=block_id.block_hash)
    if found is None:
        yield header
        return
    entry, block = found
    arrays = block.to_tensors()
    described = tensors.describe(arrays)
    header.MergeFrom(
        pb.Header(
            found=True,
            parent_hash=entry.parent_hash,
            index=entry.index,
            n_tokens=entry.n_tokens,
            first_position=entry.first_position,
            fidelity=entry.fidelity,
            lineage=entry.lineage,
            boundary=entry.boundary,
            tensors=described,
            data_bytes=tensors.nbytes(described),
        )
    )
    yield header
    yield from tensors.pieces(arrays, CHUNK_BYTES)
