"""The daemon as a service of its user: a launchd agent on a Mac, a systemd user unit on Linux.

Both run it in the foreground, start it at login, start it again after a crash but not after a clean exit, and give it
longer to stop than it takes to drain. Neither expands anything in a path, so every path is absolute.
"""

import os
import plistlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcached.errors import KvcachedError

LABEL = "io.kvcached.daemon"
UNIT = "kvcached.service"
_SPARE_SECONDS = 20  # beyond drain_seconds, to close the store
_RESTART_SECONDS = 10
_OPEN_FILES = 4096
_CALL_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Agent:
    """A launchd agent of one user."""

    command: tuple[str, ...]
    drain_seconds: float
    home: Path

    @property
    def path(self) -> Path:
        return self.home / "Library/LaunchAgents" / f"{LABEL}.plist"

    @property
    def log_hint(self) -> str:
        return f"tail {self._logs}/*"

    @property
    def _logs(self) -> Path:
        return self.home / "Library/Logs/kvcached"

    @property
    def _target(self) -> str:
        return f"gui/{os.getuid()}/{LABEL}"

    def text(self) -> str:
        """The plist. launchd rotates nothing, so the daemon logs into a file of its own; stderr is for what dies."""
        stderr = str(self._logs / "stderr.log")
        content = {
            "Label": LABEL,
            "ProgramArguments": [*self.command, "--log-file", str(self._logs / "kvcached.log")],
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": _RESTART_SECONDS,
            "ExitTimeOut": round(self.drain_seconds) + _SPARE_SECONDS,
            # Background would throttle CPU and disk, and slow restores; Adaptive is Background for who has no XPC.
            "ProcessType": "Standard",
            "SoftResourceLimits": {"NumberOfFiles": _OPEN_FILES},
            "Umask": 0o077,
            "WorkingDirectory": str(self.home),
            "StandardOutPath": stderr,
            "StandardErrorPath": stderr,
        }
        return plistlib.dumps(content, sort_keys=False).decode()

    def load(self) -> None:
        """Makes launchd run what the plist says."""
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.unload()
        _call("launchctl", "bootstrap", f"gui/{os.getuid()}", str(self.path))

    def unload(self) -> None:
        if not self._is_loaded():
            return
        _call("launchctl", "bootout", self._target)
        # bootout answers before the process has ended, and a bootstrap in the meantime fails.
        _wait_for(lambda: not self._is_loaded(), self.drain_seconds + _SPARE_SECONDS)

    def start(self) -> None:
        if not self._is_loaded():
            self.load()
        _call("launchctl", "kickstart", self._target)

    def stop(self) -> None:
        """Until the next login: a clean exit is not followed by a restart."""
        if self._is_loaded():
            _call("launchctl", "kill", "SIGTERM", self._target)

    def _is_loaded(self) -> bool:
        return _answers("launchctl", "print", self._target)


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd unit of one user."""

    command: tuple[str, ...]
    drain_seconds: float
    config_home: Path

    @property
    def path(self) -> Path:
        return self.config_home / "systemd/user" / UNIT

    @property
    def log_hint(self) -> str:
        return f"journalctl --user -u {UNIT}"

    def text(self) -> str:
        return f"""\
[Unit]
Description=kvcached, a persistent KV cache for language models

[Service]
Type=exec
ExecStart=:{" ".join(map(_quoted, self.command))}
Restart=on-failure
RestartSec={_RESTART_SECONDS}
TimeoutStopSec={round(self.drain_seconds) + _SPARE_SECONDS}
UMask=0077
LimitNOFILE={_OPEN_FILES}
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""

    def load(self) -> None:
        """Makes systemd run what the unit says, now and at each login."""
        _systemctl("daemon-reload")
        _systemctl("enable", UNIT)
        _systemctl("restart", UNIT)

    def unload(self) -> None:
        _systemctl("disable", "--now", UNIT)

    def start(self) -> None:
        _systemctl("start", UNIT)

    def stop(self) -> None:
        _systemctl("stop", UNIT)


def of_this_user(command: tuple[str, ...], drain_seconds: float) -> Agent | Unit:
    """The service of whoever runs this."""
    if sys.platform == "darwin":
        return Agent(command, drain_seconds, Path.home())
    config_home = os.environ.get("XDG_CONFIG_HOME")
    return Unit(command, drain_seconds, Path(config_home) if config_home else Path.home() / ".config")


def install(service: Agent | Unit) -> bool:
    """Writes the service's file and starts it, anew if it runs; whether there was none before.

    What the manager refuses leaves no new file behind.
    """
    is_new = not service.path.exists()
    service.path.parent.mkdir(parents=True, exist_ok=True)
    service.path.write_text(service.text())
    try:
        service.load()
    except KvcachedError:
        if is_new:
            service.path.unlink()
        raise
    return is_new


def uninstall(service: Agent | Unit) -> bool:
    """Stops the service and removes its file; whether there was one. The cache stays on disk.

    The file goes even if the manager refuses, or it would be there for ever.
    """
    if not service.path.exists():
        return False
    try:
        service.unload()
    finally:
        service.path.unlink()
    if isinstance(service, Unit):
        _systemctl("daemon-reload")
    return True


def _quoted(argument: str) -> str:
    """As a word of a command line in a unit, where % means something."""
    escaped = argument.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _systemctl(*arguments: str) -> None:
    _call("systemctl", "--user", *arguments)


def _call(*command: str) -> None:
    """Raises KvcachedError with what the command said if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KvcachedError(f"{' '.join(command)}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or "no reason given"
        raise KvcachedError(f"{' '.join(command)} failed with exit code {done.returncode}: {said}")


def _answers(*command: str) -> bool:
    try:
        _call(*command)
    except KvcachedError:
        return False
    return True


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
