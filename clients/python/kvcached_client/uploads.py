"""The sending side of a Put."""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import tensors
from ._proto import kvcached_pb2 as pb
from .protocol import CHUNK_BYTES, Part
from .segments import Lease
from .spec import kind_to_proto

if TYPE_CHECKING:
    from .client import Block, Client


class Upload:
    """Headers and data of blocks, never more than the window ahead of the results.

    lease: whose slots blocks go in, as far as some are free. fields: of every header, beside those that describe the
    block.
    """

    def __init__(self, client: "Client", blocks: Sequence["Block"], lease: Lease | None, **fields: Any) -> None:
        self._client, self.lease, self._fields = client, lease, fields
        self._blocks = blocks
        self._headers = [self._header(block) for block in blocks]  # here, where the caller can be told
        self._room = threading.Condition()
        self._in_flight: list[pb.Header] = []  # sent and not answered
        self._closed = False
        self.results: list[pb.PutResult] = []

    def parts(self) -> Iterator[Part]:
        """Runs in a thread of gRPC's."""
        for block, header in zip(self._blocks, self._headers, strict=True):
            if not self._wait_for_room(header):
                return
            slot = self.lease.write(block.tensors, header.data_bytes) if self.lease else None
            if self.lease and slot is not None:
                header.slot, header.lease = slot, self.lease.id
                yield header
            else:
                yield header
                yield from tensors.pieces(block.tensors, CHUNK_BYTES)

    def _header(self, block: "Block") -> pb.Header:
        described = tensors.describe(block.tensors)
        return pb.Header(
            model_id=self._client.model_id,
            namespace=self._client.namespace,
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
            data_bytes=tensors.nbytes(described),
            **self._fields,
        )

    def _wait_for_room(self, header: pb.Header) -> bool:
        limit = self._client.limits.in_flight_bytes - header.data_bytes
        with self._room:
            self._room.wait_for(lambda: self._closed or not self._in_flight or self._sent_bytes() <= limit)
            self._in_flight.append(header)
            return not self._closed

    def _sent_bytes(self) -> int:
        return sum(header.data_bytes for header in self._in_flight)

    def answered(self, result: pb.PutResult) -> bool:
        """Takes a result; False for one that answers nothing."""
        with self._room:
            if not self._in_flight:
                return False
            header = self._in_flight.pop(0)
            if self.lease and header.HasField("slot"):
                self.lease.give_back(header.slot)
            self.results.append(result)
            self._room.notify_all()
            return True

    def close(self) -> bool:
        """Sends no more. Whether something was sent that was not answered."""
        with self._room:
            self._closed = True
            self._room.notify_all()
            return bool(self._in_flight)

    def unanswered(self, reason: str) -> list[pb.PutResult]:
        """Refusals for all blocks that got no result, sent or not."""
        return [
            pb.PutResult(block_hash=b.block_hash, outcome=pb.OUTCOME_REFUSED, code="UNAVAILABLE", message=reason)
            for b in self._blocks[len(self.results) :]
        ]
