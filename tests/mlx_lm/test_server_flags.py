"""The command line of our server: its own flags, and mlx-lm's."""

import re
import subprocess
import sys

import pytest
from support import REFERENCE_MODEL, ROOT_DIR

from kvcached_client.protocol import check_am_ratio
from kvcached_mlx.server import parse

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
    ("--floor", "lossy"),
    ("--fidelity", "compacted-x32"),
    ("--am-ratio", "4"),  # of nothing
]
BAD_RATIOS = ("0", "-1", "0.5", "8.01", "nan", "inf", "four")


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_wrong_flags_are_refused(flags: tuple[str, ...]) -> None:
    result = run_module("--model", str(REFERENCE_MODEL), *flags)
    assert result.returncode == 2
    assert flags[0] in result.stderr


@pytest.mark.parametrize("ratio", BAD_RATIOS)
def test_a_bad_ratio_is_refused_as_at_every_other_door(ratio: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="am_ratio must be") as refusal:
        check_am_ratio(ratio)
    with pytest.raises(SystemExit):
        parse(["--fidelity", "compacted-x8", f"--am-ratio={ratio}"])
    assert str(refusal.value) in capsys.readouterr().err


def test_compaction_is_asked_for_by_flags() -> None:
    options, others = parse(["--floor", "compacted", "--fidelity", "compacted-x16", "--am-ratio", "2.5", "--port", "1"])
    assert (options.floor, options.fidelity, options.am_ratio) == ("compacted", "compacted-x16", 2.5)
    assert others == ["--port", "1"]
    assert parse([])[0].am_ratio == 0
