"""Readers of the files that benchmarks are published as: GSM8K, MMLU, LITM. Nothing is downloaded.

    gsm8k    JSON lines {"question", "answer"}; an answer ends in "#### 42"
    mmlu     CSV, question,A,B,C,D,answer, with or without that header; a file for a subject, or a directory of them
    litm     JSON lines {"question", "answers": [..], "ctxs": [{"title", "text"}, ..]}, as of nq-open-oracle and others

Also as *.gz. Only as many lines are read as are asked for, and none longer than a bound. What is not as it should be is
a ValueError that names file, line, what was expected and what came.
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

MAX_LINE = 1 << 20  # characters
_MAX_SHOWN = 60  # characters of what came
CHOICES = "ABCD"
_HEADER = ["question", *CHOICES, "answer"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Of GSM8K: worked, with the number that it ends in."""

    question: str
    answer: str
    number: str


@dataclass(frozen=True, slots=True)
class Multiple:
    """Of MMLU. right: which of the options is."""

    question: str
    options: list[str]
    right: int


@dataclass(frozen=True, slots=True)
class Search:
    """Of LITM. documents: titles and texts, in order; each of the answers would do."""

    question: str
    answers: list[str]
    documents: list[tuple[str, str]]


def gsm8k(path: Path, n: int) -> list[Problem]:
    """Up to n problems. Raises ValueError, OSError."""
    return list(islice(_problems(path), n))


def mmlu(path: Path, n: int) -> dict[str, list[Multiple]]:
    """By subject, up to n of each. Raises ValueError, OSError."""
    paths = [path]
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.name.endswith((".csv", ".csv.gz")))
        if not paths:
            raise ValueError(f"{path}: files *.csv expected, got a directory without any")
    return {_subject(one): list(islice(_multiples(one), n)) for one in paths}


def litm(path: Path, n: int) -> list[Search]:
    """Up to n questions. Raises ValueError, OSError."""
    return list(islice(_searches(path), n))


def _problems(path: Path) -> Iterator[Problem]:
    for where, row in _objects(path):
        question, answer = _text(row, "question", where), _text(row, "answer", where)
        _, mark, number = answer.rpartition("####")
        number = number.strip().replace(",", "").removeprefix("$")
        if not mark or not _is_number(number):
            raise ValueError(f"{where}: an answer that ends in #### and a number expected, got {_shown(answer[-40:])}")
        yield Problem(question, answer, number)


def _searches(path: Path) -> Iterator[Search]:
    for where, row in _objects(path):
        answers = _list(row, "answers", where)
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f"{where}: answers of text expected, got {_shown(answers)}")
        contexts = _list(row, "ctxs", where)
        if not all(isinstance(context, dict) for context in contexts):
            raise ValueError(f"{where}: ctxs of objects with title and text expected, got {_shown(contexts)}")
        documents = [
            (_text(context, "title", where, "ctxs"), _text(context, "text", where, "ctxs")) for context in contexts
        ]
        yield Search(_text(row, "question", where), answers, documents)


def _multiples(path: Path) -> Iterator[Multiple]:
    with _lines(path) as lines:
        rows = csv.reader((line for _, line in lines), strict=True)
        while True:
            where = f"{path}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(f"{where}: a row of CSV expected, got {error}") from None
            if row is None:
                return
            if row and row != _HEADER:
                yield _multiple(row, where)


def _multiple(row: Sequence[str], where: str) -> Multiple:
    if len(row) != len(_HEADER):
        raise ValueError(f"{where}: {','.join(_HEADER)} expected, got {len(row)} columns: {_shown(row)}")
    question, *options, answer = row
    if not all(map(str.strip, [question, *options])):
        raise ValueError(f"{where}: a question and four options expected, got an empty one: {_shown(row)}")
    if answer.strip() not in tuple(CHOICES):
        raise ValueError(f"{where}: an answer of {', '.join(CHOICES)} expected, got {_shown(answer)}")
    return Multiple(question, options, CHOICES.index(answer.strip()))


def _subject(path: Path) -> str:
    """As the files are named: high_school_biology_test.csv."""
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    for part in ("_test", "_val", "_dev"):
        name = name.removesuffix(part)
    return name.replace("_", " ")


# ---- lines, and what they hold


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """JSON objects line by line, and where each of them is."""
    with _lines(path) as lines:
        for number, line in lines:
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: a line of JSON expected, got {_shown(line)} ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a JSON object expected, got {_shown(row)}")
            yield where, row


@contextmanager
def _lines(path: Path) -> Iterator[Iterator[tuple[int, str]]]:
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield _bounded(file, path)


def _bounded(file: Any, path: Path) -> Iterator[tuple[int, str]]:
    number = 1
    try:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise ValueError(
                    f"{path}:{number}: lines of {MAX_LINE:,} characters at most expected, got a longer one"
                )
            yield number, line
            number += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: text in UTF-8 expected, got {error.reason} near here") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}:{number}: a file of gzip expected, got {error}") from None


def _text(row: Mapping[str, Any], name: str, where: str, within: str = "") -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        owner = f"{name} of {within}" if within else name
        raise ValueError(f"{where}: {owner} as text expected, got {_came(row, name)}")
    return value


def _list(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} as a list with something in it expected, got {_came(row, name)}")
    return value


def _came(row: Mapping[str, Any], name: str) -> str:
    if name in row:
        return _shown(row[name])
    return f"none among {_shown(sorted(map(str, row)))}"


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}.."
