"""The bundles of one daemon on disk: <store>/bundles/<id in hex>.safetensors, each named by its content.

A file is whole or not there: it is written under another name, synced, and renamed. Its time of modification is when
it was installed. Files that cannot be trusted are moved aside as *.damaged, never deleted; those of a later version
stay as they are. What bundles say of themselves is in memory. Their tensors, which can be hundreds of MB and take
seconds to check, are read when they are first needed, and only those last used stay.
Locks, in the order they may be taken: files (while one is read or written), index (for moments).
"""

import errno
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TypeVar

import structlog

from kvcached.block import ModelSpec
from kvcached.codec.bundle import HEAD_BYTES, MAX_BYTES, Bundle, Outline
from kvcached.errors import (
    CorruptBundleError,
    InvalidRequestError,
    KvcachedError,
    PreconditionError,
    QuotaExceededError,
    StoreError,
    UnsupportedBundleError,
)
from kvcached_client._proto import kvcached_pb2 as pb

log = structlog.get_logger()
T = TypeVar("T")
MAX_BUNDLES = 64
_MAX_LOADED = 2
_NAME = re.compile("[0-9a-f]{64}")
_SUFFIX, _UNFINISHED, _DAMAGED = ".safetensors", ".unfinished", ".damaged"


@dataclass(frozen=True, slots=True)
class Installed:
    """What is known of a bundle without loading it."""

    bundle_id: bytes
    outline: Outline
    n_bytes: int
    installed: int  # microseconds since 1970
    _load: Callable[[bytes], Bundle | None]

    @property
    def bundle(self) -> Bundle:
        """All of it, read from disk if need be. Raises PreconditionError if it was removed."""
        if bundle := self._load(self.bundle_id):
            return bundle
        raise _unknown(self.bundle_id)

    def check_fits(self, spec: ModelSpec) -> None:
        """See Bundle.check_fits."""
        Bundle(self.outline.spec, 1, (), (), {}).check_fits(spec)  # which asks for nothing but the spec

    def fits(self, spec: ModelSpec) -> bool:
        if self.outline.spec.fingerprint.weights != spec.fingerprint.weights:
            return False  # asked at every put, and quickly said
        try:
            self.check_fits(spec)
        except PreconditionError:
            return False
        return True


class Bundles:
    """The bundles of one daemon. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files, self._index = threading.Lock(), threading.Lock()
        self._installed: dict[bytes, Installed] = {}
        self._loaded: OrderedDict[bytes, Bundle] = OrderedDict()
        try:
            for path in directory.glob(f"*{_UNFINISHED}"):  # of a daemon that was killed
                path.unlink()
            for path in sorted(directory.glob(f"*{_SUFFIX}")):
                self._take_in(path)
        except OSError as error:
            log.error("bundles cannot be read", directory=str(directory), reason=str(error))

    # ---- asking

    def get(self, bundle_id: bytes) -> Bundle | None:
        """A bundle, read from disk if need be; None if it is not installed."""
        if (bundle := self._at_hand(bundle_id)) or not self.installed(bundle_id):
            return bundle
        with self._files:
            if (bundle := self._at_hand(bundle_id)) or not self.installed(bundle_id):
                return bundle
            path = self._path(bundle_id)
            bundle = self._read(path)
            with self._index:
                if bundle:
                    self._keep_at_hand(bundle)
                elif not path.exists():  # else the disk may answer another time
                    del self._installed[bundle_id]
            return bundle

    def installed(self, bundle_id: bytes) -> Installed | None:
        """What is known of a bundle; None if it is not installed."""
        with self._index:
            return self._installed.get(bundle_id)

    def all(self) -> list[Installed]:
        """Newest first."""
        with self._index:
            return sorted(self._installed.values(), key=lambda i: i.installed, reverse=True)

    def newest(self, spec: ModelSpec) -> Installed | None:
        """The newest one that fits the model and says of a profile at least what it loses."""
        return next((i for i in self.all() if i.outline.measured and i.fits(spec)), None)

    def current(self, spec: ModelSpec) -> Bundle | None:
        """The same, loaded."""
        newest = self.newest(spec)
        return self.get(newest.bundle_id) if newest else None

    # ---- changing

    def install(self, bundle: Bundle) -> Installed:
        """Keeps a bundle as the newest one; one that is there already keeps measurements that this one lacks.

        Raises:
            QuotaExceededError: there are too many, or the disk is full.
            PreconditionError: it is too large.
            StoreError: the disk fails us.
        """
        with self._files:
            return self._write(bundle)

    def attach(self, bundle_id: bytes, measured: Mapping[str, pb.Measured]) -> Installed:
        """Adds what profiles were measured to lose, and makes the bundle the newest one.

        Raises:
            PreconditionError: there is no such bundle.
            InvalidRequestError: it has no such profile, a number is not finite, or nothing was measured.
        """
        bundle = self.get(bundle_id)
        if bundle is None:
            raise _unknown(bundle_id)
        numbers = [value for m in measured.values() for _, value in m.ListFields() if isinstance(value, float)]
        if not measured or not all(map(isfinite, numbers)):
            raise InvalidRequestError(f"finite measurements of a profile at least were expected, got {dict(measured)}")
        try:
            bundle = bundle.with_measured(measured)
        except ValueError as error:
            raise InvalidRequestError(str(error)) from None
        with self._files:
            if not self.installed(bundle_id):  # removed meanwhile
                raise _unknown(bundle_id)
            return self._write(bundle)

    def remove(self, bundle_id: bytes) -> bool:
        """Whether the bundle was there. Blocks that were coded with it are the caller's business."""
        with self._files:
            with self._index:
                self._loaded.pop(bundle_id, None)
                if self._installed.pop(bundle_id, None) is None:
                    return False
            try:
                self._path(bundle_id).unlink(missing_ok=True)
                self._sync_directory()
            except OSError as error:
                raise StoreError(f"the bundle {self._path(bundle_id)} cannot be removed: {error}") from None
        log.info("bundle removed", bundle=bundle_id.hex())
        return True

    # ---- files

    def _path(self, bundle_id: bytes) -> Path:
        return self._directory / f"{bundle_id.hex()}{_SUFFIX}"

    def _take_in(self, path: Path) -> None:
        """Notes a file that was found at the start, as it describes itself."""

        def note() -> Installed:
            with path.open("rb") as file:
                outline, stat = Outline.unpack(file.read(HEAD_BYTES)), path.stat()
            if not _NAME.fullmatch(path.stem):
                raise CorruptBundleError(f"a bundle is named by its id, got {path.stem!r}")
            return self._note(bytes.fromhex(path.stem), outline, stat.st_size, stat.st_mtime_ns // 1000)

        self._guarded(path, note)

    def _read(self, path: Path) -> Bundle | None:
        """The bundle of a file, checked; None if it has none."""

        def read() -> Bundle:
            if (n_bytes := path.stat().st_size) > MAX_BYTES:
                raise CorruptBundleError(f"a bundle has at most {MAX_BYTES} bytes, got {n_bytes}")
            bundle = Bundle.unpack(path.read_bytes())
            if bundle.bundle_id.hex() != path.stem:
                raise CorruptBundleError(f"expected bundle {path.stem}, got {bundle.bundle_id.hex()}")
            return bundle

        return self._guarded(path, read)

    def _guarded(self, path: Path, read: Callable[[], T]) -> T | None:
        """What is read of a file; None if that fails. A damaged or foreign one is moved aside."""
        try:
            return read()
        except CorruptBundleError as error:
            log.error("damaged bundle, moved aside", file=str(path), reason=str(error))
            with suppress(OSError):
                path.rename(path.with_suffix(_DAMAGED))
        except UnsupportedBundleError as error:
            log.warning("bundle of another version, left alone", file=str(path), reason=str(error))
        except OSError as error:
            log.error("a bundle cannot be read", file=str(path), reason=str(error))
        return None

    def _write(self, bundle: Bundle) -> Installed:
        before = self.installed(bundle.bundle_id)
        if before is None and len(self.all()) >= MAX_BUNDLES:
            raise QuotaExceededError(f"{MAX_BUNDLES} bundles are installed, and no more can be: remove one")
        if before:
            bundle = bundle.with_measured({**before.outline.measured, **bundle.measured})
        content = bundle.pack()
        if len(content) > MAX_BYTES:
            raise PreconditionError(f"a bundle has at most {MAX_BYTES} bytes, got {len(content)}")
        now = max(time.time_ns() // 1000, 1 + max((i.installed for i in self.all()), default=0))
        path = self._path(bundle.bundle_id)
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.utime(file.fileno(), ns=(now * 1000, now * 1000))
                os.fsync(file.fileno())
            unfinished.replace(path)
            self._sync_directory()
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise _not_written(path, error) from None
        log.info("bundle installed", bundle=bundle.bundle_id.hex(), model=bundle.spec.name, n_bytes=len(content))
        with self._index:
            self._keep_at_hand(bundle)
        return self._note(bundle.bundle_id, bundle.outline, len(content), now)

    def _sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ---- memory

    def _note(self, bundle_id: bytes, outline: Outline, n_bytes: int, installed: int) -> Installed:
        noted = Installed(bundle_id, outline, n_bytes, installed, self.get)
        with self._index:
            self._installed[bundle_id] = noted
        return noted

    def _at_hand(self, bundle_id: bytes) -> Bundle | None:
        with self._index:
            if bundle_id in self._loaded:
                self._loaded.move_to_end(bundle_id)
            return self._loaded.get(bundle_id)

    def _keep_at_hand(self, bundle: Bundle) -> None:
        self._loaded[bundle.bundle_id] = bundle
        self._loaded.move_to_end(bundle.bundle_id)
        while len(self._loaded) > _MAX_LOADED:
            self._loaded.popitem(last=False)


def _unknown(bundle_id: bytes) -> PreconditionError:
    return PreconditionError(f"unknown bundle {bundle_id.hex() or '(empty)'}: install it first")


def _not_written(path: Path, error: OSError) -> KvcachedError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QuotaExceededError(f"no room for the bundle {path}: {error}")
    return StoreError(f"the bundle {path} cannot be written: {error}")
