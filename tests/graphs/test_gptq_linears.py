"""gptq_linears: every linear is rounded on what the rounded ones before it make of the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured, tokens_for
from torch import Tensor, fx

from rolora_passes import FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes
from rolora_passes.errors import PassError
from rolora_passes.graphs.evaluate import compute
from rolora_passes.graphs.graph import (
    add_parameter,
    copy_graph,
    finish,
    get_tensor,
    insert,
    linears,
    parameters,
    set_tensor,
    site_names,
)
from rolora_passes.graphs.running import run, values
from rolora_passes.graphs.verify import relative_error
from rolora_passes.numerics import affine
from rolora_passes.numerics.affine import Integers
from rolora_passes.numerics.gptq import Quantized, gptq
from rolora_passes.quantize import gptq_linears as module
from rolora_passes.quantize.gptq_linears import Hessian, gptq_linears

GRID = Integers(4, 8)
Sites = dict[fx.Node, tuple[str, Integers]]


def store_in(graph: fx.GraphModule) -> Any:
    """What a caller writes: integers and scales as parameters, and their product as the weight."""

    def store(linear: fx.Node, quantized: Quantized, grid: Integers) -> None:
        dtype = compute(graph, [linear.args[1]])[0].dtype  # type: ignore[arg-type]
        q = add_parameter(graph, f"{linear.name}.q", quantized.integers)
        scale = add_parameter(graph, f"{linear.name}.scale", quantized.scale.to(dtype))
        zero = None if grid.symmetric else add_parameter(graph, f"{linear.name}.zero", quantized.zero)
        new = insert(graph, linear, torch.ops.rolora.dequantize.default, q, scale, zero, grid.bits)
        linear.update_arg(1, new)

    return store


def blocks(graph: fx.GraphModule, grid: Integers = GRID) -> Sites:
    """All linears but the head."""
    return {n: (name, grid) for n, name in site_names(graph).items() if "lm_head" not in name}


def quantized(
    graph: fx.GraphModule, tokens: Tensor, sites: Any = blocks, **options: Any
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """A quantized copy of a graph, and the figures."""
    copy = copy_graph(graph)
    options = {
        "damping": 0.01, "act_order": False, "work": None, "on_progress": lambda done, total: None,
        **options,
    }  # fmt: skip
    figures = gptq_linears(copy, sites(copy), tokens, store=store_in(copy), **options)
    return finish(copy), figures


def by_hand(
    graph: fx.GraphModule, tokens: Tensor, sites: Any = blocks, damping: float = 0.01, act_order: bool = False
) -> fx.GraphModule:
    """One linear at a time, a whole run of the graph as it stands for every one of them."""
    copy = copy_graph(graph)
    store, frozen = store_in(copy), sites(copy)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in linears(copy):
        if node in frozen:
            groups.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    for value, nodes in groups.items():
        x = next(found for node, found in values(copy, tokens) if node is value).flatten(0, -2)
        for node in nodes:
            grid = frozen[node][1]
            weight = compute(copy, [node.args[1]], dtype=torch.float64)[0]  # type: ignore[arg-type]
            store(node, gptq(weight, x.t() @ x, grid, damping, act_order), grid)
    return finish(copy)


def same(first: fx.GraphModule, second: fx.GraphModule) -> None:
    """The same parameters, to the bit."""
    one, other = parameters(first), parameters(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3", "mixtral"])
def test_integers_are_those_of_one_linear_at_a_time(name: str) -> None:
    graph = captured(name)
    tokens = tokens_for(graph, 6, 20)
    found, figures = quantized(graph, tokens)
    same(found, by_hand(graph, tokens))
    assert list(figures["stages"][0]["sites"]) == [
        name for node, (name, _) in blocks(graph).items() if node.args[0] is linears(graph)[0].args[0]
    ]
    assert sum(len(stage["sites"]) for stage in figures["stages"]) == len(blocks(graph))


def mixed(graph: fx.GraphModule) -> Sites:
    """Grids of every kind, different ones on one input, and some linears left alone."""
    grids = [Integers(4, 8), Integers(3, None, False), Integers(8, None), Integers(4, 8)]
    sites = blocks(graph).items()
    return {node: (name, grids[i % 4]) for i, (node, (name, _)) in enumerate(sites) if i % 5 != 4}


@pytest.mark.parametrize("act_order", [False, True])
def test_grids_and_options_are_each_sites_own(act_order: bool) -> None:
    graph = captured("llama")
    tokens = tokens_for(graph, 6, 20)
    found, _ = quantized(graph, tokens, mixed, act_order=act_order, damping=0.1)
    same(found, by_hand(graph, tokens, mixed, 0.1, act_order))


@pytest.mark.parametrize("rows", [5, 40])
def test_many_rows_are_rounded_a_part_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured("llama")
    tokens = tokens_for(graph, 6, 20)
    whole, figures = quantized(graph, tokens, mixed)
    monkeypatch.setattr(module, "_rows_at_once", lambda width: rows)
    parts, again = quantized(graph, tokens, mixed)
    same(parts, whole)
    for stage, other in zip(figures["stages"], again["stages"], strict=True):
        assert stage["sites"] == pytest.approx(other["sites"], rel=1e-9)


def test_weights_may_be_expressions() -> None:
    written = apply_passes(captured("llama"), [FuseNorm(), Rotate(), InsertHadamard()])
    tokens = tokens_for(written, 6, 20)
    folded = apply_passes(written, [FoldConstants()])
    one, other = quantized(written, tokens)[0], quantized(folded, tokens)[0]
    assert relative_error(run(one, tokens), run(other, tokens)) < 1e-6
    names = [name for name in parameters(one) if name.endswith(".q")]
    assert len(names) == 14
    for name in names:
        assert torch.equal(get_tensor(one, name), get_tensor(other, name))


def test_expressions_are_evaluated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = apply_passes(captured("llama"), [FuseNorm()])
    weights: list[Tensor] = []
    monkeypatch.setattr(module, "gptq", lambda w, *rest: weights.append(w) or gptq(w, *rest))
    quantized(graph, tokens_for(graph, 6, 20))
    first = next(iter(blocks(graph)))
    expected = compute(graph, [first.args[1]])[0]  # type: ignore[arg-type]
    assert torch.equal(weights[0][: len(expected)], expected)


def test_outputs_are_closer_than_by_rounding_to_nearest() -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 24, 30)
    grid = Integers(3, 8)
    nearest = copy_graph(graph)
    for node in blocks(nearest):
        weight = compute(nearest, [node.args[1]])[0]  # type: ignore[arg-type]
        scale, zero = grid.choose(weight)
        store_in(nearest)(node, Quantized(affine.quantize(weight, scale, zero, 3, True), scale, zero), grid)
    finish(nearest)
    found, figures = quantized(graph, tokens, lambda g: blocks(g, grid))
    fresh = tokens_for(graph, 24, 30, seed=8)

    def squared(other: fx.GraphModule) -> float:
        return float((run(other, fresh) - run(graph, fresh)).square().sum())

    assert squared(found) < 0.7 * squared(nearest)
    assert all(0 < error < 0.1 for stage in figures["stages"] for error in stage["sites"].values())


def test_figures_say_what_was_lost() -> None:
    graph = captured("llama")
    tokens = tokens_for(graph, 6, 20)
    found, figures = quantized(graph, tokens)
    first = linears(graph)[0]
    x = next(v for n, v in values(graph, tokens) if n is first.args[0]).flatten(0, -2)
    weight = compute(graph, [first.args[1]])[0]  # type: ignore[arg-type]
    rounded = compute(found, [linears(found)[0].args[1]])[0]  # type: ignore[arg-type]
    stage = figures["stages"][0]
    expected = (x @ (rounded - weight).t()).square().sum() / (x @ weight.t()).square().sum()
    assert stage["sites"]["model.layers.0.self_attn.q_proj"] == pytest.approx(float(expected), rel=1e-6)
    assert stage["tokens"] == 120 and stage["dead_channels"] == 0 and not stage["resumed"]
    assert stage["forward"] > 0 and stage["solve"] > 0 and stage["peak_mb"] > 10


def test_progress_counts_up_to_the_whole() -> None:
    graph = captured("llama")
    seen: list[tuple[int, int]] = []
    quantized(graph, tokens_for(graph, 3), on_progress=lambda *step: seen.append(step))
    assert seen == [(i + 1, 8 * 4) for i in range(8 * 4)]  # 8 stages of 3 windows and a solve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 24, 300, 1700])
def test_the_hessian_is_the_sum_over_all_rows(width: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(*shape, width, generator=random).to(dtype) for shape in ((2, 5), (3,), (1, 0), (2, 2, 2))
    ]
    hessian = Hessian()
    assert hessian.matrix() is None
    for part in parts:
        hessian.add(part)
    x = torch.cat([part.flatten(0, -2).double() for part in parts])
    found = hessian.matrix()
    assert found is not None and torch.equal(found, found.t()) and hessian.rows == len(x) == 21
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), x.t() @ x, rtol=1e-5, atol=1e-4)


class Killed(Exception):
    pass


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every call of gptq."""
    calls: list[int] = []

    def counted(*args: Any) -> Quantized:
        calls.append(len(calls))
        return gptq(*args)

    monkeypatch.setattr(module, "gptq", counted)
    return calls


def killed_at(step: int) -> Any:
    def on_progress(done: int, total: int) -> None:
        if done == step:
            raise Killed

    return on_progress


@pytest.mark.parametrize("step", [4 * 7 + 3, 4 * 7, 1])  # within a stage, right after one, at once
def test_a_killed_run_goes_on_from_where_it_was(
    step: int, tmp_path: Path, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = captured("llama", torch.float32)
    tokens, work = tokens_for(graph, 6, 20), tmp_path / "work"
    whole, _ = quantized(graph, tokens, mixed)
    needed = len(solved)
    with pytest.raises(Killed):
        quantized(graph, tokens, mixed, work=work, on_progress=killed_at(step))
    before, finished = len(solved), step // 7
    assert len(list(work.glob("*"))) == finished and all(f.suffix == ".safetensors" for f in work.glob("*"))
    gathered: list[int] = []
    add = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda h, value: gathered.append(1) or add(h, value))
    resumed, figures = quantized(graph, tokens, mixed, work=work)
    assert len(gathered) == (8 - finished) * len(tokens)
    same(resumed, whole)
    assert (before - needed) + (len(solved) - before) == needed  # nothing is solved twice
    assert [stage["resumed"] for stage in figures["stages"]] == [i < finished for i in range(8)]
    assert not list(work.glob("*"))
    assert all(len(stage["sites"]) for stage in figures["stages"])


def test_another_run_never_takes_the_files_of_one_that_was_killed(tmp_path: Path, solved: list[int]) -> None:
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 6, 20)
    with pytest.raises(Killed):
        quantized(graph, tokens, work=tmp_path, on_progress=killed_at(40))
    kept = sorted(tmp_path.iterdir())
    assert kept
    other = copy_graph(graph)
    name = "model.layers.1.mlp.down_proj.weight"
    changed = get_tensor(graph, name).detach().clone()
    changed[-1, -1] += 1e-6
    set_tensor(other, name, changed)
    more = tokens.clone()
    more[-1, -1] = (more[-1, -1] + 1) % 50
    runs: list[tuple[fx.GraphModule, Tensor, dict[str, Any]]] = [
        (other, tokens, {}),
        (graph, more, {}),
        (graph, tokens, {"damping": 0.02}),
        (graph, tokens, {"act_order": True}),
        (graph, tokens, {"sites": lambda g: blocks(g, Integers(4, 8, clip_search=True))}),
    ]
    for run_graph, run_tokens, options in runs:
        solved.clear()
        _, figures = quantized(run_graph, run_tokens, work=tmp_path, **options)
        assert len(solved) == 8 and not any(stage["resumed"] for stage in figures["stages"])
        assert sorted(tmp_path.iterdir()) == kept
    solved.clear()
    quantized(graph, tokens, work=tmp_path)
    assert len(solved) == 8 - len(kept) and not list(tmp_path.iterdir())


def test_stages_that_are_damaged_or_gone_are_solved_again(tmp_path: Path, solved: list[int]) -> None:
    """Another run of the same removes its files when it ends, also while this one is going on."""
    graph = captured("llama", torch.float32)
    tokens = tokens_for(graph, 6, 20)
    whole, _ = quantized(graph, tokens)
    with pytest.raises(Killed):
        quantized(graph, tokens, work=tmp_path, on_progress=killed_at(40))
    first, *others = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    solved.clear()

    def removed(done: int, total: int) -> None:
        if done == 7:
            for file in tmp_path.iterdir():
                file.unlink()

    again, _ = quantized(graph, tokens, work=tmp_path, on_progress=removed)
    same(again, whole)
    assert others and len(solved) == 8 and not list(tmp_path.iterdir())


GAIN = "model.layers.1.input_layernorm.weight"


def with_gain(change: Any) -> fx.GraphModule:
    graph = copy_graph(captured("llama"))
    gain = get_tensor(graph, GAIN).detach().clone()
    change(gain)
    set_tensor(graph, GAIN, gain)
    return graph


def test_dead_channels_are_counted() -> None:
    graph = with_gain(lambda gain: gain[:3].zero_())
    found, figures = quantized(graph, tokens_for(graph, 6, 20))
    assert [stage["dead_channels"] for stage in figures["stages"]] == [0, 0, 0, 0, 3, 0, 0, 0]
    weight = compute(found, [linears(found)[7].args[1]])[0]  # type: ignore[arg-type]
    assert not weight[:, :3].any() and weight[:, 3:].any()


def test_an_input_that_saw_nothing_is_named() -> None:
    graph = with_gain(lambda gain: gain.zero_())
    with pytest.raises(
        PassError, match=r"nothing but zeros reached model.layers.1.self_attn.q_proj, .*, in 27 rows"
    ):
        quantized(graph, tokens_for(graph))


def test_an_input_that_overflows_is_named() -> None:
    graph = with_gain(lambda gain: gain[0].fill_(float("inf")))
    with pytest.raises(PassError, match=r"layers.1.self_attn.q_proj, .*: gptq: expected a finite Hessian"):
        quantized(graph, tokens_for(graph))


def test_too_few_tokens_for_no_damping_are_refused() -> None:
    graph = captured("llama")
    with pytest.raises(
        PassError, match=r"layers.0.self_attn.q_proj, .*: gptq: .* damping 0.0: raise the damping"
    ):
        quantized(graph, tokens_for(graph, 1, 9), damping=0.0)
    quantized(graph, tokens_for(graph, 1, 9))
