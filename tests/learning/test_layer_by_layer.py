"""Rotations learned one at a time from samples of activations: no gradient goes through the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured, difference, matrices, tokens_for
from sharp import opened, sharp, windows
from torch import Tensor, fx

from rolora_passes import FoldConstants, FuseNorm, LearnRotation, Rotate, apply_passes, history
from rolora_passes.errors import GraphFormatError, PassError
from rolora_passes.graphs.bases.inference import infer_bases
from rolora_passes.graphs.bases.rotations import dense
from rolora_passes.graphs.graph import linears, parameters
from rolora_passes.graphs.info import info
from rolora_passes.learning import layer_by_layer, loop
from rolora_passes.learning.distributions import DISTRIBUTIONS, Distribution, kurtosis, whip
from rolora_passes.learning.layered import LayeredGraph
from rolora_passes.learning.samples import Samples, collect, find_sites
from rolora_passes.passes.base import Calibration

BOTH = pytest.mark.parametrize("loss", list(DISTRIBUTIONS))
LEARNED = ["R1", "model.layers.0.self_attn.R2", "model.layers.1.self_attn.R2"]


def learn(graph: fx.GraphModule, calibration: Calibration | None = None, **o: Any) -> fx.GraphModule:
    step = LearnRotation(**{"loss": "whip", "steps": 4, "batch": 16, "tokens": 128, "clip": None, **o})
    return apply_passes(graph, [step], calibration=calibration or windows())


def report(graph: fx.GraphModule) -> Any:
    return history(graph)[-1].report


def sampled(graph: fx.GraphModule, tokens: int = 128) -> dict[str, Samples]:
    bases = infer_bases(graph)
    classes = [c for c in bases.classes if c.kind in ("residual", "head")]
    sites = find_sites(graph, bases, classes)
    return {c.name: s for c, s in collect(graph, sites, windows(), tokens, 0, lambda: None)}


def test_whip_is_least_where_magnitudes_are_equal() -> None:
    assert float(whip(torch.tensor([[0.0, 2.0], [1.0, -1.0]]))) == pytest.approx(
        (1 + 2.718281828**-2 + 2 * 2.718281828**-1) / 2
    )
    assert float(whip(torch.tensor([1.0, -1.0]))) < float(whip(torch.tensor([0.0, 2**0.5])))


def test_kurtosis_is_zero_of_what_is_uniform() -> None:
    assert float(kurtosis(torch.linspace(-3, 1, 2001)[None])) < 1e-5
    assert float(kurtosis(torch.eye(100))) > 50
    assert float(kurtosis(torch.zeros(1, 8))) == pytest.approx(1.8)  # of an expert that read nothing


@BOTH
@pytest.mark.parametrize(("method", "lr"), [("cayley-adam", 1e-2), ("cayley-sgd", 1.5), ("qr-sgd", 1e-2)])
def test_the_loss_falls_and_the_function_stays(method: Any, lr: float, loss: str) -> None:
    graph = learn(opened(), loss=loss, method=method, lr=lr, steps=20)
    assert report(graph).changed == LEARNED
    assert all(last < first for first, last in report(graph).notes["matrices"].values())
    assert report(graph).notes["losses"][-1] < report(graph).notes["losses"][0]
    assert report(graph).notes["orthogonality_error"] < 1e-5
    assert difference(graph, sharp()) < 3e-5
    assert difference(apply_passes(graph, [FoldConstants()]), sharp()) < 3e-5
    for key in LEARNED:
        value = matrices(graph)[key]
        assert info(graph).rotations[key].method == "learned"
        assert float((value.T @ value - torch.eye(len(value))).abs().max()) < 1e-12


@BOTH
def test_what_it_makes_less_is_what_linears_then_read(loss: str) -> None:
    """The loss of the samples turned is the loss of samples of the graph that is learned."""
    graph = learn(opened(), loss=loss, steps=10)
    before, after = sampled(opened()), sampled(graph)
    for key, cls in (("R1", "residual"), (LEARNED[1], "head.0")):
        start, end = (dense(matrices(g)[key]).float() for g in (opened(), graph))
        turned = Distribution(loss, start)(before[cls], {"R": end})
        as_it_is = Distribution(loss, end)(after[cls], {"R": end})
        assert float(turned) == pytest.approx(float(as_it_is), rel=1e-4)
        assert float(turned) < float(Distribution(loss, start)(before[cls], {"R": start}))


def test_what_is_not_of_a_basis_is_left() -> None:
    left = dict(report(learn(opened())).left)
    assert set(left.values()) == {"learned end to end alone"}
    assert {key for key in matrices(opened()) if key not in LEARNED} == set(left)
    graph = learn(opened(), train="R2")
    assert report(graph).changed == LEARNED[1:]
    assert torch.equal(matrices(graph)["R1"], matrices(opened())["R1"])


def test_sites_are_what_linears_of_layers_read() -> None:
    graph = opened()
    bases = infer_bases(graph)
    (residual,) = (c for c in bases.classes if c.kind == "residual")
    found = find_sites(graph, bases, [residual])
    assert len(found) == 4  # of two layers, what attention and the MLP read; not what the head reads
    head = next(n for n in linears(graph) if any(u.op == "output" for u in n.users))
    assert head.args[0] not in {site.value for site in found}
    samples = sampled(graph)
    assert [s.shape for s in samples["residual"].sites] == [torch.Size([16, 8, 1, residual.size, 1])] * 4
    (heads,) = samples["head.0"].sites
    width = parameters(graph)["model.layers.0.self_attn.o_proj.weight"].shape[1]
    assert heads.shape[2] > 1 and heads.shape[2:].numel() == width


def leaves(loss: Tensor) -> list[Tensor]:
    """What a gradient of it would reach."""
    found, stack, seen = [], [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node.variable] if hasattr(node, "variable") else []
        stack += [below for below, _ in node.next_functions]
    return found


def test_no_gradient_goes_through_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[torch.Size] = []

    class Spy(Distribution):
        def __call__(self, rows: Samples, variables: Any) -> Tensor:
            assert not any(site.requires_grad for site in rows.sites)
            loss = super().__call__(rows, variables)
            reached.extend(leaf.shape for leaf in leaves(loss))
            return loss

    def refused(*_: Any) -> None:
        raise AssertionError("the model is cut for a backward pass")

    monkeypatch.setattr(layer_by_layer, "Distribution", Spy)
    monkeypatch.setattr(LayeredGraph, "__init__", refused)
    graph = opened()
    learn(graph, steps=2)
    assert len(reached) == 2 * len(LEARNED) and all(n == m for n, m in reached)
    assert all(value.grad is None for value in parameters(graph).values())


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "phi3", "gemma2", "mixtral", "gpt_neox"])
def test_architectures(name: str) -> None:
    graph = learn(opened(name), steps=2)
    assert report(graph).modified
    assert difference(graph, sharp(name)) < 3e-5


def test_a_graph_that_is_no_decoder() -> None:
    graph = apply_passes(captured("bert", torch.float32), [FuseNorm(), Rotate()])
    learned = learn(graph, Calibration(tokens_for(graph, 4, 16)))
    assert all(key.endswith("R2") for key in report(learned).changed) and report(learned).changed
    with pytest.raises(GraphFormatError, match="decoder"):
        learn(graph, Calibration(tokens_for(graph, 4, 16)), loss="distillation")


def test_equal_seeds_give_equal_matrices() -> None:
    first, second, other = (matrices(learn(opened(), seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["R1"], other["R1"])


class Stop(Exception):
    pass


def stopping(at: int) -> Callable[[str, int, int], None]:
    """Stops in the training of the last matrix, R1."""

    def progress(name: str, done: int, total: int) -> None:
        assert done <= total
        if "loss" in name and done == total - at:
            raise Stop

    return progress


@pytest.mark.parametrize("method", ["cayley-adam", "qr-sgd"])
def test_goes_on_to_the_identical_result(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": method, "steps": 6, "batch": 4}
    whole = learn(opened(), **options)
    monkeypatch.setattr(loop, "_SAVE_SECONDS", 0.0)
    with pytest.raises(Stop):
        learn(opened(), Calibration(windows(), tmp_path, stopping(3)), **options)
    assert len(list(tmp_path.glob("learn-rotation-*.pt"))) == 3
    told: list[str] = []
    again = learn(
        opened(), Calibration(windows(), tmp_path, lambda name, done, total: told.append(name)), **options
    )
    assert sum("loss" in name for name in told) == 3  # of 18 steps, those that were left
    first, second = matrices(whole), matrices(again)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert report(again).notes["losses"] == report(whole).notes["losses"]


def test_what_it_needs() -> None:
    with pytest.raises(PassError, match="tokens must be 1 or more"):
        LearnRotation(loss="whip", tokens=0)
    with pytest.raises(PassError, match="none reads"):
        learn(opened(), train="scale")
