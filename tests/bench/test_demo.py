"""When the demo says that it failed."""

from typing import Any

import pytest
from demo import problems

EXACT: dict[str, Any] = {"identical": True, "computed_tokens": 256}
LOSSY: dict[str, Any] = {"identical": False, "computed_tokens": 384, "fidelity": "x8", "fidelities": ["x8"]}


@pytest.mark.parametrize("result", [EXACT, LOSSY])
def test_what_goes_as_it_must_has_no_problems(result: dict[str, Any]) -> None:
    assert not problems(result)


@pytest.mark.parametrize(
    ("result", "changed", "problem"),
    [
        (EXACT, {"identical": False}, "the continuation is not the one"),
        (EXACT, {"computed_tokens": 257}, "257 tokens were computed again, more than 256"),
        (LOSSY, {"computed_tokens": 385}, "385 tokens were computed again, more than 384"),
        (LOSSY, {"fidelities": ["exact", "x8"]}, "were to be restored as x8, and are exact, x8"),
        (LOSSY, {"fidelities": []}, "were to be restored as x8, and are "),
    ],
)
def test_what_does_not_is_told(result: dict[str, Any], changed: dict[str, Any], problem: str) -> None:
    (found,) = problems(result | changed)
    assert problem in found
