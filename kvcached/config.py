"""Every setting, each with one validator, whatever door it comes through: file, environment, flag or gRPC.

Defaults, then the TOML file, then KVCACHED_* variables, then flags; the later wins. A value that is refused is named
with where it came from, what was expected and what came.
"""

import os
import tomllib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Le
from platformdirs import user_cache_path, user_config_path
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from kvcached.errors import InvalidRequestError, PreconditionError
from kvcached_client.paths import default_socket
from kvcached_client.protocol import check_am_ratio

T = TypeVar("T")
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
ENVIRONMENT_PREFIX = "KVCACHED_"
_OF_OTHERS = ("KVCACHED_TARGET",)  # kvcachedctl's


def _expanded(path: Any) -> Path:
    if not str(path):
        raise ValueError("a path must not be empty")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from None


def _by_namespace(text: str, what: str, read: Callable[[str], T]) -> Mapping[str, T]:
    """Of NAMESPACE=VALUE with commas between, which value each has. Raises ValueError for any other text."""
    values: dict[str, T] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        namespace, equals, value = item.rpartition("=")
        if not equals or namespace in values:
            raise ValueError(f"NAMESPACE={what}, each once, expected, with commas between; got {item!r}")
        values[namespace] = read(value)
    return values


def _fidelity(name: str) -> str:
    if name not in FIDELITIES:
        raise ValueError(f"a fidelity is one of {', '.join(FIDELITIES)}, got {name!r}")
    return name


@lru_cache(maxsize=8)
def _fidelities(text: str) -> Mapping[str, str]:
    return _by_namespace(text, "FIDELITY", _fidelity)


@lru_cache(maxsize=8)
def _ratios(text: str) -> Mapping[str, float]:
    return _by_namespace(text, "RATIO", check_am_ratio)


def _checked_by(read: Callable[[str], Any]) -> AfterValidator:
    """Text that `read` understands stays as it is."""

    def check(text: str) -> str:
        read(text)
        return text

    return AfterValidator(check)


FidelityName = Literal["auto", "exact", "near-lossless", "x8", "x16", "x32", "compacted-x8", "compacted-x16"]
FIDELITIES: tuple[str, ...] = get_args(FidelityName)
PathOfUser = Annotated[Path, BeforeValidator(_expanded)]
Size = Annotated[ByteSize, Le(64 * TIB)]  # half of what a process can address


def _live(default: Any, description: str) -> Any:
    """A setting that may change while the daemon runs."""
    return Field(default, description=description, json_schema_extra={"live": True})


class Config(BaseModel):
    """The settings of one daemon, checked. Immutable: `updated` makes another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # behaviour
    store_path: PathOfUser = Field(user_cache_path("kvcached") / "store", description="directory of the store")
    socket_path: PathOfUser = Field(default_socket(), description="unix socket to serve on, in a directory of its own")
    listen: str = Field("", description="host:port to serve on too, for other machines; there is no authentication")
    quota_bytes: Annotated[Size, Ge(MIB)] = _live(20 * GIB, "what the store may take on disk")
    free_floor_bytes: Annotated[Size, Ge(0)] = _live(2 * GIB, "disk space that is left free for others")
    max_block_bytes: Annotated[Size, Ge(MIB)] = _live(GIB, "largest block that is accepted")
    fidelity: FidelityName = _live(
        "auto",
        "how blocks are stored: exact, a profile (near-lossless, x8, x16, x32), one after compaction (compacted-x8, "
        "compacted-x16), or auto: x8 once it was measured",
    )
    namespace_fidelity: Annotated[str, _checked_by(_fidelities)] = _live(
        "", "fidelity in some namespaces: NAMESPACE=FIDELITY,NAMESPACE=FIDELITY"
    )
    am_ratio: Annotated[float, BeforeValidator(check_am_ratio)] = _live(
        4.0, "compaction: tokens before over tokens after, 1 (none) to 8"
    )
    namespace_am_ratio: Annotated[str, _checked_by(_ratios)] = _live(
        "", "am_ratio in some namespaces: NAMESPACE=RATIO,NAMESPACE=RATIO"
    )
    drain_seconds: Annotated[float, Ge(0), Le(300)] = Field(10.0, description="time to finish work after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_json: bool = Field(False, description="log lines as JSON")
    log_file: str = Field("", description="file to log to, rotated when it is full; stderr if empty")
    log_file_bytes: Annotated[Size, Ge(4096)] = Field(
        ByteSize(10 * MIB), description="size at which the log is rotated"
    )
    log_file_count: Annotated[int, Ge(1), Le(100)] = Field(5, description="rotated log files that are kept")
    http_port: Annotated[int, Ge(0), Le(65535)] = Field(
        9797, description="port on 127.0.0.1 for /metrics, /healthz and /readyz; 0: none"
    )

    # performance
    workers: Annotated[int, Ge(1), Le(256)] = Field(os.cpu_count() or 1, description="threads that encode and decode")
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="what transforms planes of coded blocks: cpu, gpu (a Mac's, by mlx), or auto: the faster one",
    )
    idle_seconds: Annotated[float, Ge(1), Le(3600)] = _live(60.0, "time for which an open stream may send nothing")
    queue_bytes: Annotated[Size, Ge(MIB)] = _live(512 * MIB, "blocks in memory on their way in, and as many out")
    segment_bytes: Annotated[Size, Ge(0)] = Field(
        ByteSize(256 * MIB), description="memory shared with engines of this user, of all together; 0: none"
    )
    zstd_level: Annotated[int, Ge(1), Le(19)] = _live(1, "effort of lossless compression")

    def updated(self, changes: Mapping[str, Any]) -> "Config":
        """These settings with changes, checked as at the start.

        Raises:
            InvalidRequestError: no such setting, or a value out of range.
            PreconditionError: a setting that only a restart can change.
        """
        config = _validated({**self.model_dump(), **changes}, dict.fromkeys(changes, "SetConfig"))
        for name in changes:
            if not is_live(name):
                raise PreconditionError(f"{name} can only be changed by a restart")
        return config

    def fidelity_of(self, namespace: str) -> str:
        """How blocks of a namespace are stored, unless a put says otherwise."""
        return _fidelities(self.namespace_fidelity).get(namespace, self.fidelity)

    def am_ratio_of(self, namespace: str) -> float:
        """How much blocks of a namespace are compacted, where they are, unless a put says otherwise."""
        return _ratios(self.namespace_am_ratio).get(namespace, self.am_ratio)

    def items(self) -> list[tuple[str, str]]:
        """Names and values, as text that the validators accept."""
        return [(name, str(value)) for name, value in self.model_dump(mode="json").items()]


def is_live(name: str) -> bool:
    extra = Config.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("live"))


def describe(name: str) -> str:
    return Config.model_fields[name].description or ""


def default_file() -> Path:
    return user_config_path("kvcached") / "config.toml"


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ, file: Path | None = None) -> Config:
    """The settings from all doors. `file` must exist if it is given.

    Raises:
        InvalidRequestError: the file is not TOML, a name is unknown, or a value is out of range.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for content, origin in ((_read(file), str(file or default_file())), (_of_environment(environment), "environment")):
        values |= content
        origins |= dict.fromkeys(content, origin)
    values |= flags
    origins |= dict.fromkeys(flags, "flag")
    return _validated(values, origins)


def _read(file: Path | None) -> dict[str, Any]:
    path = file or default_file()
    if file is None and not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"the configuration file {path} cannot be read: {error}") from None


def _of_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of ours by the names of their settings; an unknown one is a mistake like any other unknown name."""
    found = {name: value for name, value in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}
    return {name.removeprefix(ENVIRONMENT_PREFIX).lower(): found[name] for name in found if name not in _OF_OTHERS}


def _validated(values: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        complaints = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            known = "" if name in Config.model_fields else f"; settings are {', '.join(Config.model_fields)}"
            origin = origins.get(name, "default")
            message = str(detail.get("ctx", {}).get("error", detail["msg"]))  # ours as they are, pydantic's as it likes
            came = f"got {detail['input']!r}"
            complaints.append(f"{name} ({origin}): {message}{'' if came in message else f', {came}'}{known}")
        raise InvalidRequestError("; ".join(complaints)) from None
