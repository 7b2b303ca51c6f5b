"""Everything that can go wrong, as one tree. Each class names the gRPC status that it becomes at the border.

    KvcachedError                INTERNAL
    ├─ InvalidRequestError       INVALID_ARGUMENT      the caller's fault: do not retry
    ├─ PreconditionError         FAILED_PRECONDITION   unknown model, absent parent, setting that needs a restart
    ├─ UnsupportedRopeError      FAILED_PRECONDITION   rotary positions that the codec cannot undo
    ├─ OverloadedError           RESOURCE_EXHAUSTED    the queue is full: try later
    ├─ QuotaExceededError        RESOURCE_EXHAUSTED    no room even after eviction, or the disk is full
    ├─ LeaseError                ABORTED               a lease of shared memory that is not, or not any more
    ├─ UnsupportedFrameError     UNIMPLEMENTED         a newer version, or a coder that is not built in
    ├─ CorruptFrameError         DATA_LOSS             bytes that lie; becomes a miss before any caller sees it
    ├─ UnsupportedBundleError    UNIMPLEMENTED         a bundle of a newer version
    ├─ CorruptBundleError        INVALID_ARGUMENT      bytes that are no bundle
    ├─ ShuttingDownError         UNAVAILABLE           the daemon is draining
    └─ StoreError                INTERNAL              the disk or LMDB; the message names the path

A miss is not an error. Messages say what was expected and what came.
"""


class KvcachedError(Exception):
    """Root of the tree."""

    code = "INTERNAL"


class InvalidRequestError(KvcachedError):
    code = "INVALID_ARGUMENT"


class PreconditionError(KvcachedError):
    code = "FAILED_PRECONDITION"


class UnsupportedRopeError(KvcachedError):
    code = "FAILED_PRECONDITION"


class OverloadedError(KvcachedError):
    code = "RESOURCE_EXHAUSTED"


class QuotaExceededError(KvcachedError):
    code = "RESOURCE_EXHAUSTED"


class LeaseError(KvcachedError):
    code = "ABORTED"


class UnsupportedFrameError(KvcachedError):
    code = "UNIMPLEMENTED"


class CorruptFrameError(KvcachedError):
    code = "DATA_LOSS"


class UnsupportedBundleError(KvcachedError):
    code = "UNIMPLEMENTED"


class CorruptBundleError(KvcachedError):
    code = "INVALID_ARGUMENT"


class ShuttingDownError(KvcachedError):
    code = "UNAVAILABLE"


class StoreError(KvcachedError):
    code = "INTERNAL"
