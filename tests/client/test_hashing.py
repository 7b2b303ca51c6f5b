"""Block hashes and model ids against published vectors, and against a second implementation written from the text."""

import hashlib
import json
import struct
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT_DIR

from kvcached_client.hashing import ROOT, block_hash, chain_hashes, token_bytes
from kvcached_client.spec import Fingerprint, LayerKind, LayerSpec, ModelSpec, RopeSpec

VECTORS = ROOT_DIR / "tests/vectors"
BLOCKS: list[dict[str, Any]] = json.loads((VECTORS / "hashing.json").read_text())["blocks"]
MODELS: list[dict[str, Any]] = json.loads((VECTORS / "model_ids.json").read_text())["models"]
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
namespaces = st.text(max_size=20)


def hash_by_the_text(parent: bytes, token_ids: list[int], namespace: str) -> bytes:
    """From the comment at the head of the protocol, without a look at the client."""
    salt = namespace.encode("utf-8")
    digest = hashlib.sha256(b"kvcached/block/1\x00" + parent)
    digest.update(struct.pack("<I", len(salt)) + salt)
    digest.update(struct.pack(f"<I{len(token_ids)}I", len(token_ids), *token_ids))
    return digest.digest()


@pytest.mark.parametrize("vector", BLOCKS, ids=lambda v: v["name"])
def test_the_published_block_hashes_are_what_text_and_client_say(vector: dict[str, Any]) -> None:
    parent, token_ids, namespace = bytes.fromhex(vector["parent_hash"]), vector["token_ids"], vector["namespace"]
    assert hash_by_the_text(parent, token_ids, namespace).hex() == vector["block_hash"]
    assert block_hash(parent, token_ids, namespace).hex() == vector["block_hash"]


def test_the_vectors_hold_a_chain_that_the_client_computes_as_one() -> None:
    links = [vector for vector in BLOCKS if vector["name"].startswith("chain")]
    assert len(links) == 3
    prompt = [token for vector in links for token in vector["token_ids"]]
    hashes = chain_hashes([*prompt, 7], len(links[0]["token_ids"]), links[0]["namespace"])
    assert [h.hex() for h in hashes] == [vector["block_hash"] for vector in links]


@given(st.binary(min_size=32, max_size=32), tokens, namespaces)
def test_every_block_hash_is_what_the_text_says(parent: bytes, token_ids: list[int], namespace: str) -> None:
    assert block_hash(parent, token_ids, namespace) == hash_by_the_text(parent, token_ids, namespace)


@given(tokens, st.integers(1, 9), st.integers(0, 40), namespaces)
def test_the_hashes_of_a_prefix_are_a_prefix_of_the_hashes(
    token_ids: list[int], block_size: int, n: int, namespace: str
) -> None:
    whole = chain_hashes(token_ids, block_size, namespace)
    assert len(whole) == len(token_ids) // block_size
    prefix = chain_hashes(token_ids[:n], block_size, namespace)
    assert whole[: len(prefix)] == prefix


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.data())
def test_another_token_namespace_or_parent_is_another_hash(token_ids: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(token_ids) - 1))
    other = [*token_ids[:at], token_ids[at] ^ data.draw(st.integers(1, 2**32 - 1)), *token_ids[at + 1 :]]
    parent = data.draw(st.binary(min_size=32, max_size=32).filter(any))
    names = data.draw(st.lists(namespaces, min_size=2, max_size=2, unique=True))
    variants = [(ROOT, token_ids, names[0]), (ROOT, token_ids, names[1]), (ROOT, other, names[0])]
    variants += [(parent, token_ids, names[0]), (ROOT, [*token_ids, 0], names[0])]
    assert len({block_hash(*variant) for variant in variants}) == len(variants)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=12, max_size=12))
def test_the_same_tokens_in_other_blocks_have_other_hashes(token_ids: list[int]) -> None:
    hashes = [h for size in (1, 2, 3, 4, 6, 12) for h in chain_hashes(token_ids, size)]
    assert len(set(hashes)) == len(hashes)


def test_a_namespace_cannot_be_shifted_into_the_tokens() -> None:
    assert block_hash(ROOT, [0x61616161], "a") != block_hash(ROOT, [0x61616161], "aaaaa")
    assert block_hash(ROOT, [], "\1\0\0\0") != block_hash(ROOT, [1], "")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([-1], r"0 to 2\*\*32 - 1, got -1"),
        ([2**32], r"got 4294967296 to 4294967296"),
        ([1.5], "flat sequence of integers, got float64"),
        ([[1, 2]], r"of shape \(1, 2\)"),
        ([True], "got bool"),
        (["7"], "flat sequence of integers"),
    ],
)
def test_what_is_no_token_id_raises_value_error(bad: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_bytes(bad)
    with pytest.raises(ValueError, match=message):
        block_hash(ROOT, bad)


@pytest.mark.parametrize("n_bytes", [0, 31, 33])
def test_a_parent_of_another_size_raises_value_error(n_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, got {n_bytes}"):
        block_hash(bytes(n_bytes), [1])


@pytest.mark.parametrize("block_size", [0, -1])
def test_a_block_size_below_one_raises_value_error(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {block_size}"):
        chain_hashes([1, 2], block_size)


# ---- model ids


def spec_of(vector: dict[str, Any]) -> ModelSpec:
    """A spec from its vector, whose layers may be repeated."""
    content = vector["spec"]
    layers = tuple(
        LayerSpec(**{**layer, "kind": LayerKind(layer["kind"]), "rope": RopeSpec(**layer.get("rope", {}))})
        for layer in content["layers"]
    )
    return ModelSpec(
        Fingerprint(**content["fingerprint"]), content["kv_dtype"], content["block_size"], layers, vector["name"]
    )


@pytest.mark.parametrize("vector", MODELS, ids=lambda v: v["name"])
def test_the_published_model_ids_are_what_text_and_client_say(vector: dict[str, Any]) -> None:
    canonical = json.dumps(vector["spec"], sort_keys=True, separators=(",", ":"))
    by_the_text = hashlib.sha256(b"kvcached/model/1\n" + canonical.encode()).hexdigest()
    assert by_the_text == vector["model_id"]
    assert spec_of(vector).model_id.hex() == vector["model_id"]
    assert spec_of(vector).problems() == []


def test_the_name_is_for_people_and_not_part_of_the_id() -> None:
    spec = spec_of(MODELS[0])
    assert replace(spec, name="another").model_id == spec.model_id


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, LayerKind):
        return LayerKind(value % 4 + 1)
    return value + "x" if isinstance(value, str) else value + 1


def variants(spec: ModelSpec) -> list[tuple[str, ModelSpec]]:
    """The spec with one field changed, for every field that there is, however deep."""
    layer = spec.layers[0]
    found = [(name, replace(spec, **{name: changed(getattr(spec, name))})) for name in ("kv_dtype", "block_size")]
    for f in fields(Fingerprint):
        new = changed(getattr(spec.fingerprint, f.name))
        found.append((f"fingerprint.{f.name}", replace(spec, fingerprint=replace(spec.fingerprint, **{f.name: new}))))
    plain = [f.name for f in fields(LayerSpec) if f.name != "rope"]
    layers = [(name, replace(layer, **{name: changed(getattr(layer, name))})) for name in plain]
    for f in fields(RopeSpec):
        rope = replace(layer.rope, **{f.name: changed(getattr(layer.rope, f.name))})
        layers.append((f"rope.{f.name}", replace(layer, rope=rope)))
    found += [(f"layers[0].{name}", replace(spec, layers=(new, *spec.layers[1:]))) for name, new in layers]
    return [*found, ("one layer more", replace(spec, layers=(*spec.layers, layer)))]


@pytest.mark.parametrize("vector", MODELS, ids=lambda v: v["name"])
def test_every_other_field_is_part_of_the_id(vector: dict[str, Any]) -> None:
    spec = spec_of(vector)
    ids = {name: variant.model_id for name, variant in variants(spec)}
    assert len(ids) == 21
    assert len({spec.model_id, *ids.values()}) == len(ids) + 1


def test_the_order_of_layers_is_part_of_the_id() -> None:
    first, second = LayerSpec(n_kv_heads=1), LayerSpec(n_kv_heads=2)
    specs = [ModelSpec(Fingerprint(weights="w"), "float16", 4, layers) for layers in [(first, second), (second, first)]]
    assert specs[0].model_id != specs[1].model_id


u32 = st.integers(0, 2**32 - 1)
# Engines read these from JSON, where a whole number has no point.
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 10**9)
ropes = st.builds(RopeSpec, u32, numbers, st.booleans(), st.text(max_size=9))
layer_specs = st.builds(
    LayerSpec,
    st.sampled_from(LayerKind),
    u32,
    u32,
    u32,
    u32,
    u32,
    numbers,
    numbers,
    st.booleans(),
    ropes,
    st.booleans(),
)
specs = st.builds(
    ModelSpec,
    st.builds(Fingerprint, *[st.text(max_size=9)] * 4),
    st.text(max_size=9),
    u32,
    st.lists(layer_specs, max_size=4).map(tuple),
    st.text(max_size=9),
)


@given(specs)
def test_a_spec_survives_the_wire(spec: ModelSpec) -> None:
    assert ModelSpec.from_proto(type(spec.to_proto()).FromString(spec.to_proto().SerializeToString())) == spec


@given(specs)
def test_client_and_daemon_give_a_spec_the_same_id(spec: ModelSpec) -> None:
    assert ModelSpec.from_proto(spec.to_proto()).model_id == spec.model_id
