"""Client of kvcached: hand over KV cache blocks, get them back. numpy in, numpy out.

Names are loaded when first used: a tool that only wants the protocol pays for nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .breaker import CircuitBreaker as CircuitBreaker
    from .client import Block as Block
    from .client import Client as Client
    from .client import Limits as Limits
    from .client import Match as Match
    from .connection import Connection as Connection
    from .connection import DaemonError as DaemonError
    from .hashing import ROOT as ROOT
    from .hashing import block_hash as block_hash
    from .hashing import chain_hashes as chain_hashes
    from .spec import Fidelity as Fidelity
    from .spec import FidelityKind as FidelityKind
    from .spec import Fingerprint as Fingerprint
    from .spec import LayerKind as LayerKind
    from .spec import LayerSpec as LayerSpec
    from .spec import ModelSpec as ModelSpec
    from .spec import RopeSpec as RopeSpec

_HOMES = {
    "breaker": ("CircuitBreaker",),
    "client": ("Block", "Client", "Limits", "Match"),
    "connection": ("Connection", "DaemonError"),
    "hashing": ("ROOT", "block_hash", "chain_hashes"),
    "spec": ("Fidelity", "FidelityKind", "Fingerprint", "LayerKind", "LayerSpec", "ModelSpec", "RopeSpec"),
}
__version__ = "0.1.0"
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
