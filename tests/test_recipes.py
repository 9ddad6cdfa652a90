"""Recipes are pipelines as YAML and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    MergeLoRA,
    ObserveActivations,
    Pass,
    QuantizeActivations,
    QuantizeEmbedding,
    QuantizeKVCache,
    QuantizeWeights,
    Rotate,
    SmoothQuant,
)
from rolora_passes.errors import PassError
from rolora_passes.passes.manager import check_order
from rolora_passes.passes.registry import make_pass
from rolora_passes.recipes import dump_recipe, load_recipe, recipe_names, recipes

methods = st.sampled_from(["hadamard", "orthogonal", None])
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
targets = st.one_of(st.just("all-linear"), words, st.lists(words, min_size=1, max_size=3).map(tuple))
seeds = st.integers(0, 2**63 - 1)
passes = st.one_of(
    st.builds(FuseNorm, tied=st.sampled_from(["untie", "keep"])),
    st.builds(Rotate, residual=methods, heads=methods, others=methods, seed=seeds, given=st.none() | words),
    st.builds(InsertHadamard, r3=st.booleans(), r4=st.booleans(), block=st.sampled_from([None, 2, 8, 32])),
    st.builds(
        AddLoRA, targets=targets, rank=st.integers(1, 512), alpha=st.floats(0.1, 1e3), seed=seeds,
        init=st.sampled_from(["zero", "gaussian"]),
    ),
    st.builds(MergeLoRA),
    st.builds(
        QuantizeWeights, bits=st.integers(2, 8), group_size=st.sampled_from([None, 32, 64, 128, 256]),
        symmetric=st.booleans(), method=st.sampled_from(["rtn", "gptq"]), clip_search=st.booleans(),
        targets=targets, exclude=st.lists(words, max_size=2).map(tuple), head=st.sampled_from([4, 8, None]),
        damping=st.floats(1e-4, 1), act_order=st.booleans(),
    ),
    st.builds(
        QuantizeActivations, bits=st.integers(3, 8), clip=st.floats(0.5, 1), targets=targets,
        group_size=st.sampled_from([None, 32]), symmetric=st.booleans(), float_weights=st.booleans(),
    ),
    st.builds(QuantizeKVCache, keys=st.sampled_from([None, 2, 8]), per=st.sampled_from(["head", "token"])),
    st.builds(ObserveActivations, per=st.just("tensor"), percentile=st.floats(51, 100)),
    st.builds(SmoothQuant, alpha=st.floats(0, 1)),
    st.builds(QuantizeEmbedding, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([None, 32])),
    st.builds(FoldConstants),
)  # fmt: skip


def load(text: str, folder: Path) -> list[Pass]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(passes, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, pipeline: list[Pass]) -> None:
    assert load(dump_recipe(pipeline, about="anything"), tmp_path_factory.getbasetemp()) == pipeline


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert dump_recipe([FuseNorm(), Rotate(seed=2)]) == "passes:\n- fuse-norm\n- rotate:\n    seed: 2\n"


@pytest.mark.parametrize("name", recipe_names())
def test_our_recipes_load_in_a_legal_order(name: str, tmp_path: Path) -> None:
    pipeline = load_recipe(name)
    check_order(pipeline, ["canonical"])
    assert load(dump_recipe(pipeline), tmp_path) == pipeline


def test_the_recipes_there_are() -> None:
    assert {"8da4w", "rotated-8da4w"} <= set(recipe_names())


def test_recipes_are_one_registry_whether_they_take_a_setting_or_not() -> None:
    known = recipes()
    assert {"8da4w", "quarot", "quarot-rtn"} <= known.keys() and [*known] == [r.name for r in known.values()]
    assert all(recipe.about.endswith(".") and load_recipe(recipe.example) for recipe in known.values())
    assert known["quarot"].example == "quarot:W4A4KV4" and known["8da4w"].about.startswith(
        "int8 activations x"
    )
    assert "GPTQ" in known["quarot"].about and "nearest" in known["quarot-rtn"].about
    with pytest.raises(PassError, match="expected no setting for the recipe 8da4w, found 'W4A4'"):
        load_recipe("8da4w:W4A4")


def test_a_matrix_does_not_fit_into_a_recipe() -> None:
    with pytest.raises(PassError, match="cannot hold given, a dict: save it and give the file's path"):
        dump_recipe([Rotate(given={"R1": torch.eye(4)})])


def test_a_path_does(tmp_path: Path) -> None:
    (restored,) = load(dump_recipe([Rotate(given=tmp_path / "R.bin")]), tmp_path)
    assert str(restored.given) == str(tmp_path / "R.bin")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes: [", "is not YAML"),
        ("just words", "expected a recipe"),
        ("passes: fuse-norm", "expected a recipe"),
        ("", "expected a recipe"),
        ("passes: [fuse-norms]", "found 'fuse-norms'; there are"),
        ("passes: [{rotate: {angle: 3}}]", "rotate.*'angle'"),
        ("passes: [{quantize-weights: {bits: 9}}]", "bits must be 2 to 8, found 9"),
        ("passes: [[1, 2]]", "expected a pass"),
        ("passes: [!!python/object/apply:os.getcwd []]", "is not YAML"),
    ],
)
def test_what_is_not_a_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=message):
        load(text, tmp_path)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"expected a recipe at .*none\.yaml, found nothing"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(PassError, match=r"one of 8da4w, .*, found '8da5w'"):
        load_recipe("8da5w")


@pytest.mark.parametrize(
    ("found", "meant"), [("rotated_8da4w", "rotated-8da4w"), ("quarott:W4A4", "quarot"), ("fuse_norm", None)]
)
def test_a_name_that_may_have_been_meant(found: str, meant: str | None) -> None:
    with pytest.raises(PassError) as error:
        load_recipe(found)
    assert ("did you mean" in str(error.value)) == (meant is not None)
    assert meant is None or str(error.value).endswith(f"did you mean {meant}?")
    with pytest.raises(PassError, match="did you mean fuse-norm"):
        make_pass("fuse_norm")


def test_what_a_pass_refuses_of_its_options_is_said_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise ValueError("expected deviations above 0, found -2")

    monkeypatch.setattr(type(make_pass("fuse-norm")), "__post_init__", refuse)
    with pytest.raises(PassError, match="fuse-norm: expected deviations above 0"):
        make_pass({"fuse-norm": {"tied": "keep"}})
