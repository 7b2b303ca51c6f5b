"""What the code promises about itself: generated code is current, errors are drawn and have statuses."""

import ast
import re

import generate_proto
import grpc
import pytest
from support import ROOT_DIR

import kvcached_client
from kvcached import errors
from kvcached.service import Service
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.protocol import METHODS

ERRORS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.KvcachedError)]


def test_the_generated_protocol_is_current() -> None:
    for name, content in generate_proto.generate().items():
        assert (generate_proto.TARGET / name).read_text() == content, f"run `make proto`: {name} is stale"


def test_generated_code_runs_under_the_oldest_protobuf_that_is_supported() -> None:
    """lmcache wants protobuf < 7, and new gencode under an old runtime is refused by protobuf itself."""
    text = (generate_proto.TARGET / "kvcached_pb2.py").read_text()
    found = re.search(r"Protobuf Python Version: (\d+)\.(\d+)\.", text)
    assert found
    assert (int(found[1]), int(found[2])) <= (6, 31)
    for path in ("pyproject.toml", "clients/python/pyproject.toml"):
        assert '"protobuf>=6.31"' in (ROOT_DIR / path).read_text()


@pytest.mark.parametrize("error", ERRORS, ids=lambda cls: cls.__name__)
def test_every_error_is_a_status_and_is_drawn_with_it(error: type[errors.KvcachedError]) -> None:
    assert hasattr(grpc.StatusCode, error.code)
    assert errors.__doc__
    assert re.search(rf"{error.__name__} +{error.code}\b", errors.__doc__)


def test_every_method_of_the_protocol_is_served() -> None:
    assert set(METHODS) == {m.name for m in pb.DESCRIPTOR.services_by_name["KvCache"].methods}
    for name in METHODS:
        assert callable(getattr(Service, name))


def test_all_public_names_of_the_client_resolve() -> None:
    assert kvcached_client.__all__ == sorted(kvcached_client.__all__)
    for name in kvcached_client.__all__:
        assert getattr(kvcached_client, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = kvcached_client.Nonsense


@pytest.mark.parametrize("folder", ["kvcached", "clients", "bench", "tests"])
def test_functions_and_files_stay_small(folder: str) -> None:
    offenders = []
    for path in sorted((ROOT_DIR / folder).rglob("*.py")):
        if {"_proto", "data"} & set(path.parts):
            continue
        text = path.read_text()
        if text.count("\n") > 450:
            offenders.append(f"{path.name}: {text.count(chr(10))} lines")
        offenders += [
            f"{path.name}: {node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
        ]
    assert offenders == []
