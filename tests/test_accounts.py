"""Every parameter of a graph is in a quantizer's report: at so many bits, or left with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import transformers as t
from architectures import CONFIGS, ENCODERS, UNTIED, chosen
from helpers import captured
from torch import fx, nn

from rolora_passes import (
    FoldConstants,
    QuantizeActivations,
    QuantizeEmbedding,
    QuantizeWeights,
    apply_passes,
    history,
)
from rolora_passes.graphs.accounting import weigh
from rolora_passes.graphs.capture import capture, from_exported
from rolora_passes.graphs.graph import is_op, parameters, site_names
from rolora_passes.graphs.sites import heads, routers

EXPERTS = {**UNTIED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES: dict[str, Callable[[], t.PretrainedConfig]] = {
    "mixtral": CONFIGS["mixtral"],
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**EXPERTS, num_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    "olmoe": lambda: t.OlmoeConfig(**{**UNTIED, "hidden_size": 32}, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": lambda: t.Glm4MoeConfig(
        **EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
}


@functools.cache
def mixture(name: str) -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(t.AutoModelForCausalLM.from_config(MIXTURES[name]()).eval())


def accounted(graph: fx.GraphModule, folded: fx.GraphModule) -> dict[str, str]:
    """What became of every parameter of a graph by a folded, quantized one: "bits", "left", "vector"."""
    changed = " ".join(entry for record in history(folded) for entry in record.report.changed)
    left = {site: reason for record in history(folded) for site, reason in record.report.left}
    assert all(reason for reason in left.values())
    stored, found = parameters(folded), {}
    for name, value in parameters(graph).items():
        if not value.is_floating_point():
            continue
        site = name.removesuffix(".weight")
        if f"{name}_q" in stored:
            assert site in changed, name
            found[name] = "bits"
        elif any(site == entry.removesuffix(".weight") for entry in left):
            found[name] = "left"
        else:
            assert value.dim() < 2, f"{name} is in no report"
            found[name] = "vector"
    return found


# What no linear reads as its weight, nor an embedding as its table.
OTHERS = (".mlp.gate.weight", ".shared_expert_gate.weight", ".gate_up_proj", "experts.down_proj")
LEFT = {
    "bart": {"final_logits_bias"},
    "deberta": {"deberta.encoder.rel_embeddings.weight"},
    "deberta-bare": {"encoder.rel_embeddings.weight", "encoder.conv.conv.weight"},
}
QUANTIZERS = [QuantizeWeights(4, None), QuantizeEmbedding(), FoldConstants()]


@pytest.mark.parametrize("name", [*chosen(CONFIGS), *chosen(ENCODERS), "bart", *MIXTURES])
def test_every_parameter_is_accounted_for(name: str) -> None:
    """At so many bits, left with the reason, or one of the vectors; and the numbers add up to the model's."""
    graph = mixture(name) if name in MIXTURES else captured(name, torch.float32)
    folded = apply_passes(graph, QUANTIZERS)
    found = accounted(graph, folded)
    elements = {n: v.numel() for n, v in parameters(graph).items() if n in found}
    weights, embedding, _ = history(folded)
    vectors = {n: elements[n] for n, how in found.items() if how == "vector"}
    assert weights.report.notes["vectors"] == {
        "parameters": len(vectors),
        "elements": sum(vectors.values()),
    }
    left = [n for n, how in found.items() if how == "left"]
    assert weights.report.changed
    assert all(n.endswith(OTHERS) for n in left) if name in MIXTURES else {*left} == LEFT.get(name, set())
    # A tied table is in the graph twice afterwards: at 8 bits for the embedding, at 4 for the head.
    twice = elements.keys() & {e.partition(":")[0] for e in embedding.report.changed if "copy" in e}
    if not name.startswith("deberta"):  # some of its linears are constants, which folding evaluates
        assert weigh(folded).elements == sum(elements.values()) + sum(elements[n] for n in twice)


@pytest.mark.parametrize("name", list(MIXTURES))
def test_routers_and_experts_stay_in_floating_point_and_say_so(name: str) -> None:
    graph = mixture(name)
    names = site_names(graph)
    found = {names[node] for node in routers(graph)}
    first = 1 if name == "glm4_moe" else 0
    assert found == {f"model.layers.{i}.mlp.gate" for i in range(first, 2)}
    folded = apply_passes(graph, [*QUANTIZERS, QuantizeActivations()])
    left = dict(history(folded)[0].report.left)
    experts = [name for name in parameters(graph) if "experts" in name and parameters(graph)[name].dim() == 3]
    assert experts and all("4 matrices in one" in left[expert] for expert in experts)
    for node, site in site_names(folded).items():
        gate = site in found or site.endswith("shared_expert_gate")
        assert gate == (node.args[1].op == "get_attr") == (not is_op(node.args[0], "fake_quantize"))
        assert not gate or "name it in targets" in left[site]


def test_a_router_is_quantized_when_it_is_named() -> None:
    graph = apply_passes(mixture("mixtral"), [QuantizeWeights(8, None, targets=("mlp.gate",))])
    report = history(graph)[-1].report
    assert [entry.partition(":")[0] for entry in report.changed] == [
        f"model.layers.{i}.mlp.gate" for i in (0, 1)
    ]
    both = apply_passes(mixture("mixtral"), [QuantizeWeights(8, None, targets=("all-linear", "mlp.gate"))])
    assert len(history(both)[-1].report.changed) == 11


def test_routers_are_found_by_what_is_chosen_with_them() -> None:
    """Through sigmoids, biases, groups and masks, whatever their names; an MLP beside them is none."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.plain = nn.Embedding(97, 16), nn.Linear(16, 16)
            self.first, self.second, self.head = nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(16, 97)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            scores = self.first(x).sigmoid() + 0.5
            groups = scores.unflatten(-1, (2, 2)).topk(2, -1).values.sum(-1)
            x = x + self.plain(x).relu() * groups.argmax(-1, keepdim=True)
            best = self.second(x).softmax(-1).argmax(-1)
            return self.head(x + nn.functional.one_hot(best, 16).to(x.dtype))  # type: ignore[no-any-return]

    graph = exported(Mixture())
    names = site_names(graph)
    assert {names[node] for node in routers(graph)} == {"first", "second"}
    assert {names[node] for node in heads(graph.graph)} == {"head"}


def exported(module: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = {"tokens": torch.zeros(2, 6, dtype=torch.int64)}
    return from_exported(torch.export.export(module.eval(), (), example, dynamic_shapes={"tokens": any_size}))


class Stream(nn.Module):
    """An encoder that returns its residual stream, or what a head and something else make of it."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.ending, self.embed = ending, nn.Embedding(97, 16)
        self.up = nn.ModuleList([nn.Linear(16, 32) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(32, 16) for _ in range(2)])
        self.dense, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(nn.functional.rms_norm(x, (16,), None, 1e-6))))
        if self.ending == "scaled":
            return x * 0.5
        if self.ending == "gated":
            return self.head(x) * self.up[0](x)[..., :5].sigmoid()
        x = self.dense(x) if self.ending == "dense" else x
        return {
            "head": self.head,
            "dense": self.head,
            "capped": lambda x: 30 * torch.tanh(self.head(x) / 30),
            "pooled": lambda x: self.head(x[:, 0]).softmax(-1),
            "stream": lambda x: x,
        }[self.ending](x)


@pytest.mark.parametrize("ending", ["stream", "scaled", "gated", "head", "dense", "capped", "pooled"])
def test_what_makes_the_output_is_the_head(ending: str) -> None:
    graph = exported(Stream(ending))
    names = site_names(graph)
    headless = ending in ("stream", "scaled", "gated")
    assert [names[node] for node in heads(graph.graph)] == ([] if headless else ["head"])
    report = history(apply_passes(graph, [QuantizeWeights(8, None, head=None)]))[-1].report
    assert len(report.changed) == len(names) - (not headless)


@pytest.mark.parametrize("name", [*chosen(CONFIGS), *chosen(ENCODERS), "bart"])
def test_models_have_one_head_or_none(name: str) -> None:
    graph = captured(name, torch.float32)
    assert len(heads(graph.graph)) == (not name.endswith("bare"))


def test_a_branch_beside_the_head_is_of_the_head() -> None:
    """With an adapter on the head, its base is the head still."""

    class Branched(Stream):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            return self.head(x) + self.down[0](self.up[0](x))[..., :5] * 2.0

    graph = exported(Branched("head"))
    assert "head" in {site_names(graph)[node] for node in heads(graph.graph)}
