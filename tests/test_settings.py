"""Settings by the names papers give them, and what each method's pipeline is at them."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import tokens_for
from test_quantize_weights import wide

from rolora_passes import FoldConstants, QuantizeActivations, QuantizeKVCache, QuantizeWeights, apply_passes
from rolora_passes.errors import PassError
from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.facts import facts
from rolora_passes.passes.setting import Setting
from rolora_passes.passes.training import Training
from rolora_passes.recipes import dump_recipe, load_recipe
from rolora_passes.recipes.methods import METHODS


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("W4A4KV4", Setting(4, 4, 4)),
        ("w4a8", Setting(4, 8, 16)),
        ("W4A16KV16", Setting(4, 16, 16)),
        ("W3A16G128", Setting(3, 16, 16, 128)),
        ("W2A6KV2G32", Setting(2, 6, 2, 32)),
    ],
)
def test_settings_as_papers_write_them(text: str, setting: Setting) -> None:
    assert Setting.parse(text) == setting


@pytest.mark.parametrize(
    "text", ["", "W4", "A4W4", "W1A16", "W4A2", "W4A4KV1", "W12A16", "W4A4 KV4", "W4A4G"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PassError, match=r"expected a setting like W4A4KV4.*found"):
        Setting.parse(text)


def test_a_pipeline_has_the_quantizers_of_its_setting() -> None:
    assert load_recipe("rtn:W4A16") == [
        QuantizeWeights(4, None, clip_search=True, head=None),
        FoldConstants(),
    ]
    assert load_recipe("rtn:W16A4KV4") == [
        QuantizeActivations(4, symmetric=True, clip=0.9, head=None, float_weights=True),
        QuantizeKVCache(4, 4, clip=0.95),
    ]
    assert load_recipe("rtn:W2A16")[0] == QuantizeWeights(2, 64, False, clip_search=True, head=None)
    r3 = [
        next(p for p in load_recipe(f"quarot:W4A4{kv}") if p.name == "insert-hadamard") for kv in ("", "KV4")
    ]
    assert [p.r3 for p in r3] == [False, True]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "scaling", "under"),
    [
        ("learned-rtn:W4A8", True, ["quantize-weights", "quantize-activations"]),
        ("learned:W4A4KV4", True, ["quantize-activations", "quantize-kv-cache"]),
        ("learned:W4A8", False, ["quantize-activations"]),
        ("learned:W4A16", True, ["quantize-weights"]),
    ],
)
def test_what_is_learned_and_under_what(name: str, scaling: bool, under: list[str]) -> None:
    steps = {step.name: step for step in load_recipe(name)}
    assert ("insert-scaling" in steps) == scaling
    assert not scaling or steps["insert-scaling"].balance  # type: ignore[attr-defined]
    rotation, scales = steps["learn-rotation"], steps["learn-scales"]
    assert [next(iter(spec)) for spec in rotation.under] == under  # type: ignore[attr-defined]
    assert all("quantize-weights" not in spec for spec in scales.under)  # type: ignore[attr-defined]
    order = [step.name for step in load_recipe(name)]
    assert order.index("quantize-weights") < order.index("learn-scales")
    if "quantize-activations" in steps:
        assert order.index("learn-scales") < order.index("quantize-activations")
        assert steps["quantize-activations"].clip_search == ("A4" in name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("which", ["-rtn:W4A8", ":W4A4KV4", ":W4A8"])
def test_scaled_is_learned_but_for_its_rotations(which: str) -> None:
    learned, scaled = (load_recipe(method + which) for method in ("learned", "scaled"))
    assert scaled == [step for step in learned if step.name != "learn-rotation"] != learned


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_round_trips(method: str) -> None:
    passes = [
        dataclasses.replace(p, steps=2, batch=2) if isinstance(p, Training) else p
        for p in load_recipe(f"{method}:W4A4KV4", seed=3)
    ]
    assert all(p.seed == 3 for p in passes if hasattr(p, "seed"))
    graph = apply_passes(wide(), passes, calibration=tokens_for(wide(), 4, 40))
    assert weigh(graph).by_bits[4] > 0
    assert {"weights quantized", "activations quantized", "cache quantized"} <= {*facts(graph)}
    assert "activations observed" not in facts(graph)
    assert dump_recipe(passes)


def test_errors() -> None:
    with pytest.raises(PassError, match=r"expected a recipe file .*quarot:W4A4KV4.*, found 'awq:W4A4'"):
        load_recipe("awq:W4A4")
    with pytest.raises(PassError, match="expected a setting like W4A4KV4"):
        load_recipe("quarot")
