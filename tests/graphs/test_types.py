"""In every type the same graph: the same nodes, the same sites, and the same function."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers as t
from architectures import BASE, CONFIGS, ENCODERS, FULL, SEQ2SEQ, tiny
from helpers import captured, check_exact, count, difference, exactly, model_of, tokens_for
from torch import fx

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes, history
from rolora_passes.errors import CaptureError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.capture.attention import static_experts
from rolora_passes.graphs.dtypes import convert, dtype_of
from rolora_passes.graphs.graph import is_op, op_name, parameters, set_tensor
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error

HALF = [torch.bfloat16, torch.float16]
EVERY = [torch.float64, torch.float32, *HALF]
# Gains of 1 + w, casts after the gain, tables in float32, routers, biases, norms without gain.
NAMES = (
    [*CONFIGS, *ENCODERS] if FULL else ["llama", "gemma3", "olmo2", "cohere", "mixtral", "gpt2", "modernbert"]
)


def operators(graph: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(node) for node in graph.graph.nodes)


def sites(graph: fx.GraphModule) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
    return [(r.name, r.report.changed, r.report.left) for r in history(graph)]


def test_a_branch_on_overflow_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"BartFor.* in torch\.float16 branches on the values it computes"):
        capture(tiny("bart", torch.float16))


@pytest.mark.parametrize("dtype", [*EVERY[:3]])
@pytest.mark.parametrize("name", SEQ2SEQ if FULL else ["bart"])
def test_encoders_with_decoders_have_the_same_sites(name: str, dtype: torch.dtype) -> None:
    passes = [FuseNorm(), Rotate(), InsertHadamard()]
    found = check_exact(captured(name, dtype), passes)
    expected = apply_passes(captured(name, torch.float32), passes, verify=False)
    assert sites(apply_passes(captured(name, dtype), passes, verify=False)) == sites(expected)
    assert operators(convert(found, torch.float32)) == operators(expected)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("name", NAMES)
def test_passes_find_the_same_sites_and_keep_the_function(name: str, dtype: torch.dtype) -> None:
    passes = [FuseNorm(), Rotate(), InsertHadamard(), AddLoRA(rank=2)]
    expected = apply_passes(captured(name, torch.float32), [*passes, FoldConstants()], verify=False)
    check_exact(captured(name, dtype), passes)
    found = apply_passes(captured(name, dtype), [*passes, FoldConstants()])
    assert sites(found) == sites(expected)
    tokens = tokens_for(found)
    assert run(found, tokens).dtype == run(captured(name, dtype), tokens).dtype


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_converted_it_is_what_float32_captures(name: str, dtype: torch.dtype) -> None:
    wide = convert(captured(name, dtype), torch.float32)
    assert operators(wide) == operators(captured(name, torch.float32))
    assert {v.dtype for v in parameters(wide).values() if v.is_floating_point()} == {torch.float32}
    assert relative_error(run(wide, tokens_for(wide)).double(), exactly(wide, tokens_for(wide))) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "cohere", "gpt2"])
def test_half_precision_is_as_near_as_the_models(name: str) -> None:
    """A gain apart from its norm rounds once more than some models do, and 1 + w is rounded: 1.4 at most."""
    graph, model, wide = (
        captured(name, torch.bfloat16),
        model_of(name, torch.bfloat16),
        tiny(name, torch.bfloat16),
    )
    tokens = tokens_for(graph, 8, 16)
    with torch.no_grad(), static_experts(model):
        expected, own = wide.float()(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits
    found = run(graph, tokens)
    assert found.dtype == own.dtype
    assert (found - expected).norm() < 1.6 * (own - expected).norm()


def test_angles_stay_in_float32() -> None:
    graph = convert(captured("llama", torch.float32), torch.bfloat16)
    assert dtype_of(graph) == torch.bfloat16
    kept = [name for name, value in parameters(graph).items() if value.dtype == torch.float32]
    assert kept == ["model.rotary_emb.inv_freq"]
    late = tokens_for(graph, 1, 48)
    assert relative_error(run(graph, late).double(), exactly(captured("llama", torch.float32), late)) < 0.05


def test_a_router_keeps_float32_through_folding() -> None:
    sizes = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
    }
    config = t.Glm4MoeConfig(**BASE, **sizes, first_k_dense_replace=0, n_group=1, topk_group=1)
    torch.manual_seed(0)
    graph = capture(t.Glm4MoeForCausalLM(config).to(torch.bfloat16).eval())
    routers = [
        n.args[1] for n in graph.graph.nodes if is_op(n, "linear") and "mlp_gate_weight" in str(n.args[1])
    ]
    assert routers
    folded = apply_passes(graph, [FuseNorm(), FoldConstants()])
    kinds = {
        k: v.dtype for k, v in parameters(folded).items() if v.is_floating_point() and ".gate.weight" in k
    }
    assert set(kinds.values()) == {torch.float32}
    assert run(folded, tokens_for(folded)).isfinite().all()
    assert relative_error(run(folded, tokens_for(folded)), run(graph, tokens_for(graph))) < 0.1


def test_folding_evaluates_through_casts() -> None:
    """1 + w of a gain in bfloat16 is rounded where the graph says so, but not inside W * (1 + w)."""
    graph = apply_passes(captured("gemma", torch.bfloat16), [FuseNorm()])
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = parameters(captured("gemma", torch.bfloat16))
    gain = 1 + plain["model.layers.0.input_layernorm.weight"].double()
    found = parameters(apply_passes(graph, [FoldConstants()]))[name]
    assert torch.equal(found, (plain[name].double() * gain).to(torch.bfloat16))
    assert difference(apply_passes(graph, [FoldConstants()]), captured("gemma", torch.bfloat16)) < 0.03


def test_a_wider_parameter_is_not_narrowed_by_conversion() -> None:
    graph = convert(captured("llama", torch.float32), torch.bfloat16)
    name = "model.norm.weight"
    set_tensor(graph, name, parameters(graph)[name].float())
    assert parameters(convert(graph, torch.float16))[name].dtype == torch.float32
    assert parameters(convert(graph, torch.float64))[name].dtype == torch.float64
    assert count(convert(graph, torch.float32), "to") == count(captured("llama", torch.float32), "to")


def test_a_graph_in_float64_converts_to_what_kernels_compute_in() -> None:
    """Its rotary angles too, which need no more than float32: the lowerings take nothing wider."""
    graph = convert(captured("llama", torch.float64), torch.float32)
    assert {v.dtype for v in parameters(graph).values()} == {torch.float32}
    assert operators(graph) == operators(captured("llama", torch.float32))
    written = [arg for node in graph.graph.nodes for arg in (*node.args, *node.kwargs.values())]
    assert torch.float64 not in written
