"""The daemon as a service: files that launchd and systemd read, and a real systemd that runs it."""

import os
import plistlib
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT_DIR

from kvcached import autostart
from kvcached.autostart import Agent, Unit
from kvcached.config import Config

CTL = Path(sys.executable).with_name("kvcachedctl")
COMMAND = ("/opt/kvcached/bin/python", "-m", "kvcached")
DRAIN_SECONDS = float(Config().drain_seconds)
MAC = Agent(COMMAND, DRAIN_SECONDS, Path("/Users/you"))
LINUX = Unit(COMMAND, DRAIN_SECONDS, Path("/home/you/.config"))


def test_the_plist_says_what_launchd_needs_to_know() -> None:
    plist = plistlib.loads(MAC.text().encode())
    assert str(MAC.path) == "/Users/you/Library/LaunchAgents/io.kvcached.daemon.plist"
    assert plist["Label"] == MAC.path.stem
    assert plist["ProgramArguments"][:3] == list(COMMAND)
    assert plist["ProgramArguments"][3:] == ["--log-file", "/Users/you/Library/Logs/kvcached/kvcached.log"]
    assert (plist["RunAtLoad"], plist["KeepAlive"]) == (True, {"SuccessfulExit": False})
    assert plist["ThrottleInterval"] == 10
    assert plist["ProcessType"] == "Standard"
    assert plist["ExitTimeOut"] > DRAIN_SECONDS
    assert plist["SoftResourceLimits"] == {"NumberOfFiles": 4096}
    assert plist["Umask"] == 63
    for key in ("WorkingDirectory", "StandardOutPath", "StandardErrorPath"):
        assert Path(plist[key]).is_absolute()
        assert not re.search(r"[~$]", plist[key])


def test_a_longer_drain_gives_a_longer_time_to_stop() -> None:
    plist = plistlib.loads(Agent(COMMAND, 120.0, Path("/Users/you")).text().encode())
    assert plist["ExitTimeOut"] == 140
    assert "TimeoutStopSec=140\n" in Unit(COMMAND, 120.0, Path("/home/you")).text()


@pytest.mark.parametrize(
    ("service", "file"),
    [(MAC, "launchd/io.kvcached.daemon.plist"), (LINUX, "systemd/kvcached.service")],
    ids=["launchd", "systemd"],
)
def test_the_files_in_deploy_are_what_install_writes(service: Agent | Unit, file: str) -> None:
    assert (ROOT_DIR / "deploy" / file).read_text() == service.text()
    assert Path(file).name == service.path.name


def test_paths_with_odd_characters_stay_one_argument_for_systemd() -> None:
    text = Unit((r"/opt/a b/50%/$HOME/\x/"[:-1] + '/"py"', "-m", "kvcached"), 10.0, Path("/home/you")).text()
    assert r'ExecStart=:"/opt/a b/50%%/$HOME/\\x/\"py\"" "-m" "kvcached"' in text


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd is not installed (Debian: apt install systemd)"
)
def test_systemd_itself_accepts_the_unit(tmp_path: Path) -> None:
    unit = Unit((sys.executable, "-m", "kvcached"), DRAIN_SECONDS, tmp_path)
    unit.path.parent.mkdir(parents=True)
    unit.path.write_text(unit.text())
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "verify", "--user", "--man=no", str(unit.path)]
    verified = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    complaints = [line for line in verified.stderr.splitlines() if "kvcached" in line]
    assert (verified.returncode, complaints) == (0, []), verified.stderr


class FakeManager:
    """launchctl or systemctl on the PATH, that notes how it is called and fails where it is told to."""

    def __init__(self, directory: Path, name: str) -> None:
        self.calls_file = directory / "calls"
        self.fails = directory / "fails"
        self.fails.write_text("")
        script = directory / name
        script.write_text(
            f'#!/bin/sh\necho "$*" >> {self.calls_file}\n'
            f'while read -r pattern; do case "$*" in $pattern) echo "told to fail" >&2; exit 5;; esac; done'
            f" < {self.fails}\nexit 0\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> list[str]:
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def launchctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return FakeManager(tmp_path, "launchctl")


def test_launchd_is_told_to_unload_what_runs_before_it_loads_anew(launchctl: FakeManager, tmp_path: Path) -> None:
    agent, domain = Agent(COMMAND, 0.0, tmp_path), f"gui/{os.getuid()}"
    target = f"{domain}/io.kvcached.daemon"
    launchctl.fails.write_text("print*\n")  # nothing is loaded
    assert autostart.install(agent)
    assert launchctl.calls() == [f"print {target}", f"bootstrap {domain} {agent.path}"]
    assert plistlib.loads(agent.path.read_bytes())["Label"] == "io.kvcached.daemon"
    assert (tmp_path / "Library/Logs/kvcached").is_dir()
    launchctl.fails.write_text("")  # from now on print finds it
    agent.start()
    assert launchctl.calls() == [f"print {target}", f"kickstart {target}"]
    agent.stop()
    assert launchctl.calls() == [f"print {target}", f"kill SIGTERM {target}"]


def test_a_launchd_agent_is_uninstalled_once(launchctl: FakeManager, tmp_path: Path) -> None:
    agent = Agent(COMMAND, -19.5, tmp_path)  # waits half a second for the fake, which never unloads
    launchctl.fails.write_text("print*\n")
    autostart.install(agent)
    launchctl.fails.write_text("")
    launchctl.calls()
    assert autostart.uninstall(agent)
    assert f"bootout gui/{os.getuid()}/io.kvcached.daemon" in launchctl.calls()
    assert not agent.path.exists()
    assert not autostart.uninstall(agent)
    assert launchctl.calls() == []


def ctl(home: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVCACHED_", "XDG_"))}
    return subprocess.run(
        [str(CTL), "service", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "HOME": str(home), "XDG_RUNTIME_DIR": str(home / "run"), **environment},
    )


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="kvcachedctl manages launchd here, see the workflow")


@linux_only
def test_what_the_manager_refuses_is_told_with_exit_code_1(tmp_path: Path) -> None:
    manager = FakeManager(tmp_path, "systemctl")
    manager.fails.write_text("--user enable*\n")
    result = ctl(tmp_path, "install", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert "systemctl --user enable kvcached.service failed with exit code 5: told to fail" in result.stderr
    assert not (tmp_path / ".config/systemd/user/kvcached.service").exists()


@linux_only
def test_what_the_manager_does_not_let_go_is_removed_and_told(tmp_path: Path) -> None:
    manager, path = FakeManager(tmp_path, "systemctl"), f"{tmp_path}:{os.environ['PATH']}"
    unit = tmp_path / ".config/systemd/user/kvcached.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Unit]\n")
    manager.fails.write_text("--user disable*\n")
    result = ctl(tmp_path, "uninstall", PATH=path)
    assert (result.returncode, "told to fail" in result.stderr) == (1, True)
    assert not unit.exists()
    assert ctl(tmp_path, "uninstall", PATH=path).returncode == 0


@linux_only
def test_without_a_manager_the_message_says_which(tmp_path: Path) -> None:
    result = ctl(tmp_path, "install", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "systemctl" in result.stderr
    assert "Traceback" not in result.stderr


@linux_only
def test_what_is_not_installed_can_be_uninstalled_and_not_started(tmp_path: Path) -> None:
    result = ctl(tmp_path, "uninstall")
    assert (result.returncode, result.stdout.split(":")[0]) == (0, "not installed, nothing to do")
    for command in ("start", "stop"):
        result = ctl(tmp_path, command)
        assert result.returncode == 1
        assert "not installed" in result.stderr


@linux_only
def test_print_shows_the_unit_and_writes_nothing(tmp_path: Path) -> None:
    result = ctl(tmp_path, "print")
    assert result.returncode == 0
    assert f'ExecStart=:"{sys.executable}" "-m" "kvcached"' in result.stdout
    assert not (tmp_path / ".config").exists()


@linux_only
def test_a_configuration_file_that_is_wrong_is_told(tmp_path: Path) -> None:
    file = tmp_path / ".config/kvcached/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("drain_seconds = 1000\n")
    result = ctl(tmp_path, "install")
    assert result.returncode == 1
    assert f"drain_seconds ({file})" in result.stderr


def can_run_a_user_manager() -> bool:
    """Whether a systemd of our own can be started: it wants to believe that the machine was booted with systemd."""
    tools = Path("/lib/systemd/systemd").exists() and shutil.which("unshare") and shutil.which("systemctl")
    return bool(tools) and os.geteuid() == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not can_run_a_user_manager(), reason="needs systemd, unshare and root, to start a user manager in a namespace"
)
def test_a_real_systemd_runs_it_and_starts_it_again_after_a_kill(run_dir: Path) -> None:
    script = ROOT_DIR / "tests/daemon/under_systemd.sh"
    environment = {**os.environ, "TEST_DIR": str(run_dir), "PYTHON": sys.executable, "CTL": str(CTL)}
    result = subprocess.run(
        ["unshare", "--mount", "bash", str(script)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [line.removeprefix("ok ") for line in result.stdout.splitlines() if line.startswith("ok ")]
    assert steps == [
        "installed",
        "put",
        "restarted after kill -9",
        "got",
        "installed twice",
        "stopped",
        "started",
        "gone",
    ]
