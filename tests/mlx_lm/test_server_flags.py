"""The command line of our server: its own flags, and mlx-lm's."""

import re
import subprocess
import sys

import pytest
from support import REFERENCE_MODEL, ROOT_DIR

MANUAL = ROOT_DIR / "clients/mlx_lm/README.md"


def run_module(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvcached_mlx.server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_help_shows_our_flags_as_the_manual_does_and_all_of_mlx_lm() -> None:
    result = run_module("--help")
    assert result.returncode == 0
    ours, theirs = result.stdout.split("all flags of mlx_lm.server:")
    flags = set(re.findall(r"^  (--[\w-]+)", ours, re.MULTILINE))
    assert flags == set(re.findall(r"^\| `(--[\w-]+)`", MANUAL.read_text(), re.MULTILINE))
    assert {"--namespace", "--offload-turns", "--target"} < flags
    for flag in ("--prompt-cache-size", "--prompt-cache-bytes", "--prefill-step-size", "--adapter-path"):
        assert flag in theirs


WRONG = [
    ("--nonsense",),
    ("--offload-queue-bytes", "many"),
    ("--offload-queue-bytes", "-1"),
    ("--target", f"unix:/{'x' * 200}"),
]


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_wrong_flags_are_refused(flags: tuple[str, ...]) -> None:
    result = run_module("--model", str(REFERENCE_MODEL), *flags)
    assert result.returncode == 2
    assert flags[0] in result.stderr
