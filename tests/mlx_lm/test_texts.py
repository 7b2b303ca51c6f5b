"""Calibration text: parts that share nothing, made before anything is computed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcached_mlx import texts

BOS = 7_000_000


class Characters:
    """A tokenizer whose tokens are the code points of a text."""

    def __init__(self, opening: tuple[int, ...] = (BOS,)) -> None:
        self._opening = list(opening)

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return (self._opening if add_special_tokens else []) + [ord(character) for character in text]


def documents_of(*sizes: int) -> list[str]:
    """Documents of which no two have a character in common."""
    starts = [1000 + sum(sizes[:i]) for i in range(len(sizes))]
    return ["".join(map(chr, range(start, start + size))) for start, size in zip(starts, sizes, strict=True)]


def tokens_of(windows: list[texts.Window]) -> list[int]:
    return [token for window in windows for token in window.token_ids if token != BOS]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.integers(10, 60),
    st.integers(10, 400),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_no_token_is_in_two_parts_and_all_are_as_long_as_asked(
    sizes: list[int], length: int, n_tokens: int, n_test: int, seed: int
) -> None:
    documents = documents_of(*sizes)
    try:
        parts = texts.split(documents, Characters(), n_tokens=n_tokens, length=length, n_test=n_test, seed=seed)
    except ValueError:
        assert sum(sizes) <= n_tokens + 3 * length + 40 * len(sizes)  # some of a document may be left over
        return
    tokens = tokens_of(parts.fit) + tokens_of(parts.tune) + tokens_of(parts.test)
    assert len(tokens) == len(set(tokens))
    assert 1 <= len(parts.test) <= n_test
    assert {len(window.token_ids) for window in parts.test} == {length}
    assert sum(len(window.token_ids) for window in parts.fit + parts.tune) == n_tokens
    for window in parts.fit + parts.tune + parts.test:
        text = [ord(character) for character in documents[window.document]]
        at = text.index(window.token_ids[1]) if len(window.token_ids) > 1 else 0
        assert window.token_ids == [BOS, *text[at : at + len(window.token_ids) - 1]]


def test_where_there_is_enough_text_no_document_is_in_two_parts() -> None:
    parts = texts.split(documents_of(*[200] * 30), Characters(), n_tokens=1000, length=100, n_test=3)
    of = [{window.document for window in part} for part in (parts.fit, parts.tune, parts.test)]
    assert [len(part) for part in of[2:]] == [3]
    assert len(set.union(*of)) == sum(map(len, of))


def test_one_long_document_serves_all_parts_with_windows_of_its_own() -> None:
    parts = texts.split(documents_of(5000), Characters(), n_tokens=1000, length=100, n_test=4)
    assert len(parts.test) == 4
    assert not set(tokens_of(parts.test)) & set(tokens_of(parts.fit) + tokens_of(parts.tune))


def test_the_same_seed_gives_the_same_parts_and_another_one_others() -> None:
    def split(seed: int) -> texts.Parts:
        return texts.split(documents_of(*[200] * 20), Characters(), n_tokens=500, length=50, n_test=3, seed=seed)

    assert split(1) == split(1) != split(2)


def test_less_text_is_tested_on_fewer_windows() -> None:
    parts = texts.split(documents_of(1000), Characters(), n_tokens=700, length=100, n_test=4)
    assert len(parts.test) == 2


@pytest.mark.parametrize("documents", [[], [""], documents_of(40), documents_of(*[50] * 20)], ids=range(4))
def test_too_little_text_is_refused_with_both_numbers(documents: list[str]) -> None:
    """The last one has enough of it, and no window that is whole."""
    with pytest.raises(ValueError, match=r"900 tokens of text are needed, .* a window of 100 .* got \d+ in 0 such"):
        texts.split(documents, Characters(), n_tokens=700, length=100, n_test=4)


def test_text_that_is_only_measured_on_need_be_no_longer_than_a_window() -> None:
    parts = texts.split(documents_of(99), Characters(), n_tokens=0, length=100, n_test=4)
    assert (parts.fit, parts.tune, len(parts.test)) == ([], [], 1)


def test_windows_are_opened_as_the_tokenizer_opens_texts() -> None:
    for opening in [(), (BOS,), (BOS, BOS + 1)]:
        parts = texts.split(documents_of(3000), Characters(opening), n_tokens=500, length=100, n_test=2)
        assert {tuple(window.token_ids[: len(opening)]) for window in parts.fit} == {opening}


def test_the_corpus_that_ships_with_us_is_text_of_several_kinds_and_small() -> None:
    documents = texts.read()
    assert len(documents) > 30
    assert 300_000 < sum(len(document.encode()) for document in documents) < 400_000
    assert min(map(len, documents)) > 1000


def test_what_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    for content, reason in [(b"\xff\xfe\x00", "is not text in UTF-8"), (b"a\0b", "zero bytes")]:
        path = tmp_path / "noise.bin"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"noise.bin.*{reason}"):
            texts.read([path])
    with pytest.raises(FileNotFoundError):
        texts.read([tmp_path / "absent"])
