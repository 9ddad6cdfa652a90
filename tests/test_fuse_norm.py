"""FuseNorm moves every gain that can move, keeps the function, and says why it left the others."""

from __future__ import annotations

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, check_exact, check_idempotent, count
from torch import fx

from rolora_passes import FoldConstants, FuseNorm, Rotate, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.expressions import Expressions
from rolora_passes.graphs.graph import constants, copy_graph, finish, is_op, leaves, parameters
from rolora_passes.passes.base import Report

LAYER_NORM = ["opt", "gpt2", "phi", "gpt_neox", "cohere", "starcoder2", "stablelm"]
# Gains that must stay: before rotary embedding (q and k norms), and every one of a model with gains after the
# sublayers, which pin its residual stream (Gemma 2, Gemma 3, OLMo 2).
STAY = {"qwen3": 4, "gemma2": 9, "gemma3": 13, "olmo2": 9}


def report_of(graph: fx.GraphModule, name: str = "fuse-norm") -> Report:
    return next(r.report for r in history(graph) if r.name == name)


def gains(graph: fx.GraphModule) -> list[fx.Node]:
    """Multiplications of a norm's result by something constant."""
    known = constants(graph)
    return [
        n
        for n in graph.graph.nodes
        if is_op(n, "mul") and any(is_op(a, "rms_norm", "layer_norm") for a in n.args) and known & {*n.args}
    ]


@pytest.mark.parametrize("tied", ["untie", "keep"])
@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_keeps_the_function(name: str, tied: str) -> None:
    graph = check_exact(captured(name), [FuseNorm(tied=tied)])  # type: ignore[arg-type]
    check_exact(graph, [FoldConstants()])


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_leaves_the_gains_it_reports_and_no_other(name: str) -> None:
    graph = apply_passes(captured(name), [FuseNorm()])
    report = report_of(graph)
    assert len(gains(graph)) == len(report.left) == STAY.get(name, 0), report.left
    assert all(reason for _, reason in report.left)


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_finds_nothing_left_to_do(name: str) -> None:
    check_idempotent(apply_passes(captured(name), [FuseNorm()]), FuseNorm())


@pytest.mark.parametrize("name", LAYER_NORM)
def test_layer_norms_become_rms_norms(name: str) -> None:
    before = captured(name)
    after = apply_passes(before, [FuseNorm()])
    assert count(before, "layer_norm") and not count(before, "rms_norm")
    assert count(after, "rms_norm") == count(before, "layer_norm") and not count(after, "layer_norm")


def test_rms_norms_get_no_centring() -> None:
    after = apply_passes(captured("llama"), [FuseNorm()])
    assert not count(after, "mean", "sub")


def test_what_a_llama_becomes() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm()])
    norms = [n for n in graph.graph.nodes if is_op(n, "rms_norm")]
    assert [sorted(u.args[1].args[0].target.split(".")[-2] for u in n.users) for n in norms] == [
        ["k_proj", "q_proj", "v_proj"], ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"], ["gate_proj", "up_proj"], ["lm_head"],
    ]  # fmt: skip
    for norm in norms:
        for user in norm.users:
            scaled = user.args[1]
            assert is_op(user, "linear") and is_op(scaled, "mul") and "norm" in scaled.args[1].target


def test_where_post_norms_pin_the_stream_every_gain_is_left_with_the_reason() -> None:
    left = dict(report_of(apply_passes(captured("gemma2"), [FuseNorm()])).left)
    for name in (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ):  # other norms read what they write
        assert left[f"model.layers.1.{name}.weight"].startswith("rms_norm")
    name = "model.layers.0.input_layernorm.weight"  # could move, for nothing
    assert (
        left[name].startswith("moving it frees no rotation: mul") and "post_attention_layernorm" in left[name]
    )


def test_a_table_is_untied_only_for_a_gain_that_moves() -> None:
    """Gemma 2 is tied: with its gains in place, the head can go on reading the embedding's table."""
    before = captured("gemma2")
    after = apply_passes(before, [FuseNorm(), FoldConstants()])
    assert parameters(after).keys() == parameters(apply_passes(before, [FoldConstants()])).keys()


class PostNorm(torch.nn.Module):
    """Two streams: the first has a gain after its sublayer, the second has not."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"dtype": dtype}
        self.first, self.second = (torch.nn.Embedding(13, 8, **options) for _ in range(2))
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(8, eps=1e-6, **options) for _ in range(4))
        self.linears = torch.nn.ModuleList(torch.nn.Linear(8, 8, **options) for _ in range(2))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 13, **options) for _ in range(2))
        for norm in self.norms:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x, y = self.first(tokens), self.second(tokens)
        x = x + self.norms[1](self.linears[0](self.norms[0](x)))
        y = y + self.linears[1](self.norms[2](y))
        x = torch.nn.functional.rms_norm(x, (8,), None, 1e-6)
        logits: torch.Tensor = self.heads[0](x) + self.heads[1](self.norms[3](y))
        return logits


def test_each_stream_is_judged_by_itself() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(
        PostNorm(), (tokens, torch.arange(3).expand(2, 3)), dynamic_shapes=(dims, dims)
    )
    graph = apply_passes(program, [FuseNorm()])
    assert history(graph)[-1].error is not None and history(graph)[-1].error < 1e-12
    report = report_of(graph)
    assert report.changed == ["norms.2.weight", "norms.3.weight"]
    assert [name for name, _ in report.left] == ["norms.0.weight", "norms.1.weight"]
    assert len(history(apply_passes(graph, [Rotate()]))[-1].report.changed) == 1


def test_untying_gives_the_head_its_own_table() -> None:
    graph = apply_passes(captured("llama-tied"), [FuseNorm(), FoldConstants()])
    tables = [name for name, value in parameters(graph).items() if tuple(value.shape) == (97, 24)]
    assert len(tables) == 2
    assert any("untied" in line for line in report_of(graph).changed)


def test_keeping_the_table_tied_costs_one_small_dense_matrix() -> None:
    before = captured("llama-tied")
    graph = check_exact(before, [FuseNorm(tied="keep"), Rotate(), FoldConstants()])
    shapes = [tuple(value.shape) for value in parameters(graph).values()]
    assert shapes.count((97, 24)) == 1
    assert shapes.count((24, 24)) == 1
    assert count(graph, "linear") == count(before, "linear") + 1


def test_a_layer_norm_model_cannot_keep_its_table_tied_and_says_so() -> None:
    graph = apply_passes(captured("gpt2"), [FuseNorm(tied="keep")])
    assert any("untied" in reason for _, reason in report_of(graph).left)


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match="'untie' or 'keep', found 'both'"):
        FuseNorm(tied="both")  # type: ignore[arg-type]


class Flat(torch.nn.Module):
    """The second LayerNorm's output is flattened before a linear reads it, as a mixture's is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(13, 8), torch.nn.Linear(8, 13)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(8) for _ in range(2))
        self.linears = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        for norm in self.norms:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
            torch.nn.init.normal_(norm.bias)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.linears[0](self.norms[0](x))
        flat = self.norms[1](x).view(-1, 8)
        x = x + self.linears[1](flat).view(x.shape)
        logits: torch.Tensor = self.head(torch.nn.functional.layer_norm(x, (8,)))
        return logits


def test_a_norm_that_stays_keeps_the_others_of_its_stream() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    model = Flat().eval()
    program = torch.export.export(model, (tokens, torch.arange(3).expand(2, 3)), dynamic_shapes=(dims, dims))
    graph = apply_passes(program, [FuseNorm()])  # verified
    assert not report_of(graph).changed and report_of(graph).left
    assert count(graph, "layer_norm") == 3


@pytest.mark.parametrize("name", ["llama-tied", "gemma"])
def test_a_tied_table_keeps_what_was_written_about_it_when_the_head_gets_its_own(name: str) -> None:
    graph = copy_graph(captured(name))
    tables = {a.target for n in graph.graph.nodes if is_op(n, "embedding") for a in n.args[:1]}
    (leaf,) = (n for n in leaves(graph) if n.target in tables)
    Expressions(graph).wrap(leaf, torch.ops.aten.mul.Tensor, 0.5)
    finish(graph)
    check_exact(graph, [FuseNorm()])
