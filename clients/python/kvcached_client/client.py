"""The client that engines use: one model, one namespace, and no exception ever comes from the daemon.

A cache fails open. A daemon that is absent, hung, full or damaged is a miss on the way in and a refusal on the way
out, within a deadline; after a few failures a circuit breaker stops asking for a while. Thread-safe.
"""

import logging
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from google.protobuf.message import DecodeError

from . import tensors
from ._proto import kvcached_pb2 as pb
from .breaker import CircuitBreaker
from .connection import Connection, DaemonError
from .hashing import chain_hashes
from .protocol import MAX_REQUEST_ID_CHARACTERS, Part, check_am_ratio, describe_part, read_payload
from .segments import Lease, Leases, rounded
from .spec import Fidelity, FidelityKind, ModelSpec, kind_from_proto, kind_to_proto
from .uploads import Upload

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One full block of a prompt with its tensors, as an engine hands it over and gets it back.

    tensors: "keys" and "values" of the dense layers, [n_layers, n_kv_heads, block_size, dim]. Beside them, "queries"
    [n_layers, n_query_heads, 1 to 256, key_dim] in a block that is put says what will be read of it, in case that it is
    compacted. A block that comes back compacted has rows of all heads one after another, layer by layer: "keys" and
    "values" [n_rows, dim], "positions" and "bias" [n_rows], and "lengths" [n_layers, n_kv_heads], the rows of each. Any
    other tensors are opaque. token_ids is empty in a block that came from the daemon, which never stores tokens.

    Tensors of a block that came are read-only where they lie in memory shared with the daemon. Few blocks fit there at
    a time: who copies them, and lets go of a block before asking for the next one, gets most of them that way.
    """

    block_hash: bytes
    parent_hash: bytes
    index: int
    token_ids: Sequence[int]
    tensors: tensors.Arrays
    first_position: int
    boundary: bool = False
    fidelity: Fidelity = field(default_factory=Fidelity)
    lineage: FidelityKind = FidelityKind.EXACT


@dataclass(frozen=True, slots=True)
class Match:
    """The leading blocks of a prompt that the daemon holds."""

    hashes: tuple[bytes, ...] = ()
    blocks: tuple[pb.HeldBlock, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(block.n_tokens for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a call may take, in seconds, and how much may be under way, in bytes.

    segment_bytes: memory to be shared with a daemon on this machine, at most; 0: none.
    """

    match_seconds: float = 2.0
    get_seconds: float = 60.0
    put_seconds: float = 120.0
    in_flight_bytes: int = 64 << 20
    block_bytes: int = 4 << 30
    segment_bytes: int = 64 << 20


class Client:
    """Blocks of one model in one namespace. See the module for what it promises.

    A request id is for logs: its first 64 characters, with "?" for those that are not printable ASCII.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        namespace: str = "",
        target: str | None = None,
        limits: Limits | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        if problems := spec.problems():
            raise ValueError(f"not a model that can be registered: {'; '.join(problems)}")
        self.spec, self.namespace, self.model_id = spec, namespace, spec.model_id
        self.limits = limits or Limits()
        self._breaker = breaker or CircuitBreaker()
        self._connection = Connection(target)
        self._leases = Leases(self._connection.target, self._segment_bytes())
        self._registered = threading.Event()

    def _segment_bytes(self) -> int:
        """What is asked for: 8 slots of either kind, as far as the limit goes; a block may have opaque tensors too."""
        shapes, dtype = self.spec.dense_shapes(), tensors.DTYPES.get(self.spec.kv_dtype)
        if not shapes or not dtype:
            return self.limits.segment_bytes
        n_bytes = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        return min(max(16 * rounded(n_bytes), 1 << 20), self.limits.segment_bytes)

    def chain(self, token_ids: Sequence[int]) -> list[bytes]:
        """Hashes of the full blocks of a prompt, in this client's namespace."""
        return chain_hashes(token_ids, self.spec.block_size, self.namespace)

    def match(
        self,
        hashes: Sequence[bytes],
        *,
        floor: FidelityKind = FidelityKind.EXACT,
        accepts_compacted: bool = False,
        request_id: str = "",
        before_put: bool = False,
    ) -> Match:
        """How many leading blocks of a chain are held. An empty Match if none are, or nobody answers.

        before_put: asked to learn what need not be put, and not counted as a lookup.
        """
        request = pb.MatchRequest(
            model_id=self.model_id,
            namespace=self.namespace,
            block_hashes=hashes,
            floor=kind_to_proto(floor),
            accepts_compacted=accepts_compacted,
            request_id=_printable(request_id),
            before_put=before_put,
        )
        response = self._ask("Match", request)
        if response is None:
            return Match()
        n_held = min(len(response.blocks), len(hashes))
        return Match(tuple(hashes[:n_held]), tuple(response.blocks[:n_held]))

    def get(
        self,
        hashes: Sequence[bytes],
        *,
        floor: FidelityKind = FidelityKind.EXACT,
        accepts_compacted: bool = False,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Iterator[Block | None]:
        """The blocks asked for, in order: exactly one item for each hash, None for one that is not to be had.

        accepts_compacted: the caller applies biases, and heads of unequal length; others are never given such blocks.
        timeout: seconds for all of them, `limits.get_seconds` at most.
        """
        request = self._get_request(hashes, floor, accepts_compacted, request_id)
        n_yielded = 0
        for block in self._fetched(request, timeout):
            yield block
            del block  # while we wait for the next one its slot is free, unless the caller keeps it
            n_yielded += 1
        yield from [None] * (len(hashes) - n_yielded)

    def get_longest_prefix(
        self,
        hashes: Sequence[bytes],
        *,
        at_least: int = 1,
        floor: FidelityKind = FidelityKind.EXACT,
        accepts_compacted: bool = False,
        request_id: str = "",
        timeout: float | None = None,
    ) -> Iterator[Block]:
        """The leading blocks of a chain that are held: `match` and `get` in one round trip.

        at_least: nothing comes if fewer are held. The first must come within `limits.match_seconds`, the rest in time.
        """
        request = self._get_request(hashes, floor, accepts_compacted, request_id)
        request.longest_prefix, request.at_least = True, at_least
        for block in self._fetched(request, timeout):
            if block is not None:
                yield block
            del block

    def _get_request(
        self, hashes: Sequence[bytes], floor: FidelityKind, accepts_compacted: bool, request_id: str
    ) -> pb.GetRequest:
        return pb.GetRequest(
            model_id=self.model_id,
            namespace=self.namespace,
            block_hashes=hashes,
            floor=kind_to_proto(floor),
            accepts_compacted=accepts_compacted,
            request_id=_printable(request_id),
        )

    def _fetched(self, request: pb.GetRequest, timeout: float | None) -> Iterator[Block | None]:
        """An item for each block asked for, or for fewer if the stream fails; of a prefix, up to the first miss."""
        n_asked, n_read, lease = len(request.block_hashes), 0, None
        seconds = min(timeout or self.limits.get_seconds, self.limits.get_seconds)
        try:
            with _Attempt(self) as attempt:
                if attempt.refused or not n_asked:
                    return
                lease = self._leases.current()
                request.lease = lease.id if lease else b""
                parts = self._connection.get(
                    request, seconds, self.limits.match_seconds if request.longest_prefix else None
                )
                for block_hash in request.block_hashes:
                    block = self._read_block(parts, block_hash, request.accepts_compacted, lease)
                    n_read += 1
                    if block is None and request.longest_prefix:
                        if (
                            next(parts, None) is None
                        ):  # as of a daemon that knows of prefixes: nothing is left to cancel
                            n_read = n_asked
                        return
                    yield block
                    del block
        except (DaemonError, DecodeError, ValueError) as error:
            log.warning("get failed after %d of %d blocks, the rest is a miss: %s", n_read, n_asked, error)
        finally:
            if n_read < n_asked:  # the rest may be in slots that nobody here knows of
                self._leases.drop(lease)

    def _read_block(
        self, parts: Iterator[Part], block_hash: bytes, accepts_compacted: bool, lease: Lease | None
    ) -> Block | None:
        """The next block of a Get stream. Raises ValueError where the stream is not what was asked for."""
        header = next(parts, None)
        if not isinstance(header, pb.Header) or header.block_hash != block_hash:
            raise ValueError(f"expected the header of block {block_hash.hex()}, got {describe_part(header)}")
        if not header.found:
            return None
        problems, size = tensors.problems(header.tensors), header.data_bytes
        if problems or size != tensors.nbytes(header.tensors) or size > self.limits.block_bytes:
            raise ValueError(f"block {block_hash.hex()} has a wrong size or layout: {size} bytes, {problems}")
        fidelity = Fidelity.from_proto(header.fidelity)
        if header.HasField("slot"):
            if lease is None:
                raise ValueError(f"block {block_hash.hex()} is in a slot, and nothing was lent")
            payload = lease.block(header.slot, size)
        else:
            payload = read_payload(parts, size)
        arrays = tensors.views(header.tensors, payload)
        if fidelity.kind == FidelityKind.COMPACTED:
            self._check_compacted(arrays, header, accepts_compacted)
        return Block(
            block_hash=block_hash,
            parent_hash=header.parent_hash,
            index=header.index,
            token_ids=(),
            tensors=arrays,
            first_position=header.first_position,
            boundary=header.boundary,
            fidelity=fidelity,
            lineage=kind_from_proto(header.lineage),
        )

    def _check_compacted(self, arrays: tensors.Arrays, header: pb.Header, accepts_compacted: bool) -> None:
        """Raises ValueError for rows that an engine which trusts them would read wrongly, or asked not to be given."""
        shapes = self.spec.dense_shapes()
        if not accepts_compacted or not shapes:
            raise ValueError(f"block {header.block_hash.hex()} is compacted, which this caller does not take")
        if problems := tensors.packed_problems(arrays, self.spec.kv_dtype, shapes, header.first_position):
            raise ValueError(f"block {header.block_hash.hex()} is compacted and malformed: {'; '.join(problems)}")

    def put(
        self,
        blocks: Sequence[Block],
        *,
        store_as: str = "",
        store_as_bundle: bytes = b"",
        am_ratio: float | None = None,
        min_fidelity: FidelityKind | None = None,
        request_id: str = "",
    ) -> list[pb.PutResult]:
        """Stores blocks, parents first, and waits until they are committed: one result for each, refused or not.

        store_as: "exact", a profile or "compacted-" with one, of `store_as_bundle` if that is given; otherwise as the
        daemon's settings say. am_ratio: with a compacted one, tokens before over tokens after, 1 to 8; None: likewise.
        min_fidelity: the daemon may store the blocks at this or better; None: its own choice.
        At most `limits.in_flight_bytes` (but one block at least) are sent ahead of their results.

        Raises:
            ValueError: a block that no daemon could be sent: a dtype without a name, a token id out of range; or an
                am_ratio that is none.
        """
        least = kind_to_proto(min_fidelity) if min_fidelity else pb.FIDELITY_KIND_UNSPECIFIED
        wish = {"store_as": store_as, "store_as_bundle": store_as_bundle, "min_fidelity": least}
        ratio = 0.0 if am_ratio is None else check_am_ratio(am_ratio)
        request_id = _printable(request_id) or uuid.uuid4().hex[:16]
        fields = {**wish, "am_ratio": ratio, "request_id": request_id}
        upload = Upload(self, blocks, self._leases.current(), **fields)
        results = self._upload(upload)
        if any(result.code == "ABORTED" for result in results):  # another daemon: it knows nothing of the lease
            self._leases.drop(upload.lease)
            left = [i for i, result in enumerate(results) if result.code != "OK"]
            again = self._upload(Upload(self, [blocks[i] for i in left], None, **fields))
            for i, result in zip(left, again, strict=True):
                results[i] = result
        if any(result.code == "FAILED_PRECONDITION" for result in results):
            self._registered.clear()  # perhaps the daemon lost its store, and the model with it
        return results

    def _upload(self, upload: Upload) -> list[pb.PutResult]:
        """One result for each block."""
        reason = "nobody answers (circuit breaker is open)"
        try:
            with _Attempt(self) as attempt:
                if not attempt.refused:
                    for result in self._connection.put(upload.parts(), self.limits.put_seconds):
                        if not upload.answered(result):
                            break
                    reason = "the stream ended without an answer"
        except DaemonError as error:
            reason = str(error)
            log.warning("put failed: %s", error)
        finally:
            if upload.close():  # nobody knows whether the daemon still reads slots of ours
                self._leases.drop(upload.lease)
        return upload.results + upload.unanswered(reason)

    def delete(self, hashes: Sequence[bytes]) -> int:
        """Removes blocks with their descendants; how many left. 0 if nobody answers."""
        request = pb.DeleteRequest(model_id=self.model_id, namespace=self.namespace, block_hashes=hashes)
        response = self._ask("Delete", request)
        return response.n_deleted if response else 0

    def announce(self, engine: pb.Engine) -> bool:
        """Describes the engine that this client serves, for the daemon's status; whether the daemon heard it."""
        engine.model_id, engine.namespace = self.model_id, self.namespace
        return self._ask("Announce", pb.AnnounceRequest(engine=engine)) is not None

    def _ask(self, name: str, request: Any) -> Any:
        """One short call; None if it failed, for whatever reason."""
        try:
            with _Attempt(self) as attempt:
                return None if attempt.refused else self._connection.call(name, request, self.limits.match_seconds)
        except DaemonError as error:
            log.warning("%s failed: %s", name, error)
            return None

    def close(self) -> None:
        self._leases.close()
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Attempt:
    """One use of the daemon: asks the breaker, registers the model if need be, and tells the breaker how it went."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.refused = not client._breaker.allows()

    def __enter__(self) -> "_Attempt":
        if not self.refused and not self._client._registered.is_set():
            try:
                request = pb.RegisterModelRequest(spec=self._client.spec.to_proto())
                self._client._connection.call("RegisterModel", request, self._client.limits.match_seconds)
                self._client._registered.set()
            except DaemonError as error:
                self._report(error)
                raise
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not self.refused:
            self._report(error)

    def _report(self, error: BaseException | None) -> None:
        breaker = self._client._breaker
        if error is None or isinstance(error, GeneratorExit):  # the latter: a consumer of `get` that had enough
            breaker.succeeded()
            return
        self._client._registered.clear()  # whoever answers next may be another daemon, or one that lost its store
        if isinstance(error, DaemonError) and not error.is_outage:
            breaker.succeeded()
        else:
            breaker.failed()


def _printable(request_id: str) -> str:
    """A request id as the daemon's log has it: nothing that a caller writes into it may break a call."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in request_id[:MAX_REQUEST_ID_CHARACTERS])
