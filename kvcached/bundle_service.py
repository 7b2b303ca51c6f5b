"""The calls about bundles: messages to bundles and back. No policy."""

from collections.abc import Iterator

from kvcached import border
from kvcached.bundles import Installed
from kvcached.cache import Cache
from kvcached.codec.bundle import MAX_BYTES, Bundle
from kvcached.errors import InvalidRequestError, PreconditionError
from kvcached_client._proto import kvcached_pb2 as pb


class BundleService:
    """What Service answers about bundles."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def install(self, pieces: Iterator[pb.InstallBundleRequest]) -> pb.InstallBundleResponse:
        """Receives a bundle, for which room is reserved first, checks it and keeps it."""
        first = next(pieces, None)
        total_bytes = first.total_bytes if first else 0
        if not first or not 1 <= total_bytes <= MAX_BYTES:
            raise InvalidRequestError(f"the first piece says total_bytes, 1 to {MAX_BYTES}, got {total_bytes}")
        self._cache.pool.puts.take(total_bytes)
        try:
            bundle = Bundle.unpack(_received(first, pieces))
            border.measured(bundle.measured)
            self._check_is_wanted(bundle)
            return pb.InstallBundleResponse(bundle=self.status(self._cache.bundles.install(bundle)))
        finally:
            self._cache.pool.puts.give_back(total_bytes)

    def attach(self, request: pb.AttachMeasurementsRequest) -> pb.AttachMeasurementsResponse:
        border.measured(request.profiles)
        installed = self._cache.bundles.attach(request.bundle_id, request.profiles)
        return pb.AttachMeasurementsResponse(bundle=self.status(installed))

    def all(self) -> pb.ListBundlesResponse:
        n_blocks = self._cache.store.n_blocks_by_bundle()
        bundles = [self._described(i, n_blocks[i.bundle_id]) for i in self._cache.bundles.all()]
        return pb.ListBundlesResponse(bundles=bundles)

    def remove(self, request: pb.RemoveBundleRequest) -> pb.RemoveBundleResponse:
        return pb.RemoveBundleResponse(n_deleted=self._cache.remove_bundle(request.bundle_id, request.with_blocks))

    def status(self, installed: Installed) -> pb.BundleStatus:
        """What Status says of one bundle."""
        return self._described(installed, len(self._cache.store.blocks_of_bundle(installed.bundle_id)))

    def _described(self, installed: Installed, n_blocks: int) -> pb.BundleStatus:
        outline = installed.outline
        fitting = [spec for spec in self._cache.models().values() if installed.fits(spec)]
        current = [newest.bundle_id for spec in fitting if (newest := self._cache.bundles.newest(spec))]
        return pb.BundleStatus(
            bundle_id=installed.bundle_id,
            model_id=fitting[0].model_id if fitting else b"",
            model_name=fitting[0].name if fitting else outline.spec.name,
            layers_per_group=outline.layers_per_group,
            bytes=installed.n_bytes,
            installed=installed.installed,
            n_blocks=n_blocks,
            current=installed.bundle_id in current,
            compacts=outline.compacts,
            profiles=[
                pb.ProfileStatus(name=name, target_compression=target, measured=outline.measured.get(name))
                for name, target in outline.profiles.items()
            ],
        )

    def _check_is_wanted(self, bundle: Bundle) -> None:
        """Raises PreconditionError, naming both sides, if the bundle fits no registered model."""
        weights = bundle.spec.fingerprint.weights
        refusal = PreconditionError(f"the bundle is of a model with weights {weights}, and no model is registered")
        for spec in sorted(self._cache.models().values(), key=lambda spec: spec.fingerprint.weights == weights):
            try:
                return bundle.check_fits(spec)
            except PreconditionError as error:
                refusal = error  # the last one is of the model that is most like it
        raise refusal


def _received(first: pb.InstallBundleRequest, pieces: Iterator[pb.InstallBundleRequest]) -> bytes:
    """The bytes of all pieces, exactly as many as the first one says."""
    received, n_bytes = [first.data], len(first.data)
    for piece in pieces:
        n_bytes += len(piece.data)
        if n_bytes > first.total_bytes:
            break
        if piece.data:
            received.append(piece.data)
    if n_bytes != first.total_bytes:
        raise InvalidRequestError(f"a bundle of {first.total_bytes} bytes was declared, got {n_bytes}")
    return b"".join(received)
