"""GSM8K, MMLU and LITM as tasks: what is put before a model, and when its answer counts.

Examples come before a question as usual, from the beginning of the same file; they are what goes through the daemon,
and all questions behind them share it. LITM has its documents there.
"""

import re
from collections.abc import Callable
from pathlib import Path

from . import taskfiles
from .taskfiles import CHOICES, Multiple, Problem, Search
from .tasks import Answer, Choice, Prompt, Task

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_SUBJECT = "The following are multiple choice questions (with answers) about {}.\n\n"
_FIND = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
_LONG, _SHORT = 320, 100  # tokens of an answer that is worked out, and of one that is not
_ARTICLES = re.compile(r"\b(a|an|the)\b")

Tokens = list[int]
Encode = Callable[[str], Tokens]
Make = Callable[[Tokens, Encode], Task]  # from what opens a text, and the tokens of one without that


def read(name: str, path: Path, n_questions: int, n_shots: int | None) -> Make:
    """A task, once its file was read. n_shots: examples before each question; None: as many as usual.

    Raises:
        ValueError: the file is not what such files are, or too short.
        OSError: it cannot be read.
    """
    return PUBLISHED[name](path, n_questions, n_shots)


def _gsm8k(path: Path, n_questions: int, n_shots: int | None) -> Make:
    n_shots = 8 if n_shots is None else n_shots
    problems = taskfiles.gsm8k(path, n_shots + n_questions)
    _check_enough(path, len(problems), n_shots)

    def make(opening: Tokens, encode: Encode) -> Task:
        shots = "".join(f"{_posed(shot)} {shot.answer}\n\n" for shot in problems[:n_shots])
        cases = [
            Answer(encode(_posed(one)), _ends_in(one.number), _LONG, ("\n\n", "Question:"))
            for one in problems[n_shots:]
        ]
        return Task("gsm8k", [Prompt([*opening, *encode(shots)], cases)], drawn_by_case=True)

    return make


def _mmlu(path: Path, n_questions: int, n_shots: int | None) -> Make:
    n_shots = 5 if n_shots is None else n_shots
    found = taskfiles.mmlu(path, n_shots + n_questions)
    for subject, questions in found.items():
        _check_enough(f"{path} ({subject})", len(questions), n_shots)
    taken = _shared_out({subject: len(questions) - n_shots for subject, questions in found.items()}, n_questions)

    def make(opening: Tokens, encode: Encode) -> Task:
        letters = [encode(f" {letter}") for letter in CHOICES]
        prompts = []
        for subject, n_taken in taken.items():
            shots = "".join(f"{_chosen(one)} {CHOICES[one.right]}\n\n" for one in found[subject][:n_shots])
            asked = found[subject][n_shots : n_shots + n_taken]
            cases = [Choice(encode(_chosen(one)), letters, one.right) for one in asked]
            prompts.append(Prompt([*opening, *encode(_SUBJECT.format(subject) + shots)], cases))
        return Task("mmlu", prompts, drawn_by_case=True)

    return make


def _litm(path: Path, n_questions: int, n_shots: int | None) -> Make:
    del n_shots  # LITM has no examples
    searches = taskfiles.litm(path, n_questions)
    _check_enough(path, len(searches), 0)

    def make(opening: Tokens, encode: Encode) -> Task:
        prompts = []
        for one in searches:
            listed = (f"Document [{i}](Title: {title}) {text}\n" for i, (title, text) in enumerate(one.documents, 1))
            case = Answer(encode(f"\nQuestion: {one.question}\nAnswer:"), _names(one), _SHORT, ("\n",))
            prompts.append(Prompt([*opening, *encode(_FIND + "".join(listed))], [case]))
        return Task("litm", prompts)

    return make


PUBLISHED: dict[str, Callable[[Path, int, int | None], Make]] = {"gsm8k": _gsm8k, "mmlu": _mmlu, "litm": _litm}


def _check_enough(where: object, n_found: int, n_shots: int) -> None:
    if n_found <= n_shots:
        wanted = f"{n_shots} examples and a question" if n_shots else "a question"
        raise ValueError(f"{where}: {wanted} at least expected, got {n_found} in all")


def _shared_out(there: dict[str, int], n: int) -> dict[str, int]:
    """So many of each that together they are n, or all there are; as evenly as can be, the first ones first."""
    taken = dict.fromkeys(there, 0)
    while n and (open_ones := [name for name in there if taken[name] < there[name]]):
        for name in open_ones[:n]:
            taken[name] += 1
        n = max(n - len(open_ones), 0)
    return {name: n_taken for name, n_taken in taken.items() if n_taken}


def _posed(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def _chosen(one: Multiple) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(CHOICES, one.options, strict=True))
    return f"{one.question}\n{options}Answer:"


def _ends_in(number: str) -> Callable[[str], bool]:
    """Whether the last number of a text is this one."""

    def is_right(said: str) -> bool:
        found = _NUMBER.findall(said)
        return bool(found) and float(re.sub(r"[$,]", "", found[-1])) == float(number)

    return is_right


def _names(search: Search) -> Callable[[str], bool]:
    """Whether a text has one of the answers in it; articles, case and punctuation do not count."""
    answers = [plain for answer in search.answers if (plain := _plain(answer))]
    return lambda said: any(answer in _plain(said) for answer in answers)


def _plain(text: str) -> str:
    kept = "".join(letter for letter in text.lower() if letter.isalnum() or letter.isspace())
    return " ".join(_ARTICLES.sub(" ", kept).split())
