"""Tasks that are made up: the same for a seed, with the answer in the haystack once, where it is no evidence else."""

from collections.abc import Callable

import pytest

from kvcached_mlx.haystacks import GENERATED, Corpus
from kvcached_mlx.tasks import Choice, Recall, Task

WORDS = [f"{a}{b}word" for a in "abcdefghijkl" for b in "mnopqrstuvwx"]
TEXT = " ".join(WORDS)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def corpus(n_tokens: int = 2048, n_hidden: int = 1536) -> Corpus:
    windows = [[1, *encode(TEXT * 3)[at : at + n_tokens - 1]] for at in (0, 100)]
    return Corpus(TEXT, windows, 1, n_hidden, encode)


def decoded(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def same(a: Task, b: Task) -> bool:
    return [(p.token_ids, list(p.cases)) for p in a.prompts] == [(p.token_ids, list(p.cases)) for p in b.prompts]


@pytest.mark.parametrize("make", GENERATED.values(), ids=list(GENERATED))
def test_a_seed_gives_the_same_task_and_another_seed_another(make: Callable[[Corpus, int, int], Task]) -> None:
    assert same(make(corpus(), 6, 3), make(corpus(), 6, 3))
    assert not same(make(corpus(), 6, 3), make(corpus(), 6, 4))


@pytest.mark.parametrize("make", GENERATED.values(), ids=list(GENERATED))
def test_prompts_are_as_long_as_their_windows_and_as_many_questions_are_asked(
    make: Callable[[Corpus, int, int], Task],
) -> None:
    task = make(corpus(), 6, 0)
    assert sum(len(prompt.cases) for prompt in task.prompts) == 6
    for prompt in task.prompts:
        assert len(prompt.token_ids) == 2048
        assert prompt.token_ids[0] == 1
        for case in prompt.cases:
            assert isinstance(case, Recall | Choice)
            value = decoded(case.answer if isinstance(case, Recall) else case.answers[case.right])
            assert decoded(prompt.token_ids).count(value) == 1
            assert 0 < decoded(prompt.token_ids).index(value) < 1536


def test_chains_of_assignments_lead_from_the_name_asked_for_to_the_right_value() -> None:
    (prompt,) = GENERATED["tracking"](corpus(), 4, 0).prompts
    text = decoded(prompt.token_ids)
    for case in prompt.cases:
        assert isinstance(case, Choice)
        name = decoded(case.question).split()[1]
        for _ in range(3):
            name = text.split(f"\n{name} = ")[1].split("\n")[0]
        assert decoded(case.answers[case.right]) == f" {name}"


@pytest.mark.parametrize("make", GENERATED.values(), ids=list(GENERATED))
def test_a_haystack_that_is_too_small_is_refused(make: Callable[[Corpus, int, int], Task]) -> None:
    with pytest.raises(ValueError, match="are to be hidden in the first 40 of a prompt"):
        make(corpus(n_hidden=40), 1, 0)
