"""The documents are true: their programs run, their tables are the latest results, their links lead somewhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT_DIR, DaemonProcess
from tables import DOCUMENTS, RESULTS, filled

from kvcached.codec import bundle, container

README = (ROOT_DIR / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("program", PROGRAMS, ids=["mlx-lm", "any program"])
def test_the_programs_in_the_readme_run(program: str, daemon: DaemonProcess) -> None:
    environment = {**os.environ, "KVCACHED_SOCKET_PATH": str(daemon.socket)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT_DIR, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert "failed" not in result.stderr
    counters = daemon.status().counters
    assert counters["lookup_hit_tokens_total"] >= 256
    assert counters['block_hits_total{fidelity="EXACT"}'] >= 1


@pytest.mark.parametrize(
    ("document", "n_rows"), list(zip(DOCUMENTS, (20, 15, 40), strict=True)), ids=lambda x: str(x)[-10:]
)
def test_the_tables_in_documents_are_the_latest_results(document: Path, n_rows: int) -> None:
    text = document.read_text()
    assert filled(text) == text
    assert text.count("\n| ") > n_rows


def test_the_results_say_how_they_were_made() -> None:
    assert json.loads((RESULTS / "first_light.json").read_text())["command"] == "make bench"
    assert json.loads((RESULTS / "codec.json").read_text())["command"] == "make bench-codec"


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/architecture.md",
        "docs/format.md",
        "docs/performance.md",
        "docs/quality.md",
        "CHANGELOG.md",
    ],
)
def test_every_file_that_a_document_names_is_there(document: str) -> None:
    text = (ROOT_DIR / document).read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    paths = re.findall(r"`((?:docs|tests|bench|kvcached|clients|proto)/[\w./-]+)`", text)
    for named in [*links, *paths]:
        base = Path(document).parent if named in links else Path()
        assert (ROOT_DIR / base / named).exists(), named


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT_DIR / "docs/architecture.md").read_text()
    package = ROOT_DIR / "kvcached"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")} - {"__init__.py", "__main__.py"}
    missing = {name for name in modules if f"`{name}`" not in text and name not in LEAVES}
    assert missing == set()


LEAVES = {"config.py", "metrics.py", "sockets.py"}  # drawn in the picture, and what their names say


def test_the_format_document_has_the_sizes_of_the_code() -> None:
    text = (ROOT_DIR / "docs/format.md").read_text()
    assert f"## Header: {container._HEADER.size} bytes" in text
    assert f"## Record: {container._RECORD.size} bytes" in text
    assert " ".join(f"{byte:02X}" for byte in container.MAGIC) in text
    assert f"| {container.VERSION} | 0.1.0 |" in text
    assert f"| `format` | `{bundle.FORMAT}`; with `compaction`, `{bundle.COMPACTING_FORMAT}` |" in text
    assert f"above {bundle.MAX_BYTES >> 30} GiB and headers above {bundle._MAX_HEADER_BYTES >> 20} MiB" in text
    for kind in container.SectionKind:
        assert f"| {kind} {kind.name} |" in text
    for profile in bundle.PROFILES:
        assert f"`{profile}`" in text
