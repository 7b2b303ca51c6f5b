"""Bundles that compact, every plane coded in its own way, and blocks compacted with them. Nothing here asserts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from codec.recipes import HALVES, LINEAR, NONE, PARTIAL, STATE, Coding, Recipe, Text, basis_of, codings, tables_of
from compactions import make_compaction, make_predictors
from hypothesis import strategies as st

from kvcached import codec
from kvcached.block import Fingerprint, KVBlock, LayerSpec, ModelSpec, RopeSpec
from kvcached.codec.bundle import Bundle
from kvcached.codec.compactor import Anchor, Compactor
from kvcached.codec.tables import SIDES, Profile
from kvcached_client.spec import DENSE_DTYPES

CODINGS: Mapping[str, Coding] = {"x8": Coding(0.1, 0.2, 0.45, 0.02), "x16": Coding(0.5, 0.5, 0.4, 0.05)}


def compacting_model(
    ropes: Sequence[RopeSpec] = (HALVES, PARTIAL),
    kv_dtype: str = "float16",
    *,
    n_heads: int = 4,
    n_query_heads: int = 8,
    n_tokens: int = 44,
    key_dim: int = 8,
    value_dim: int = 6,
) -> ModelSpec:
    """A dense layer for each of the rotary positions, one opaque layer behind the first, blocks of `n_tokens`."""
    dims = {"n_query_heads": n_query_heads, "n_kv_heads": n_heads, "key_dim": key_dim, "value_dim": value_dim}
    layers = [LayerSpec(**dims, rope=rope) for rope in ropes]
    return ModelSpec(Fingerprint(weights="w"), kv_dtype, n_tokens, (layers[0], STATE, *layers[1:]), name="compacting")


@dataclass(frozen=True)
class CompactingRecipe:
    """What such a bundle is made of. The bundle itself is made in the test: see codec.frames.Wire.

    together: by anchor, the heads that are coded side by side, in this order, plane by plane. steep: heads that lose
    most, and so keep most tokens.
    """

    spec: ModelSpec
    together: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=lambda: {8: ()})
    profiles: Mapping[str, Coding] = field(default_factory=lambda: CODINGS)
    steep: Sequence[int] = ()
    seed: int = 0
    rank: float = 1.0

    def bundle(self) -> Bundle:
        made, rng = make_compaction(self.spec, self.seed, whole=self.steep), np.random.default_rng(self.seed)
        anchors = {ratio: self._anchor(rng, heads) for ratio, heads in self.together.items()}
        plain = Recipe(self.spec, 1, self.seed, {"x8": Coding()}, 0.2).bundle()
        # Twice the loss for half the tokens: so heads get unequally many, and few all or the least.
        curves = made.curves[..., :1] * (1 / made.fractions - 1)
        return replace(plain, compaction=replace(made, curves=curves, anchors=anchors))

    def _anchor(self, rng: np.random.Generator, together: Sequence[Sequence[int]]) -> Anchor:
        n_layers, n_kv_heads = self.spec.dense_shapes()["keys"][:2]
        whole = {head for plane in together for head in plane}
        alone = [(head,) for head in range(n_layers * n_kv_heads) if head not in whole]
        heads = (*alone[:1], *map(tuple, together), *alone[1:])
        dims = {side: shape[-1] for side, shape in self.spec.dense_shapes().items()}
        bases = {side: tuple(basis_of(rng, len(plane) * dims[side], self.rank) for plane in heads) for side in SIDES}
        profiles = {}
        for name, coding in self.profiles.items():
            tables = [tuple(tables_of(rng, basis, coding) for basis in bases[side]) for side in SIDES]
            profiles[name] = Profile(8.0, coding.dead_zone, coding.centroid, *tables)
        leaders = leaders_of(rng, heads)
        predictors = make_predictors(rng, heads, leaders, dims, share=0.7)
        bounds = dict.fromkeys(profiles, 1e6)
        return Anchor(heads, bases["keys"], bases["values"], profiles, bounds, leaders, predictors)


def leaders_of(rng: np.random.Generator, heads: Sequence[Sequence[int]]) -> tuple[int | None, ...]:
    """For most planes a leader, where one can be: the first plane of whole heads. Others of whole heads may be led."""
    first = next((i for i, plane in enumerate(heads) if len(plane) > 1), None)
    return tuple(first if i != first and rng.random() < 0.7 else None for i in range(len(heads)))


def compact_text(compactor: Compactor, text: Text) -> KVBlock:
    """A piece of a text, compacted; one shorter than a block keeps all its tokens."""
    block = text.block()
    return codec.compact(block, compactor).block if text.n_tokens == compactor.spec.block_size else block


RATIOS = (1.25, 1.25, 2.0, 3.0, 4.0, 6.5, 8.0)


@dataclass(frozen=True)
class Compacting:
    """A block, and with what it is compacted."""

    recipe: CompactingRecipe
    profile: str
    ratio: float
    text: Text


@st.composite
def compactings(draw: st.DrawFn) -> Compacting:
    """Models of 1 to 6 heads; two of them side by side, or twice two, where the ratio leaves room for whole ones."""
    ropes = draw(st.lists(st.sampled_from([HALVES, PARTIAL, LINEAR, NONE]), min_size=1, max_size=2))
    spec = compacting_model(
        ropes,
        draw(st.sampled_from(DENSE_DTYPES)),
        n_heads=draw(st.integers(1, 3)),
        n_query_heads=draw(st.sampled_from([0, 6])),
        n_tokens=draw(st.integers(40, 50)),
        key_dim=draw(st.sampled_from([8, 10])),
        value_dim=draw(st.integers(1, 6)),
    )
    n_heads, ratio = len(ropes) * spec.layers[0].n_kv_heads, draw(st.sampled_from(RATIOS))
    heads = draw(st.permutations(range(n_heads)))
    alone = st.sampled_from([{8: ()}, {4: (), 8: ()}, {2: (), 4: (), 8: ()}])
    pairs = [heads[:2], heads[2:4]][: 2 if ratio < 1.5 else 1]
    together = {2: pairs, 8: ()} if n_heads > 4 else draw(alone)
    profiles = {name: draw(codings) for name in ("x8", "x16")}
    seed, rank = draw(st.integers(0, 99)), draw(st.sampled_from([0.2, 1.0]))
    recipe = CompactingRecipe(spec, together, profiles, heads[:1], seed, rank)
    n_tokens = draw(st.sampled_from([spec.block_size, spec.block_size, 1, 5]))
    first_position = draw(st.sampled_from([0, 1, 3, 4, 1 << 20, 1 << 30]))
    text = Text(spec, n_tokens, first_position, seed, opaque=draw(st.booleans()))
    return Compacting(recipe, draw(st.sampled_from(["x8", "x16"])), ratio, text)
