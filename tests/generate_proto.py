"""Generates kvcached_client/_proto from proto/. `make proto` writes it; a test proves that it is current.

grpcio-tools is pinned because generated code must not be newer than the runtime it meets, and engines hold protobuf
back (lmcache wants < 7).
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "kvcached/v1/kvcached.proto"
TARGET = ROOT / "clients/python/kvcached_client/_proto"


def generate() -> dict[str, str]:
    """File name -> content of what belongs into `_proto`."""
    with tempfile.TemporaryDirectory() as out:
        arguments = ["protoc", f"-I{ROOT / 'proto'}", f"-I{files('grpc_tools') / '_proto'}"]
        if protoc.main([*arguments, f"--python_out={out}", f"--pyi_out={out}", SOURCE]) != 0:
            sys.exit("protoc failed")
        return {path.name: path.read_text() for path in (Path(out) / SOURCE).parent.iterdir()}


if __name__ == "__main__":
    for name, content in generate().items():
        (TARGET / name).write_text(content)
