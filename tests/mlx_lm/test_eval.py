"""kvcachedctl eval, whole: the reference model, files, a real daemon and back. Tiny, for it is the road that counts."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bundles import install
from click.testing import CliRunner, Result
from compacting import make_compacting
from support import REFERENCE_MODEL, DaemonProcess

from kvcached.ctl import main
from kvcached_client import Connection
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_mlx.loss import Course, measure
from kvcached_mlx.road import Engine, Wish, bundle_of, load
from kvcached_mlx.texts import Window

PROBLEM = {"question": "What is 1 and 1?", "answer": "1 and 1 is 2. " * 30 + "\n#### 2"}
SEARCH = {"question": "Who?", "answers": ["Ada"], "ctxs": [{"title": "T", "text": "Ada wrote programs. " * 60}]}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(str(REFERENCE_MODEL))


def calibrated(daemon: DaemonProcess, engine: Engine, bound: float = 1e6) -> None:
    """As far as the road goes: what this bundle loses does not matter. bound: of compaction's error."""
    with Connection(daemon.target) as connection:
        connection.call("RegisterModel", pb.RegisterModelRequest(spec=engine.spec.to_proto()), 10.0)
    install(daemon, make_compacting(engine.spec, bound=bound))


def ctl(daemon: DaemonProcess | None, *arguments: object) -> Result:
    target = daemon.target if daemon else "127.0.0.1:1"
    asked = ["--target", target, "eval", str(REFERENCE_MODEL), *map(str, arguments)]
    return CliRunner().invoke(main, asked)


def rows_of(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads(file.read_text())["rows"]
    return {(row["task"], row["fidelity"]): row for row in rows}


def written(path: Path, row: dict[str, Any], n: int) -> Path:
    path.write_text(f"{json.dumps(row)}\n" * n)
    return path


def test_tasks_are_run_on_what_comes_back_and_vanilla_is_beside_it(
    daemon: DaemonProcess, engine: Engine, tmp_path: Path
) -> None:
    calibrated(daemon, engine)
    asked = ["--tasks", "perplexity,needle", "--fidelity", "exact,x8,compacted-x8", "--am-ratio", 2]
    result = ctl(daemon, *asked, "--tokens", 512, "--limit", 1, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out.json")
    fidelities = ["vanilla", "exact", "x8", "compacted-x8"]
    assert list(rows) == [(task, fidelity) for task in ("perplexity", "needle") for fidelity in fidelities]
    for task in ("perplexity", "needle"):
        vanilla, exact, coded, compacted = (rows[task, fidelity] for fidelity in fidelities)
        assert (vanilla["n_asked"], vanilla["delta"]) == (0, None)
        assert (exact["value"], exact["delta"], exact["restored_tokens"]) == (vanilla["value"], 0, 512)
        assert (exact["n_as_asked"], exact["n_asked"], exact["came_as"]) == (2, 2, {"exact": 2})
        assert (coded["n_as_asked"], coded["n_asked"], coded["came_as"]) == (2, 2, {"x8": 2})
        assert coded["restored_tokens"] == 512 + 1 - 128
        assert (compacted["n_as_asked"], compacted["n_asked"]) == (1, 1)  # a block is used whole or not at all
        assert compacted["came_as"] == {"compacted-x8": 1}
        assert compacted["active_bytes_per_token"] < 0.75 * exact["active_bytes_per_token"]
    assert rows["needle", "vanilla"]["value"] == 1  # the reference model can do that
    assert rows["perplexity", "exact"]["kl"] == 0
    assert rows["perplexity", "x8"]["kl"] > 0
    assert rows["perplexity", "vanilla"]["low"] <= rows["perplexity", "vanilla"]["value"]
    assert [word in result.stdout for word in ("vanilla", "2 of 2", "compacted-x8")] == [True] * 3
    assert daemon.status().store.n_blocks == 0


def test_tasks_of_files_go_the_same_road(daemon: DaemonProcess, tmp_path: Path) -> None:
    subject = tmp_path / "logic_test.csv"
    subject.write_text(f"{'What is true of this? ' * 20},one,two,three,four,B\n" * 3)
    files = {
        "gsm8k": written(tmp_path / "g.jsonl", PROBLEM, 3),
        "mmlu": subject,
        "litm": written(tmp_path / "l.jsonl", SEARCH, 1),
    }
    data = [f"--data={name}={path}" for name, path in files.items()]
    asked = ["--tasks", "gsm8k,mmlu,litm", "--fidelity", "exact", "--limit", 1, "--shots", 2, *data]
    result = ctl(daemon, *asked, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out.json")
    for task in files:
        assert rows[task, "exact"]["delta"] == 0
        assert rows[task, "exact"]["n_as_asked"] == rows[task, "exact"]["n_asked"] >= 1
        assert rows[task, "exact"]["n"] == 1


def test_a_fallback_is_told(daemon: DaemonProcess, engine: Engine, tmp_path: Path) -> None:
    calibrated(daemon, engine, bound=1e-6)  # any compaction would lose too much
    asked = ["--tasks", "needle", "--fidelity", "compacted-x8", "--limit", 1, "--tokens", 512]
    result = ctl(daemon, *asked, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    row = rows_of(tmp_path / "out.json")["needle", "compacted-x8"]
    assert (row["n_as_asked"], row["n_asked"]) == (0, 1)
    assert "compacted-x8" not in row["came_as"]
    assert "needle, compacted-x8: 0 of 1 blocks came back as asked (2 as x8)" in result.stderr


def test_prompts_that_are_too_short_for_a_block_are_told(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = written(tmp_path / "g.jsonl", {"question": "1?", "answer": "#### 1"}, 2)
    asked = ["--tasks", "gsm8k", "--data", f"gsm8k={file}", "--shots", 1, "--fidelity", "exact", "--limit", 1]
    result = ctl(daemon, *asked)
    assert result.exit_code == 0, result.output
    assert "gsm8k, exact: nothing was restored, all of its prompts are too short" in result.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ["--tasks", "needles"],
            "tasks are perplexity, needle, multikey, tracking, gsm8k, mmlu, litm and lm-eval:NAME",
        ),
        (["--tasks", "lm-eval:"], "got 'lm-eval:'"),
        (["--tasks", "needle,needle"], "each once, got 'needle,needle'"),
        (
            ["--fidelity", "x9"],
            "fidelities are exact, near-lossless, x8, x16, x32, compacted-x8, compacted-x16, got 'x9'",
        ),
        (["--am-ratio", "four"], "am_ratio must be a number from 1 to 8, got 'four'"),
        (["--am-ratio", "8.01"], "am_ratio must be a number from 1 to 8, got '8.01'"),
        (["--am-ratio", "nan"], "am_ratio must be a number from 1 to 8, got 'nan'"),
        (["--data", "needle=x"], "TASK=PATH expected, each task once, of gsm8k, mmlu, litm, lm-eval; got 'needle=x'"),
        (["--limit", "0"], "0 is not in the range"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(asked: list[str], message: str) -> None:
    result = ctl(None, *asked)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_files_that_are_missing_are_missed_before_a_model_is_loaded(tmp_path: Path) -> None:
    for asked, message in (
        (["--tasks", "gsm8k"], "gsm8k is read from a file, and none was given: --data gsm8k=PATH"),
        (["--tasks", "litm", "--data", f"litm={tmp_path}/no"], f"the file of litm is not there: {tmp_path}/no"),
        (["--json", f"{tmp_path}/no/out.json"], "cannot be written: there is no directory"),
        (["--text", f"{tmp_path}/no.txt"], "cannot be read: No such file or directory"),
    ):
        result = ctl(None, *asked)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr


def test_a_bad_line_of_a_file_is_named_and_a_model_without_a_bundle_too(daemon: DaemonProcess, tmp_path: Path) -> None:
    file = tmp_path / "g.jsonl"
    file.write_text("nonsense\n")
    result = ctl(daemon, "--tasks", "gsm8k", "--data", f"gsm8k={file}")
    assert (result.exit_code, f"{file}:1: a line of JSON expected, got 'nonsense" in result.stderr) == (1, True)
    result = ctl(daemon, "--tasks", "needle", "--fidelity", "x8")
    assert (result.exit_code, "cannot be stored as x8, it has no bundle: calibrate it first" in result.stderr) == (
        1,
        True,
    )


def test_text_that_is_too_short_is_refused(daemon: DaemonProcess) -> None:
    result = ctl(daemon, "--tasks", "needle", "--fidelity", "exact", "--tokens", 1500)
    assert result.exit_code == 1
    assert "1500 are needed: give some with --text" in result.stderr


def test_without_lm_eval_its_tasks_are_refused_by_name(daemon: DaemonProcess) -> None:
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-eval is installed here")
    result = ctl(daemon, "--tasks", "lm-eval:arc_easy", "--fidelity", "exact")
    assert result.exit_code == 1
    assert "lm-eval:NAME needs the package lm-eval, which cannot be used here" in result.stderr


class _Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def _fake_lm_eval(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    """As little of the package as mlx-lm and we use: one task, of one choice and one text."""

    class Manager:
        all_tasks = ("made_up",)

        def __init__(self, include_path: str | None = None) -> None:
            asked.append(include_path)

    def simple_evaluate(model: Any, tasks: list[str], limit: int, **_: Any) -> dict[str, Any]:
        context = "The sqlite3 module. " * 120
        scores = model.loglikelihood([_Request(context, " The"), _Request(context, " zebra, and more")])
        (text,) = model.generate_until([_Request(context, {"until": ["."], "max_gen_toks": 6})])
        asked.append((tasks, limit, text))
        figures = {"alias": "made up", "acc,none": float(scores[0][0] > scores[1][0]), "acc_stderr,none": 0.1}
        figures["score,none"], figures["score_stderr,none"] = scores[1][0], "N/A"
        return {"results": {"made_up": figures}, "n-samples": {"made_up": {"effective": 2}}}

    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    }
    modules["lm_eval.tasks"] = ModuleType("lm_eval.tasks")
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    modules["lm_eval.api.model"].LM = type("LM", (), {})  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = lambda *_: lambda kind: kind  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("mlx_lm.evaluate", "kvcached_mlx.harness"):
        monkeypatch.setitem(sys.modules, name, None)  # whatever is there in the end, nothing of this stays
        monkeypatch.delitem(sys.modules, name)


def test_the_harness_of_mlx_lm_reads_on_from_what_comes_back(
    daemon: DaemonProcess, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(daemon, engine)
    asked: list[Any] = []
    _fake_lm_eval(monkeypatch, asked)
    task = ["--tasks", "lm-eval:made_up", "--data", f"lm-eval={tmp_path}", "--limit", 3]
    result = ctl(daemon, *task, "--fidelity", "exact,compacted-x8", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    figures = {(row["fidelity"], row["metric"]): row for row in rows}
    assert len(figures) == len(rows) == 3 * 2
    assert {row["task"] for row in rows} == {"lm-eval:made_up"}
    assert asked[0] == str(tmp_path)
    assert asked[1][:2] == (["made_up"], 3)
    assert asked[1] == asked[3]  # vanilla's text, and that of exact
    vanilla, exact, compacted = (figures[name, "score"] for name in ("vanilla", "exact", "compacted-x8"))
    assert (exact["delta"], exact["value"], exact["low"]) == (0, vanilla["value"], None)
    assert compacted["value"] != vanilla["value"]
    assert exact["n_as_asked"] == exact["n_asked"] >= 2
    assert compacted["came_as"].keys() == {"compacted-x8"}
    accuracy = figures["exact", "acc"]
    assert accuracy["high"] - accuracy["low"] == pytest.approx(2 * 1.96 * 0.1)
    result = ctl(daemon, "--tasks", "lm-eval:other", "--fidelity", "exact")
    assert "lm-eval has 1 tasks, and none is called 'other'" in result.stderr


def test_a_loss_is_measured_on_compacted_blocks_too_computed_anew_in_whole_blocks(
    daemon: DaemonProcess, engine: Engine
) -> None:
    calibrated(daemon, engine)
    with Connection(daemon.target) as connection:
        bundle = bundle_of(connection, engine.spec.model_id)
    assert bundle
    token_ids = engine.tokenizer.encode("The sqlite3 module. It has many functions. " * 60)[:545]
    course = Course(prefix=512, continued=32, recomputed=128)
    with daemon.client(engine.spec, "loss") as client:
        wishes = [Wish("exact"), Wish("compacted-x8", 2.0)]
        window = Window(0, 0, token_ids)
        exact, compacted = measure(engine, client, bundle.bundle_id, wishes, [window], course)
    assert (exact.mean_kl().value, compacted.mean_kl().value > 0) == (0, True)
    assert compacted.source_bytes == exact.source_bytes
    assert compacted.stored_bytes < exact.stored_bytes / 1.5
    assert daemon.status().store.n_blocks == 0
