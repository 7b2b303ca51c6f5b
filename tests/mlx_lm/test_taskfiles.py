"""Files of published tasks: read as they are, and refused by file, line, what was expected and what came."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kvcached_mlx import published, taskfiles
from kvcached_mlx.taskfiles import Multiple, Problem, Search
from kvcached_mlx.tasks import Answer, Choice

ROW = {"question": "Who?", "answers": ["The Ada"], "ctxs": [{"title": "T", "text": "Ada did."}]}


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decoded(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def problem(n: int) -> dict[str, str]:
    return {"question": f"{n} and 1?", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1:,}"}


def test_problems_are_read_as_far_as_they_are_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", problem(1), "\n", problem(1999), "not JSON\n")
    assert taskfiles.gsm8k(file, 2) == [
        Problem("1 and 1?", problem(1)["answer"], "2"),
        Problem("1999 and 1?", problem(1999)["answer"], "2000"),
    ]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert taskfiles.gsm8k(packed, 2) == taskfiles.gsm8k(file, 2)


def test_subjects_are_read_with_and_without_a_header(tmp_path: Path) -> None:
    written(tmp_path / "high_art_test.csv", 'What, "now"?,1,2,3,4,B\n'.replace('What, "now"?', '"What, ""now""?\nSay"'))
    written(tmp_path / "logic.csv", "question,A,B,C,D,answer\nq,a,b,c,d,D\n")
    (tmp_path / "README").write_text("no subject")
    assert taskfiles.mmlu(tmp_path, 5) == {
        "high art": [Multiple('What, "now"?\nSay', ["1", "2", "3", "4"], 1)],
        "logic": [Multiple("q", ["a", "b", "c", "d"], 3)],
    }


def test_searches_are_read(tmp_path: Path) -> None:
    assert taskfiles.litm(written(tmp_path / "l.jsonl", ROW), 3) == [Search("Who?", ["The Ada"], [("T", "Ada did.")])]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [problem(1), "{nonsense\n"], r"f:2: a line of JSON expected, got '\{nonsense"),
        ("gsm8k", [[1]], r"f:1: a JSON object expected, got \[1\]"),
        ("gsm8k", [{"question": "q"}], r"f:1: answer as text expected, got none among \['question'\]"),
        ("gsm8k", [{"question": 7, "answer": "#### 1"}], "f:1: question as text expected, got 7"),
        ("gsm8k", [{"question": "q", "answer": "four"}], "f:1: an answer that ends in #### and a number .* got 'four'"),
        ("gsm8k", [{"question": "q", "answer": "#### inf"}], "f:1: an answer that ends in #### and a number"),
        ("gsm8k", ["x" * (taskfiles.MAX_LINE + 1)], "f:1: lines of 1,048,576 characters at most expected"),
        ("gsm8k", ["[" * 100_000], "f:1: a line of JSON expected"),
        ("mmlu", ["q,a,b,c,d,E\n"], "f:1: an answer of A, B, C, D expected, got 'E'"),
        ("mmlu", ["q,a,b,c,d,A\n", "q,a,b\n"], "f:2: question,A,B,C,D,answer expected, got 3 columns"),
        ("mmlu", ["q,a,,c,d,A\n"], "f:1: a question and four options expected, got an empty one"),
        ("mmlu", ['"' + "x\n" * 100_000], "f:1: a row of CSV expected, got field larger than"),
        ("litm", [{**ROW, "ctxs": []}], r"f:1: ctxs as a list with something in it expected, got \[\]"),
        ("litm", [{**ROW, "ctxs": ["text"]}], "f:1: ctxs of objects with title and text expected"),
        ("litm", [{**ROW, "ctxs": [{"title": "T"}]}], "f:1: text of ctxs as text expected, got none among"),
        ("litm", [{**ROW, "answers": [3]}], r"f:1: answers of text expected, got \[3\]"),
    ],
)
def test_what_is_not_as_it_should_be_is_refused_by_its_place(
    tmp_path: Path, name: str, rows: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(taskfiles, name)(written(tmp_path / "f", *rows), 10)


def test_files_that_are_no_text_no_gzip_or_empty_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="f:1: text in UTF-8 expected"):
        taskfiles.gsm8k(tmp_path / "f", 1)
    (tmp_path / "f.gz").write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"f.gz:1: a file of gzip expected"):
        taskfiles.gsm8k(tmp_path / "f.gz", 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"files \*.csv expected, got a directory without any"):
        taskfiles.mmlu(tmp_path / "none", 1)
    with pytest.raises(ValueError, match="8 examples and a question at least expected, got 1 in all"):
        published.read("gsm8k", written(tmp_path / "short", problem(1)), 5, None)


def test_examples_come_before_the_questions_and_are_none_of_them(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *map(problem, range(5)))
    task = published.read("gsm8k", file, 2, 2)([7], encode)
    (prompt,) = task.prompts
    assert prompt.token_ids[0] == 7
    assert decoded(prompt.token_ids[1:]).count("Question:") == 2
    assert [decoded(case.question) for case in prompt.cases] == [f"Question: {n} and 1?\nAnswer:" for n in (2, 3)]
    case = prompt.cases[0]
    assert isinstance(case, Answer)
    said = {" 1+2=3 #### 3": True, " $3.0": True, " 3, no: 4": False, " three": False}
    assert {text: case.is_right(text) for text in said} == said


def test_questions_are_shared_out_among_subjects(tmp_path: Path) -> None:
    written(tmp_path / "a_test.csv", *[f"a{i},1,2,3,4,A\n" for i in range(9)])
    written(tmp_path / "b_test.csv", *[f"b{i},1,2,3,4,C\n" for i in range(3)])
    task = published.read("mmlu", tmp_path, 5, 1)([], encode)
    assert [len(prompt.cases) for prompt in task.prompts] == [3, 2]
    case = task.prompts[1].cases[0]
    assert isinstance(case, Choice)
    assert (decoded(case.question), case.right) == ("b1\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", 2)
    assert "about b.\n\nb0" in decoded(task.prompts[1].token_ids)


def test_an_answer_of_a_search_is_found_whatever_its_case_and_articles(tmp_path: Path) -> None:
    (prompt,) = published.read("litm", written(tmp_path / "l", ROW), 5, None)([], encode).prompts
    assert "Document [1](Title: T) Ada did." in decoded(prompt.token_ids)
    (case,) = prompt.cases
    assert isinstance(case, Answer)
    assert case.is_right(" It was ADA.")
    assert not case.is_right(" Nobody")
