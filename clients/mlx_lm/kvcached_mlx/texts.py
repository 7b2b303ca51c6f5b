"""Calibration text: documents to windows of tokens, in three parts that share no text.

The parts are made before anything is computed, by the seed alone. Where there is enough text they share no document
either; a document that has to serve several gives each of them windows of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

_TUNE_SHARE = 0.2  # of the tokens that are not for the test
_MIN_TOKENS = 8  # of a window: less is not worth a run
_CHARACTERS_PER_TOKEN = 16  # more than any language has: of a larger document, the rest is left alone


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one document, opened as the tokenizer opens a text.

    rank: among the windows of the document, in an order of the seed's.
    """

    document: int
    rank: int
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Parts:
    """To fit bases; to choose steps and tables; to measure the loss on."""

    fit: list[Window]
    tune: list[Window]
    test: list[Window]


def read(paths: Sequence[Path] = ()) -> list[str]:
    """Each file a document; without any, the corpus that ships with this package.

    Raises:
        ValueError: a file is not UTF-8 text.
        OSError: it cannot be read.
    """
    if not paths:
        corpus = sorted((resources.files("kvcached_mlx") / "corpus").iterdir(), key=lambda file: file.name)
        return [file.read_text(encoding="utf-8") for file in corpus if file.name.endswith(".txt")]
    return [_read(Path(path)) for path in paths]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has zero bytes")
    return text


def split(documents: Sequence[str], tokenizer: Any, *, n_tokens: int, length: int, n_test: int, seed: int = 0) -> Parts:
    """`n_tokens` to fit and tune, and up to `n_test` windows of `length` tokens to test; fewer if the text is short.

    Raises:
        ValueError: there is not enough text for n_tokens and one window to test.
    """
    windows = _windows(documents, tokenizer, n_tokens + n_test * length, length, np.random.default_rng(seed))
    n_found, n_whole = sum(len(w.token_ids) for w in windows), sum(len(w.token_ids) == length for w in windows)
    n_fitted = n_tokens + length if n_tokens else 0  # the rest of a window that is cut is lost
    n_test = min(n_test, n_whole, (n_found - n_fitted) // length)
    if n_test < 1:
        raise ValueError(
            f"{n_fitted + length} tokens of text are needed, {n_fitted} to calibrate on and a window of {length} to "
            f"measure the loss; got {n_found} in {n_whole} such windows: add text, or ask for fewer tokens"
        )
    used: set[int] = set()
    test = _take([w for w in windows if len(w.token_ids) == length], n_test * length, used)
    n_tune = ceil(n_tokens * _TUNE_SHARE)
    tune = _take(_without(windows, test), n_tune, used)
    fit = _take(_without(windows, test + tune), n_tokens - n_tune, used)
    return Parts(fit, tune, test)


def _windows(
    documents: Sequence[str], tokenizer: Any, n_wanted: int, length: int, rng: np.random.Generator
) -> list[Window]:
    """Windows of the documents in an order of the seed's, until there are twice as many tokens as wanted."""
    begins = opening(tokenizer)
    step = length - len(begins)
    windows: list[Window] = []
    n_found = 0
    for document in rng.permutation(len(documents)).tolist():
        if n_found >= 2 * n_wanted:
            break
        text = documents[document][: 2 * n_wanted * _CHARACTERS_PER_TOKEN]
        tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # nothing of a model's context
        starts = range(0, len(tokens), step)
        ranks = rng.permutation(len(starts)).tolist()
        cut = [
            Window(document, rank, [*begins, *tokens[at : at + step]]) for rank, at in zip(ranks, starts, strict=True)
        ]
        windows += [window for window in cut if len(window.token_ids) >= _MIN_TOKENS]
        n_found += len(begins) + len(tokens)
    return windows


def opening(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: BOS or nothing."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])


def _take(windows: list[Window], n_tokens: int, used: set[int]) -> list[Window]:
    """So many tokens, of documents that no part has yet where there are any; the last window is cut.

    used: documents of other parts, to which ours are added.
    """
    taken: list[Window] = []
    for window in sorted(windows, key=lambda w: (w.document in used, w.rank)):  # stable: else in the order given
        if n_tokens < 1:
            break
        taken.append(Window(window.document, window.rank, window.token_ids[:n_tokens]))
        n_tokens -= len(window.token_ids)
    used.update(window.document for window in taken)
    return taken


def _without(windows: list[Window], taken: list[Window]) -> list[Window]:
    gone = {(window.document, window.rank) for window in taken}
    return [window for window in windows if (window.document, window.rank) not in gone]
