"""What a graph rounds to 8 bits for a cache, a program holds in int8, and computes the same with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import count
from test_executorch import OUTSIDE, steps
from tiny_llama import tiny_llama
from torch import fx

from rolora_passes import QuantizeKVCache, apply_passes, history
from rolora_passes.decoding.kv_cache import add_kv_cache
from rolora_passes.errors import LoweringError
from rolora_passes.export import AddKVCache
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.graphs.graph import parameters

KERNELS = {
    "quantized_decomposed::choose_qparams_per_token_asymmetric.out",
    "quantized_decomposed::quantize_per_token.out",
    "quantized_decomposed::dequantize_per_token.out",
    "aten::_to_copy.out",
}

# Sizes of a model, options of the pass, and of the lowering.
CASES: dict[str, tuple[dict[str, object], dict[str, object], dict[str, object]]] = {
    "llama": ({}, {}, {}),
    "fast prefill": ({"layers": 1}, {}, {"fast_prefill": True}),
    "r3, all tokens": ({"layers": 1, "hadamard": True}, {}, {"last_token": False}),
    "r3 of factors": ({"layers": 1, "hadamard": True, "factors": True}, {}, {}),
    "partial rotary, window": ({"layers": 1, "rotary_dim": 8, "window": 4}, {}, {}),
    "softcap": ({"layers": 1, "softcap": 5.0}, {}, {}),
    "keys alone": ({"layers": 1}, {"values": None}, {"fast_prefill": True}),
    "values alone, window": ({"layers": 1, "window": 4}, {"keys": None}, {}),
}


def rounded(sizes: Mapping[str, object] | None = None, **options: object) -> fx.GraphModule:
    graph = tiny_llama(**sizes or {})
    given: dict[str, Any] = {"keys": 8, "values": 8, **options}
    return apply_passes(graph, [QuantizeKVCache(**given)])


@pytest.mark.parametrize(("sizes", "options", "lowering"), CASES.values(), ids=CASES.keys())
def test_program_equals_its_graph(
    sizes: dict[str, object], options: dict[str, object], lowering: dict[str, object], tmp_path: Path
) -> None:
    graph, path = rounded(sizes, **options), tmp_path / "model.pte"
    report = to_executorch(graph, path, max_length=32, **lowering)  # type: ignore[arg-type]
    assert set(report.operators) <= OUTSIDE | KERNELS
    held = 2 * count(graph, "attention") // (1 + len(options))
    assert report.operators["quantized_decomposed::dequantize_per_token.out"] == held
    errors = [(a - b).abs().max().item() for seed in range(3) for a, b in steps(graph, path, seed)]
    # A key or value within 1e-7 of half a step may round the other way, and stays in the cache.
    assert sorted(errors)[len(errors) // 2] <= 1e-5
    assert max(errors) <= 1e-2
    effect = [(a - b).abs().max().item() for a, b in steps(tiny_llama(**sizes), path)]
    assert min(effect) >= 1e-4, "rounding changes the function by much more than lowering does"


@pytest.mark.parametrize(("weights", "table"), [(4, 8), (8, 4)])
def test_with_quantized_linears(weights: int, table: int, tmp_path: Path) -> None:
    graph = rounded({"layers": 1, "weights": weights, "table": table, "hadamard": True})
    report = to_executorch(graph, tmp_path / "model.pte", max_length=32)
    assert report.delegates == 2, "the projections of all heads are still one"
    pairs = (p for seed in range(8) for p in steps(graph, tmp_path / "model.pte", seed, 2, 3))
    errors = [(found - expected).abs().max().item() for found, expected in pairs]
    assert sorted(errors)[len(errors) // 2] <= 1e-5
    assert max(errors) <= 0.1


@pytest.mark.parametrize("longest", [None, 4])
def test_calls_of_any_length(longest: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rolora_passes.export.executorch.xnnpack.attention._LONGEST", longest)
    graph = rounded()
    to_executorch(graph, tmp_path / "model.pte", max_length=32, fast_prefill=longest is not None)
    forward = load_pte(tmp_path / "model.pte")
    tokens = torch.randint(0, 99, (1, 32), generator=torch.Generator().manual_seed(2))
    expected = graph(tokens, torch.arange(32)[None])
    for ends in ([32], [31, 32], [1, 2, 7], [4, 5], [5, 10, 32]):
        for start, end in zip([0, *ends], ends, strict=False):
            found = forward(tokens[:, start:end], torch.tensor([start]))
            torch.testing.assert_close(found[:, -1], expected[:, end - 1], atol=1e-5, rtol=0)


def test_caches_are_small(tmp_path: Path) -> None:
    from executorch.exir._serialize import _deserialize_pte_binary

    caches = {n: t for n, t in parameters(add_kv_cache(rounded(), 32)).items() if n.startswith("cache.")}
    assert {n: (tuple(t.shape), t.dtype) for n, t in caches.items() if "value_1" in n} == {
        "cache.value_1": ((1, 32, 2, 16), torch.int8),
        "cache.value_1_scale": ((1, 32, 2, 1), torch.float32),
        "cache.value_1_zero": ((1, 32, 2, 1), torch.int8),
    }
    planned, held = [], []
    for graph in (tiny_llama(layers=3), rounded({"layers": 3})):
        held.append(to_executorch(graph, tmp_path / "model.pte").cache_bytes)
        plans = _deserialize_pte_binary((tmp_path / "model.pte").read_bytes()).program.execution_plan
        planned.append(sum(next(p for p in plans if p.name == "forward").non_const_buffer_sizes))
        layers = next(p for p in plans if p.name == "get_n_layers")
        assert layers.values[layers.outputs[0]].val.int_val == 3
    rows = 3 * 2 * 512 * 2
    assert held == [rows * 16 * 4, rows * (16 + 4 + 1)]
    assert planned[0] - planned[1] > (held[0] - held[1]) / 2, "what is dequantized is shared by all layers"


def test_cached_graph_runs_in_torch() -> None:
    cached = apply_passes(rounded({"hadamard": True}), [AddKVCache(max_length=16)])
    error = history(cached)[-1].error
    assert error is not None
    assert error < 1e-5


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"keys": 4}, "keys of 4 bits, asymmetric, clip 1.0, one scale for each head"),
        ({"values": 4}, "values of 4 bits, asymmetric, clip 1.0, one scale for each head"),
        ({"symmetric": True}, "keys of 8 bits, symmetric, clip 1.0, one scale for each head"),
        ({"clip": 0.95}, "keys of 8 bits, asymmetric, clip 0.95, one scale for each head"),
        ({"per": "token"}, "keys of 8 bits, asymmetric, clip 1.0, one scale for each token"),
    ],
)
def test_what_no_cache_holds_is_refused(options: dict[str, object], found: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=f"holds float32, or int8 .* found {found}: choose .* keys: 8"):
        to_executorch(rounded(**options), tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []
