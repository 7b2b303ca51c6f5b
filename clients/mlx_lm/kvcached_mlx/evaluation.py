"""Tasks on a model as it is, and beside it on what each fidelity makes of its cache: `kvcachedctl eval`.

Every prompt is computed once. Its cache goes through a running daemon (passage.py), one fidelity after another, and the
same questions are read on what comes back. Differences to the model as it is (vanilla: no cache in between) are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from kvcached_client import Connection
from kvcached_client._proto import kvcached_pb2 as pb

from . import haystacks, published, texts
from .haystacks import GENERATED, Corpus
from .intervals import Interval
from .loss import Loss
from .passage import RECOMPUTE, Passage, Tally
from .published import PUBLISHED, Make
from .reading import CacheReader
from .road import EXACT, Engine, Wish, bundle_of, load
from .tasks import Task
from .texts import Window

VANILLA = "vanilla"
PERPLEXITY = "perplexity"
HARNESS = "lm-eval:"  # what the names of tasks of that package begin with here
_OWN_TOKENS = 1024  # of a window of our corpus that calibration by default did not fit on
_CONTINUED = 256
_N_OWN_WINDOWS = 4
_CALL_SECONDS = 30.0

Bounded = tuple[float, float | None, float | None]  # a figure, and the bounds of its interval where there is one
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True, slots=True)
class Row:
    """A task at one fidelity. n: questions, or predictions for perplexity.

    delta: against vanilla; per cent for perplexity, whose kl is next-token KL in nats. Bounds of an interval at 95 %;
    None for what is not known. The rest: see `passage.Tally`; zeros for vanilla, which no daemon sees.
    """

    task: str
    fidelity: str
    metric: str
    value: float
    low: float | None
    high: float | None
    delta: float | None
    delta_low: float | None
    delta_high: float | None
    kl: float | None
    n: int
    prompt_tokens: int
    restored_tokens: int
    n_asked: int
    n_as_asked: int
    came_as: Mapping[str, int]
    compression: float | None
    active_bytes_per_token: float | None


@dataclass(frozen=True, slots=True)
class Setup:
    """What all tasks run on: a model, its passages, and how much of everything."""

    engine: Engine
    passages: Sequence[Passage]
    texts: Sequence[Path]
    n_tokens: int
    limit: int
    seed: int
    progress: Progress


def run_tasks(  # noqa: PLR0913 - the interface of kvcached.engines
    model: str,
    *,
    target: str | None = None,
    tasks: Sequence[str],
    fidelities: Sequence[str],
    am_ratio: float = 0.0,
    texts: Sequence[Path] = (),
    data: Mapping[str, Path] | None = None,
    limit: int = 50,
    n_tokens: int = _OWN_TOKENS,
    n_shots: int | None = None,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Rows, task by task, vanilla first, as dictionaries with the fields of `Row`.

    fidelities: "exact", profiles, "compacted-" with one. am_ratio: of the last; 0: as the daemon's settings say. data:
    the files of tasks that are read from some, and a directory of task descriptions for "lm-eval". n_tokens: of a
    prompt that is made of text.

    Raises:
        ValueError: a task, file or text is not what is expected, or the model cannot do it.
        DaemonError: the daemon cannot be reached, or refuses blocks.
        OSError: a file or the model cannot be read.
    """
    made = _read(tasks, data or {}, limit, n_shots)
    engine = load(model)
    wishes = [Wish(name, am_ratio if name.startswith("compacted-") else 0.0) for name in fidelities]
    _check_bundle(engine, wishes, target)
    rows: list[Row] = []
    with ExitStack() as stack:
        passages = [stack.enter_context(Passage(engine, wish, target)) for wish in wishes]
        setup = Setup(engine, passages, texts, n_tokens, limit, seed, progress)
        for name in tasks:
            rows += _run(name, setup, made, data or {})
    return [asdict(row) for row in rows]


def _read(tasks: Sequence[str], data: Mapping[str, Path], limit: int, n_shots: int | None) -> dict[str, Make]:
    """Tasks of files, before a model is loaded. Raises ValueError for tasks that do not exist or lack their file."""
    made = {}
    for name in tasks:
        if name in PUBLISHED:
            if name not in data:
                raise ValueError(f"{name} is read from a file, and none was given: --data {name}=PATH")
            made[name] = published.read(name, data[name], limit, n_shots)
        elif name.startswith(HARNESS):
            _harness()
        elif name not in (PERPLEXITY, *GENERATED):
            known = ", ".join((PERPLEXITY, *GENERATED, *PUBLISHED))
            raise ValueError(f"tasks are {known} and {HARNESS}NAME, got {name!r}")
    return made


def _harness() -> Any:
    """mlx-lm's own harness with our cache in between. Raises ValueError where it is not installed."""
    try:
        return import_module(f"{__package__}.harness")
    except ImportError as error:
        raise ValueError(f"{HARNESS}NAME needs the package lm-eval, which cannot be used here: {error}") from None


def _check_bundle(engine: Engine, wishes: Sequence[Wish], target: str | None) -> None:
    """Raises ValueError where the model's current bundle lacks what the wishes need, DaemonError if nobody answers."""
    with Connection(target) as connection:
        connection.call("RegisterModel", pb.RegisterModelRequest(spec=engine.spec.to_proto()), _CALL_SECONDS)
        bundle = bundle_of(connection, engine.spec.model_id)
    profiles = {profile.name for profile in bundle.profiles} if bundle else set()
    for wish in wishes:
        if wish.name != EXACT and wish.profile not in profiles:
            has = f"has the profiles {', '.join(sorted(profiles))}" if bundle else "has no bundle: calibrate it first"
            raise ValueError(f"{engine.spec.name} cannot be stored as {wish.name}, it {has}")
        if wish.compacts and not (bundle and bundle.compacts):
            raise ValueError(f"{engine.spec.name} cannot be stored as {wish.name}, its bundle does not compact")


def _run(name: str, setup: Setup, made: Mapping[str, Make], data: Mapping[str, Path]) -> list[Row]:
    for passage in setup.passages:
        passage.tally = Tally()
    if name == PERPLEXITY:
        return _perplexity(setup)
    if name.startswith(HARNESS):
        return _by_harness(name, setup, data.get(HARNESS.removesuffix(":")))
    return _scored(_task(name, setup, made), setup)


def _task(name: str, setup: Setup, made: Mapping[str, Make]) -> Task:
    tokenizer = setup.engine.tokenizer
    if name in made:
        return made[name](texts.opening(tokenizer), _encoder(setup.engine))
    windows = _windows(setup, setup.n_tokens)
    text = "\n".join(texts.read(setup.texts))
    size = setup.engine.spec.block_size
    n_hidden = (setup.n_tokens - RECOMPUTE) // size * size  # in whole blocks that every fidelity restores
    opening = texts.opening(tokenizer)
    corpus = Corpus(text, [w.token_ids for w in windows], len(opening), n_hidden, _encoder(setup.engine))
    return haystacks.GENERATED[name](corpus, setup.limit, setup.seed)


def _encoder(engine: Engine) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        tokens: list[int] = engine.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tokens

    return encode


def _windows(setup: Setup, length: int) -> list[Window]:
    """Of the text given; without any, of that part of our corpus which calibration by default leaves for its test.

    Raises ValueError where that is too short.
    """
    own = _OWN_TOKENS + _CONTINUED + 1
    if not setup.texts and length > own:
        raise ValueError(f"our own text has windows of {own} tokens, {length} are needed: give some with --text")
    from .calibrate import DEFAULT_TOKENS  # which imports this module, to offer it

    found = texts.split(
        texts.read(setup.texts),
        setup.engine.tokenizer,
        n_tokens=0 if setup.texts else DEFAULT_TOKENS,
        length=length if setup.texts else own,
        n_test=setup.limit if setup.texts else _N_OWN_WINDOWS,
        seed=setup.seed if setup.texts else 0,
    )
    test = found.test[: setup.limit]
    return [Window(w.document, w.rank, w.token_ids[:length]) for w in test]


def _computed(engine: Engine, token_ids: Sequence[int]) -> list[Any]:
    cache = engine.make_cache()
    for _ in engine.prefill(token_ids, cache):
        pass
    return cache


# ---- tasks with right answers


def _scored(task: Task, setup: Setup) -> list[Row]:
    """A row for vanilla and for each passage."""
    scores: list[list[list[float]]] = [[] for _ in range(1 + len(setup.passages))]  # of each, prompt by prompt
    for done, prompt in enumerate(task.prompts):
        setup.progress(task.name, done, len(task.prompts))
        cache = _computed(setup.engine, prompt.token_ids)
        for at, passage in enumerate([None, *setup.passages]):
            found = passage.through(prompt.token_ids, cache) if passage else cache
            reader = CacheReader(setup.engine, found)
            scores[at].append([case.score(reader) for case in prompt.cases])
    setup.progress(task.name, len(task.prompts), len(task.prompts))
    vanilla = _sums(scores[0], task)
    rows = []
    for passage, each in zip([None, *setup.passages], scores, strict=True):
        sums = _sums(each, task)
        counts = np.ones(len(sums)) if task.drawn_by_case else np.array([len(prompt.cases) for prompt in task.prompts])
        value, delta = Interval.of_ratio(sums, counts), Interval.of_ratio(sums - vanilla, counts)
        rows.append(_row(task.name, passage, "accuracy", value, delta if passage else None, n=int(counts.sum())))
    return rows


def _sums(scores: Sequence[Sequence[float]], task: Task) -> np.ndarray:
    """Of what is drawn together: cases, or those of a prompt."""
    return np.array([one for prompt in scores for one in prompt] if task.drawn_by_case else [sum(p) for p in scores])


def _row(
    task: str,
    passage: Passage | None,
    metric: str,
    value: Bounded,
    delta: Bounded | None,
    n: int,
    kl: float | None = None,
) -> Row:
    """passage: None for vanilla."""
    tally = passage.tally if passage else Tally()
    above, above_low, above_high = delta or (None, None, None)
    return Row(
        task=task,
        fidelity=passage.wish.name if passage else VANILLA,
        metric=metric,
        value=value[0],
        low=value[1],
        high=value[2],
        delta=above,
        delta_low=above_low,
        delta_high=above_high,
        kl=kl,
        n=n,
        prompt_tokens=tally.prompt_tokens,
        restored_tokens=tally.restored_tokens,
        n_asked=tally.n_asked,
        n_as_asked=tally.n_as_asked,
        came_as=dict(tally.came_as),
        compression=tally.compression,
        active_bytes_per_token=tally.active_bytes_per_token,
    )


# ---- text


def _perplexity(setup: Setup) -> list[Row]:
    n_prefix, losses = setup.n_tokens, [Loss() for _ in setup.passages]
    windows = _windows(setup, n_prefix + _CONTINUED + 1)
    alone = Loss()
    for done, window in enumerate(windows):
        setup.progress(PERPLEXITY, done, len(windows))
        prefix, rest = window.token_ids[:n_prefix], window.token_ids[n_prefix:]
        cache = _computed(setup.engine, prefix)
        exact = CacheReader(setup.engine, cache).log_probabilities(rest[:-1])
        alone.add(exact, exact, rest[1:])
        for passage, loss in zip(setup.passages, losses, strict=True):
            found = CacheReader(setup.engine, passage.through(prefix, cache)).log_probabilities(rest[:-1])
            loss.add(exact, found, rest[1:])
    setup.progress(PERPLEXITY, len(windows), len(windows))
    rows = [_row(PERPLEXITY, None, PERPLEXITY, alone.perplexity(), None, n=alone.n_tokens)]
    for passage, loss in zip(setup.passages, losses, strict=True):
        delta, kl = loss.perplexity_delta(), loss.mean_kl().value
        rows.append(_row(PERPLEXITY, passage, PERPLEXITY, loss.perplexity(), delta, n=loss.n_tokens, kl=kl))
    return rows


# ---- tasks of lm-eval


def _by_harness(name: str, setup: Setup, directory: Path | None) -> list[Row]:
    rows: list[Row] = []
    vanilla: dict[tuple[str, str], float] = {}
    for done, passage in enumerate([None, *setup.passages]):
        setup.progress(name, done, 1 + len(setup.passages))
        cache_of = _cache_of(setup.engine, passage)
        found = _harness().run(
            setup.engine, cache_of, name.removeprefix(HARNESS), limit=setup.limit, seed=setup.seed, directory=directory
        )
        for one in found:
            delta = None if passage is None else (one.value - vanilla[one.task, one.metric], None, None)
            vanilla.setdefault((one.task, one.metric), one.value)
            rows.append(_row(f"{HARNESS}{one.task}", passage, one.metric, one.bounded, delta, one.n))
    setup.progress(name, 1 + len(setup.passages), 1 + len(setup.passages))
    return rows


def _cache_of(engine: Engine, passage: Passage | None) -> Callable[[Sequence[int]], list[Any]]:
    """A cache of the tokens of a prompt, as it is or as it comes back."""

    def cache_of(token_ids: Sequence[int]) -> list[Any]:
        cache = _computed(engine, token_ids)
        return passage.through(token_ids, cache) if passage else cache

    return cache_of
