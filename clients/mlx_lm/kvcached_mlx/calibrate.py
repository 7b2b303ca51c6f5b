"""Calibrates models: runs one over text, streams its keys, values and queries to the daemon, measures what comes of it.

    calibrate("path/of/model", target="unix:...")       entry point `mlx-lm` of the group kvcached.engines

The daemon fits and installs a bundle; each profile is then measured by the real road (loss.py) on text that was used
for neither, and the figures are attached to the bundle, which makes it the one that new blocks are coded with.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcached_client import Client, Connection, Limits, ModelSpec
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.tensors import calibrate_requests

from . import blocks, capture, loss, texts
from .evaluation import run_tasks as run_tasks  # offered by this module, as the entry point of engines
from .loss import Course
from .road import Engine, Wish, bundle_of, load
from .weighing import Weighing

log = logging.getLogger(__name__)

NAMESPACE = "kvcached/calibration"
DEFAULT_TOKENS = 32768
N_TEST = 4  # windows
_N_WEIGHED = 2  # of those to fit, on which heads are weighed
_QUERIES_PER_BLOCK = 64
_FIRST_QUERY = 136  # of a piece: those before it read little else than sinks and what is computed anew
_BLOCKS_PER_PIECE = 16  # that the daemon takes at once
_CALIBRATE_SECONDS = 6 * 3600.0  # computing the text and fitting, on the slowest machine
_CALL_SECONDS = 30.0
_LIMITS = Limits(match_seconds=_CALL_SECONDS, put_seconds=600.0, get_seconds=600.0)  # nobody waits for an answer
_PARTS = {"fit": pb.CALIBRATION_PART_FIT, "tune": pb.CALIBRATION_PART_TUNE}

_Sample = tuple[pb.CalibrateHeader, dict[str, np.ndarray]]
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, slots=True)
class Plan:
    """What to calibrate on, and for. profiles: all if empty. layers_per_group: 0 is the daemon's choice.

    course: how to measure; None: as n_tokens suggests. budgets: by what compaction shares tokens between heads: curves
    (as if empty), entropy or uniform.
    """

    n_tokens: int = DEFAULT_TOKENS
    profiles: tuple[str, ...] = ()
    layers_per_group: int = 0
    seed: int = 0
    course: Course | None = None
    budgets: str = ""


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


def calibrate(  # noqa: PLR0913 - the interface of kvcached.engines
    model: str,
    *,
    target: str | None = None,
    texts: Sequence[Path] = (),
    n_tokens: int = DEFAULT_TOKENS,
    profiles: Sequence[str] = (),
    layers_per_group: int = 0,
    seed: int = 0,
    budgets: str = "",
    progress: Progress = _silent,
) -> pb.BundleStatus:
    """Calibrates a model and measures the profiles asked for (all if none are); the bundle, installed and current.

    model: a directory, or a name that mlx_lm.load knows. texts: files in UTF-8; without any, a corpus of our own.
    n_tokens: to fit and tune with; the test takes some more. The rest: see Plan.

    Raises:
        ValueError: the text is too short or not text, or the model has nothing that can be calibrated.
        DaemonError: the daemon cannot be reached, or refuses.
        FileNotFoundError: a text or the model is not there.
    """
    plan = Plan(n_tokens, tuple(profiles), layers_per_group, seed, budgets=budgets)
    return calibrate_engine(load(model), plan, target=target, paths=texts, progress=progress)


def evaluate(
    model: str,
    *,
    target: str | None = None,
    texts: Sequence[Path] = (),
    profiles: Sequence[str] = (),
    progress: Progress = _silent,
) -> dict[str, pb.Measured]:
    """What profiles (all if none are named) of a model's current bundle cost on texts. Attaches nothing.

    texts: that the bundle was not calibrated on; without any, what `calibrate` measures on by default.

    Raises: as `calibrate`; ValueError too if the model has no bundle, or the bundle not the profile.
    """
    engine = load(model)
    with Connection(target) as connection:
        connection.call("RegisterModel", pb.RegisterModelRequest(spec=engine.spec.to_proto()), _CALL_SECONDS)
        bundle = bundle_of(connection, engine.spec.model_id)
    if bundle is None:
        raise ValueError(f"{engine.spec.name} has no bundle: calibrate it first")
    course = _course(engine.spec)
    windows = _parts(engine, Plan(n_tokens=0) if texts else Plan(), texts, course).test
    return _measure(engine, bundle, profiles, windows, course, target, progress)


def calibrate_engine(
    engine: Engine, plan: Plan, *, target: str | None, paths: Sequence[Path] = (), progress: Progress = _silent
) -> pb.BundleStatus:
    """As `calibrate`, of a model that is loaded; on the thread that calls."""
    if not engine.spec.dense_layers:
        raise ValueError(f"{engine.spec.name} has no plain attention whose cache could be coded: it is kept exactly")
    course = plan.course or _course(engine.spec, plan.n_tokens)
    parts = _parts(engine, plan, paths, course)
    start = pb.CalibrateStart(
        model_id=engine.spec.model_id,
        layers_per_group=plan.layers_per_group,
        seed=plan.seed,
        profiles=dict.fromkeys(plan.profiles, 0.0),  # each at its usual compression
        budgets=plan.budgets,
    )
    with Connection(target) as connection:
        connection.call("RegisterModel", pb.RegisterModelRequest(spec=engine.spec.to_proto()), _CALL_SECONDS)
        samples = _samples(engine, parts, plan.seed, progress)
        bundle = connection.calibrate(calibrate_requests(start, samples), _CALIBRATE_SECONDS).bundle
        progress("fit", 1, 1)
        measured = _measure(engine, bundle, plan.profiles, parts.test, course, target, progress)
        request = pb.AttachMeasurementsRequest(bundle_id=bundle.bundle_id, profiles=measured)
        attached: pb.BundleStatus = connection.call("AttachMeasurements", request, _CALL_SECONDS).bundle
        return attached


def _course(spec: ModelSpec, n_tokens: int = DEFAULT_TOKENS) -> Course:
    """The usual one; for little text a shorter one, in whole blocks, so that the test is not most of the work."""
    usual = Course()
    block = spec.block_size
    n_blocks = max(min(usual.prefix, n_tokens // 8) // block, 1)
    prefix = n_blocks * block
    return Course(prefix, min(usual.continued, max(prefix // 2, 16)), min(usual.recomputed, prefix // 2))


def _parts(engine: Engine, plan: Plan, paths: Sequence[Path], course: Course) -> texts.Parts:
    return texts.split(
        texts.read(paths),
        engine.tokenizer,
        n_tokens=plan.n_tokens,
        length=course.length,
        n_test=N_TEST,
        seed=plan.seed,
    )


def _samples(engine: Engine, parts: texts.Parts, seed: int, progress: Progress) -> Iterator[_Sample | None]:
    """What the daemon is told: how attention's output is read, then window by window the text to fit and to tune.

    Errors are weighed by what is read of them, if both halves of that are known: the queries and the output metric.
    A None after each block that was computed, as a sign of life.
    """
    metric = _output_metric(engine)
    if metric is not None:
        weights = yield from _head_weights(engine, parts.fit[:_N_WEIGHED], metric, progress)
        yield pb.CalibrateHeader(), {"output_metric": metric} | ({} if weights is None else {"head_weights": weights})
    rng = np.random.default_rng(seed)
    named = [(name, window) for name in _PARTS for window in getattr(parts, name)]
    n_total, n_done = sum(len(window.token_ids) for _, window in named), 0

    def computed(n_tokens: int) -> None:
        nonlocal n_done
        n_done += n_tokens
        progress("compute", n_done, n_total)

    for name, window in named:
        n_queries = _QUERIES_PER_BLOCK if name == "fit" and metric is not None else 0
        for sample in _window_samples(engine, window.token_ids, n_queries, rng, computed):
            if sample:
                sample[0].part = _PARTS[name]
            yield sample
    progress("fit", 0, 1)


def _head_weights(
    engine: Engine, windows: Sequence[texts.Window], metric: np.ndarray, progress: Progress
) -> Generator[None, None, np.ndarray | None]:
    """What errors of heads weigh, in compaction's budgets. A None after each head, as a sign of life."""
    weighing = Weighing(engine, [window.token_ids for window in windows], metric)
    for done in weighing.run():
        progress("weigh heads", done, weighing.n_runs)
        yield None
    return weighing.weights()


def _output_metric(engine: Engine) -> np.ndarray | None:
    """None for a model that does not show its queries, without which it is of no use."""
    metric = capture.output_metric(engine.model, engine.spec)
    if metric is None or capture.run(engine.model, engine.spec, engine.make_cache(), [0], [0]) is None:
        log.warning("%s does not show how its cache is read: all errors weigh alike", engine.spec.name)
        return None
    return metric


def _window_samples(
    engine: Engine,
    token_ids: Sequence[int],
    n_queries: int,
    rng: np.random.Generator,
    computed: Callable[[int], None],
) -> Iterator[_Sample | None]:
    """Pieces of as many blocks as the daemon takes, computed a block at a time. n_queries: of each block; 0: none."""
    cache, step = engine.make_cache(), engine.spec.block_size
    for start in range(0, len(token_ids), _BLOCKS_PER_PIECE * step):
        stop = min(start + _BLOCKS_PER_PIECE * step, len(token_ids))
        queries, positions, first = [], [], start + _FIRST_QUERY
        for at in range(start, stop, step):
            chunk = token_ids[at : min(at + step, stop)]
            candidates = rng.permutation(np.arange(max(first, at), max(first, at + len(chunk))))
            sampled = np.sort(candidates[:n_queries])
            found = capture.run(engine.model, engine.spec, cache, chunk, (sampled - at).tolist())
            if found is not None and len(sampled):
                queries.append(found)
                positions.append(sampled)
            computed(len(chunk))
            yield None
        arrays = blocks.dense_rows(engine.spec, cache, start, stop)
        if queries:
            arrays["queries"] = np.concatenate(queries, axis=2)
            arrays["query_positions"] = np.concatenate(positions).astype(np.int32)
        yield pb.CalibrateHeader(first_position=start, n_tokens=stop - start), arrays


def _measure(
    engine: Engine,
    bundle: pb.BundleStatus,
    profiles: Sequence[str],
    windows: Sequence[texts.Window],
    course: Course,
    target: str | None,
    progress: Progress,
) -> dict[str, pb.Measured]:
    known = [profile.name for profile in bundle.profiles]
    if unknown := sorted(set(profiles) - set(known)):
        raise ValueError(f"bundle {bundle.bundle_id.hex()[:12]} has the profiles {', '.join(known)}, not {unknown}")
    names = list(profiles) or known
    n_done, n_total = 0, loss.n_tokens_to_compute(course, len(windows), len(names))

    def advance(n_tokens: int) -> None:
        nonlocal n_done
        n_done += n_tokens
        progress("measure", n_done, n_total)

    with Client(engine.spec, namespace=NAMESPACE, target=target, limits=_LIMITS) as client:
        wishes = [Wish(name) for name in names]
        losses = loss.measure(engine, client, bundle.bundle_id, wishes, windows, course, advance)
    return {name: one.measured() for name, one in zip(names, losses, strict=True)}
