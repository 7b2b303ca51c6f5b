"""kvcachedctl bundles, calibrate and bench as their users run them, with an engine that runs no model."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from bundles import low_rank_chain, make_bundle
from click.testing import CliRunner, Result
from humanize import naturalsize
from impostors import impostor
from support import DaemonProcess, tiny_spec

from kvcached import ctl_engines
from kvcached.codec.bundle import PROFILES
from kvcached.ctl import main
from kvcached_client._proto import kvcached_pb2 as pb

CTL = Path(sys.executable).with_name("kvcachedctl")
MEASURED = pb.Measured(
    bits_per_value=1.96,
    compression=8.13,
    kl=0.00123,
    kl_low=0.00101,
    kl_high=0.00149,
    perplexity_delta=0.31,
    perplexity_delta_low=-0.12,
    perplexity_delta_high=0.75,
    attention_error_mean=0.0412,
    attention_error_worst=0.0934,
    n_tokens=24576,
    n_documents=16,
    engine="fake 1",
)
CURRENT = pb.BundleStatus(
    bundle_id=bytes(range(0xA0, 0xC0)),
    model_id=b"m" * 32,
    model_name="a model with [red]a name[/] as long as they are",
    layers_per_group=7,
    bytes=3 << 20,
    installed=1_700_000_000_000_000,
    n_blocks=1234,
    current=True,
    profiles=[
        pb.ProfileStatus(name="x8", target_compression=8, measured=MEASURED),
        pb.ProfileStatus(name="x16", target_compression=16),
    ],
)
OLD = pb.BundleStatus(
    bundle_id=b"\xa0\xa1" + bytes(30), model_name="gone", profiles=[pb.ProfileStatus(name="x32", target_compression=32)]
)
# An engine that writes down what it is asked, and answers so that it can be seen.
ENGINE = """
import json, os, sys
from pathlib import Path
from kvcached_client import DaemonError
from kvcached_client._proto import kvcached_pb2 as pb

def note(what, model, progress, **asked):
    if model == "short":
        raise ValueError("the text has 12 tokens, at least 4096 are needed")
    if model == "refused":
        raise DaemonError("FAILED_PRECONDITION", "the bundle is of another model")
    asked["texts"] = [str(path) for path in asked["texts"]]
    Path(os.environ["NOTES"]).write_text(json.dumps({"what": what, "model": model, **asked}))
    for done in range(3):
        progress("running [the] model", done, 2)
    progress("measuring x8", 1, 1)

def calibrate(model, **asked):
    note("calibrate", model, **asked)
    return pb.BundleStatus(bundle_id=bytes(range(0xA0, 0xC0)), model_id=b"m" * 32, model_name=model)

def evaluate(model, **asked):
    note("evaluate", model, **asked)
    return {"x8": pb.Measured(bits_per_value=1.96, compression=8.13, kl=0.00123, n_tokens=24576)}
"""


def ctl(target: str, *arguments: Any, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """kvcachedctl in a pipe. path: where an engine is installed."""
    environment = {**os.environ, "COLUMNS": "80"} | (
        {"PYTHONPATH": str(path), "NOTES": str(path / "notes")} if path else {}
    )
    command = [str(CTL), "--target", target, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def answering(message: Any) -> Callable[..., bytes]:
    return lambda _request, _context: message.SerializeToString()


@pytest.fixture
def target() -> Iterator[str]:
    """A daemon that has two bundles, and whose status is asked before an engine is loaded."""
    listed = pb.ListBundlesResponse(bundles=[CURRENT, OLD])
    with impostor(ListBundles=answering(listed), Status=answering(pb.StatusResponse())) as target:
        yield target


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A directory with an engine called fake, as pip would install it."""
    (tmp_path / "fake_engine.py").write_text(ENGINE)
    about = tmp_path / "fake_engine-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-engine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[kvcached.engines]\nfake = fake_engine\n")
    return tmp_path


def words(text: str) -> str:
    return " ".join(text.split())


# ---- bundles


def test_bundles_says_of_each_profile_what_was_measured(target: str) -> None:
    result = ctl(target, "bundles")
    assert result.returncode == 0, result.stderr
    header = "profile compression (target) bits per value KL (95 %) perplexity (95 %) attention (worst) tokens"
    assert [words(line) for line in result.stdout.splitlines()] == [
        "a0a1a2a3a4a5 a model with [red]a name[/] as long as they are: 3.0 MiB, 1,234 blocks in use, current",
        header,
        "x8 8.1x (8x) 1.96 0.0012 (0.001..0.0015) +0.31% (-0.12..+0.75) 0.041 (0.093) 24,576",
        "x16 - (16x) not measured",
        "a0a100000000 gone (not registered): 0 Bytes, 0 blocks in use",
        header,
        "x32 - (32x) not measured",
    ]


def test_bundles_as_json_has_the_fields_of_the_protocol(target: str) -> None:
    listed = json.loads(ctl(target, "bundles", "--json").stdout)["bundles"]
    assert [bundle["bundle_id"] for bundle in listed] == [CURRENT.bundle_id.hex(), OLD.bundle_id.hex()]
    assert [bundle["current"] for bundle in listed] == [True, False]
    assert listed[0]["n_blocks"] == 1234
    assert listed[0]["profiles"][0]["measured"]["kl_high"] == 0.00149
    assert listed[0]["profiles"][0]["measured"]["n_tokens"] == 24576
    assert "measured" not in listed[0]["profiles"][1]


def test_without_bundles_it_says_how_to_make_one() -> None:
    with impostor(ListBundles=answering(pb.ListBundlesResponse())) as target:
        result = ctl(target, "bundles")
        assert json.loads(ctl(target, "bundles", "--json").stdout) == {"bundles": []}
    assert (result.returncode, result.stderr) == (0, "")
    assert "no bundle is installed" in result.stdout
    assert "kvcachedctl calibrate MODEL" in result.stdout


@pytest.mark.parametrize(
    ("bundle_id", "message"),
    [
        ("b", "no bundle's id begins with 'b': `kvcachedctl bundles` lists them"),
        ("", "no bundle's id begins with ''"),
        ("a0A1", f"the ids of 2 bundles begin with 'a0A1': {CURRENT.bundle_id.hex()}, {OLD.bundle_id.hex()}"),
    ],
)
def test_an_id_that_is_not_one_bundles_is_refused(target: str, bundle_id: str, message: str) -> None:
    result = ctl(target, "bundles", "remove", bundle_id)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr


def test_exit_codes_tell_usage_from_absence() -> None:
    nobody = "127.0.0.1:1"
    assert ctl(nobody, "bundles", "nonsense").returncode == 2
    assert ctl(nobody, "calibrate").returncode == 2
    for command in (["bundles"], ["bundles", "remove", "a0"], ["bundles", "install", __file__]):
        result = ctl(nobody, *command)
        assert (result.returncode, result.stdout) == (3, "")
        assert f"no daemon answers on {nobody}" in result.stderr


def test_a_file_that_cannot_be_read_is_not_installed(target: str, tmp_path: Path) -> None:
    result = ctl(target, "bundles", "install", tmp_path / "absent")
    assert result.returncode == 1
    assert f"No such file or directory: '{tmp_path / 'absent'}'" in result.stderr


def test_a_bundle_is_installed_shown_and_removed_with_its_blocks(daemon: DaemonProcess, tmp_path: Path) -> None:
    spec = tiny_spec(block_size=16)
    bundle, file = make_bundle(spec, measured=["x8"]), tmp_path / "bundle.safetensors"
    file.write_bytes(bundle.pack())
    with daemon.client(spec) as client:
        client.match([])
        installed = ctl(daemon.target, "bundles", "install", file)
        assert installed.returncode == 0, installed.stderr
        blocks = low_rank_chain(client, range(48))
        assert [result.code for result in client.put(blocks)] == ["OK"] * 3
    shown, bundle_id = ctl(daemon.target, "bundles").stdout, bundle.bundle_id.hex()
    about = f"{bundle_id[:12]} tiny: {naturalsize(len(bundle.pack()), binary=True)}"
    assert f"{about}, 0 blocks in use, current" in words(installed.stdout)
    assert f"{about}, 3 blocks in use, current" in words(shown)
    assert "near-lossless - (4x) not measured" in words(shown)
    target = PROFILES["x8"]
    assert f"x8 {target:.1f}x ({target:g}x) 0.00 0.01" in words(shown)
    refused = ctl(daemon.target, "bundles", "remove", bundle_id[:8])
    assert refused.returncode == 1
    assert f"3 blocks cannot be read without bundle {bundle_id}" in refused.stderr
    assert "With --with-blocks they are deleted too" in refused.stderr
    removed = ctl(daemon.target, "bundles", "remove", bundle_id[:8].upper(), "--with-blocks")
    assert (removed.returncode, removed.stdout) == (0, f"removed: {bundle_id}, and 3 blocks with it\n")
    assert "no bundle is installed" in ctl(daemon.target, "bundles").stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "INVALID_ARGUMENT: the first piece says total_bytes"),
        (b"nonsense" * 300_000, "INVALID_ARGUMENT: not a"),
        (make_bundle(tiny_spec(weights="other")).pack(), "FAILED_PRECONDITION: "),
    ],
    ids=["empty", "nonsense", "another model's"],
)
def test_a_file_that_is_no_bundle_for_us_is_refused(
    shared_daemon: DaemonProcess, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "bundle"
    file.write_bytes(content)
    result = ctl(shared_daemon.target, "bundles", "install", file)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"refused: {message}" in result.stderr


# ---- engines


def test_calibrate_passes_on_all_that_was_asked_and_shows_the_bundle(target: str, engine: Path) -> None:
    texts = [engine / "a.txt", engine / "b.txt"]
    for path in texts:
        path.write_text("Grüße, 世界\n")
    asked = [
        "--tokens",
        5000,
        "--layers-per-group",
        4,
        "--seed",
        3,
        "--budgets",
        "entropy",
        "--profiles",
        "x16",
        "x8",
        "--text",
        *texts,
    ]
    result = ctl(target, "calibrate", "a/model", "--engine", "fake", *asked, path=engine)
    assert result.returncode == 0, result.stderr
    assert json.loads((engine / "notes").read_text()) == {
        "what": "calibrate",
        "budgets": "entropy",
        "model": "a/model",
        "target": target,
        "texts": [str(path) for path in texts],
        "n_tokens": 5000,
        "profiles": ["x8", "x16"],
        "layers_per_group": 4,
        "seed": 3,
    }
    assert result.stderr == "running [the] model ..\nmeasuring x8 ..\n"
    assert "a0a1a2a3a4a5" in result.stdout
    assert "a/model" in result.stdout


def test_calibrate_has_usual_choices(target: str, engine: Path) -> None:
    assert ctl(target, "calibrate", "m", "--engine", "fake", path=engine).returncode == 0
    asked = json.loads((engine / "notes").read_text())
    assert (asked["texts"], asked["profiles"], asked["layers_per_group"], asked["seed"]) == ([], [], 0, 0)
    assert asked["n_tokens"] >= 8192


def test_bench_shows_what_is_lost_and_writes_it(target: str, engine: Path) -> None:
    output = engine / "figures.json"
    result = ctl(target, "bench", "m", "--engine", "fake", "--json", output, path=engine)
    assert result.returncode == 0, result.stderr
    assert "x8 8.1x 1.96 0.0012 (0..0) +0.00% (+0.00..+0.00) - 24,576" in words(result.stdout)
    figures = json.loads(output.read_text())
    assert figures["model"] == "m"
    assert figures["profiles"]["x8"]["kl"] == 0.00123
    assert figures["profiles"]["x8"]["n_tokens"] == 24576
    assert "attention_error_mean" not in figures["profiles"]["x8"]  # which nobody measured


def test_figures_that_could_not_be_written_are_not_measured(target: str, engine: Path) -> None:
    result = ctl(target, "bench", "m", "--engine", "fake", "--json", engine / "absent/figures.json", path=engine)
    assert result.returncode == 1
    assert f"there is no directory {engine / 'absent'}" in result.stderr
    assert not (engine / "notes").exists()


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_what_an_engine_complains_of_is_shown_as_it_is(target: str, engine: Path, command: str) -> None:
    result = ctl(target, command, "short", "--engine", "fake", path=engine)
    assert (result.returncode, result.stderr) == (1, "the text has 12 tokens, at least 4096 are needed\n")
    result = ctl(target, command, "refused", "--engine", "fake", path=engine)
    assert result.returncode == 1
    assert "refused: FAILED_PRECONDITION: the bundle is of another model" in result.stderr


BAD_TEXTS = {
    "empty": (b"", "is empty: text was expected"),
    "blank": (b" \n\t\n", "is empty: text was expected"),
    "not UTF-8": (b"text " * 300_000 + b"\xff", "is not text in UTF-8: invalid start byte"),
    "cut": ("世".encode()[:2], "is not text in UTF-8: unexpected end of data"),
    "zeros": (b"a\0b", "is not text: it has zero bytes"),
    "absent": (None, "cannot be read: No such file or directory"),
}


@pytest.mark.parametrize("command", ["calibrate", "bench"])
@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_text_that_is_none_is_refused_before_anything_is_loaded(
    tmp_path: Path, command: str, content: bytes | None, message: str
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("text")
    if content is not None:
        bad.write_bytes(content)
    result = in_process(command, "m", "--text", good, bad)
    assert (result.exit_code, result.output) == (1, f"{bad} {message}\n")
    directory = in_process(command, "m", "--text", tmp_path)
    assert (directory.exit_code, directory.output) == (1, f"{tmp_path} cannot be read: Is a directory\n")


def in_process(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["--target", "127.0.0.1:1", *map(str, arguments)])


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_an_unknown_profile_is_refused_before_anything_is_loaded(command: str) -> None:
    result = in_process(command, "m", "--profiles", "x8", "x9")
    assert (result.exit_code, result.output) == (1, "profiles are near-lossless, x8, x16, x32, got x9\n")


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        ([], [], "no engine is installed that could run a model: pip install kvcached-mlx"),
        (["b", "a"], [], "several engines are installed, choose one with --engine: a, b"),
        (["b", "a"], ["--engine", "c"], "no engine 'c' is installed, there is a, b"),
        (["broken"], [], "the engine 'broken' cannot be loaded: No module named 'no_such_module'"),
    ],
    ids=["none", "several", "unknown", "broken"],
)
def test_an_engine_that_cannot_be_had_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], arguments: list[str], message: str
) -> None:
    found = EntryPoints(EntryPoint(name, "no_such_module", ctl_engines.ENGINES) for name in installed)
    monkeypatch.setattr(ctl_engines, "entry_points", lambda group: found.select(group=group))
    result = in_process("calibrate", "m", *arguments)
    assert (result.exit_code, result.output) == (1, f"{message}\n")


def test_no_daemon_is_noticed_before_a_model_is_loaded(engine: Path) -> None:
    result = ctl("127.0.0.1:1", "calibrate", "m", "--engine", "fake", path=engine)
    assert result.returncode == 3
    assert not (engine / "notes").exists()


def test_a_terminal_shows_a_bar_for_each_thing_that_is_done(target: str, engine: Path) -> None:
    screen, side = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(engine), "NOTES": str(engine / "notes"), "TERM": "xterm"}
    command = [str(CTL), "--target", target, "bench", "m", "--engine", "fake"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, env=environment, timeout=60)
    os.close(side)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 1 << 16)
        except OSError:  # all was read
            break
    os.close(screen)
    assert result.returncode == 0
    assert b"running [the] model" in shown
    assert b"2/2" in shown
    assert b"24,576" in result.stdout
