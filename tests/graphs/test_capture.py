"""A captured graph computes what the model computes, for every architecture, batch and length."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as t
from architectures import BASE, CONFIGS, UNTIED, chosen, tiny
from helpers import captured, count, everything_in_float64, model_of, tokens_for
from torch import fx

from rolora_passes.errors import CaptureError
from rolora_passes.graphs.capture import _static_experts, capture
from rolora_passes.graphs.capture.canonical import canonicalize
from rolora_passes.graphs.capture.masks import Mask, Masks
from rolora_passes.graphs.graph import (
    constants,
    copy_graph,
    insert,
    insert_after,
    is_op,
    linears,
    op_name,
    parameters,
)
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import run, values
from rolora_passes.graphs.shapes import BATCH, SEQUENCE, infer_shapes
from rolora_passes.graphs.verify import relative_error

# Per layer: linears, and norms; at the end: one head, one norm.
LINEARS = dict.fromkeys(CONFIGS, 7) | {
    "phi": 6,
    "opt": 6,
    "gpt2": 6,
    "gpt_neox": 6,
    "starcoder2": 6,
    "mixtral": 5,
}
NORMS = dict.fromkeys(CONFIGS, 2) | {
    "qwen3": 4, "gemma2": 4, "gemma3": 6, "phi": 1, "cohere": 1, "olmo2": 4,
}  # fmt: skip
LAYER_NORMS = {"opt", "gpt2", "gpt_neox", "phi", "cohere", "starcoder2", "stablelm"}
WITHOUT_ROTARY = {"opt": 2, "gpt2": 2}


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_float32_logits_equal_the_models(name: str) -> None:
    graph, model = captured(name, torch.float32), model_of(name, torch.float32)
    tokens = tokens_for(graph)
    with torch.no_grad(), _static_experts(model):
        assert relative_error(run(graph, tokens), model(tokens, use_cache=False).logits) < 1e-6


@pytest.mark.parametrize("name", chosen(CONFIGS))
@pytest.mark.parametrize(("batch", "length"), [(3, 9), (1, 1), (1, 23), (2, 2)])
def test_float64_logits_equal_the_models_run_in_float64(name: str, batch: int, length: int) -> None:
    graph, model = captured(name), model_of(name)
    tokens = tokens_for(graph, batch, length)
    with torch.no_grad(), _static_experts(model), everything_in_float64():
        expected = model(tokens, use_cache=False).logits
    assert expected.dtype == torch.float64
    assert relative_error(run(graph, tokens), expected) < 1e-12


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_nothing_is_left_of_the_capture(name: str) -> None:
    graph = captured(name)
    left = ("_assert", "sym_constrain", "_guards", "dropout", "alias", "detach", "clone", "wrap_with")
    left += () if name in ("opt", "mixtral") else ("sym_size",)  # they make tables of the input's size
    for node in graph.graph.nodes:
        assert node.op in ("get_attr", "placeholder", "call_function", "output")
        assert not op_name(node).startswith(left), node.format_node()
        assert not (node.op == "call_function" and not node.users), f"{node} has no use"
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
    assert all(not value.is_meta and value.dtype != torch.float32 for value in parameters(graph).values())


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_no_cast_to_the_type_a_value_has(name: str) -> None:
    graph = captured(name, torch.float32)

    class Casts(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if is_op(n, "to", "_to_copy", "type_as"):
                assert value.dtype != self.env[n.args[0]].dtype, n.format_node()  # type: ignore[attr-defined,index]
            return value

    tokens = tokens_for(graph)
    Casts(graph).run(tokens, torch.arange(9).expand(3, 9))


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_composites_are_one_node_each(name: str) -> None:
    graph = captured(name)
    norm = "layer_norm" if name in LAYER_NORMS else "rms_norm"
    assert count(graph, "attention") == 2
    assert count(graph, "rotary_embedding") == 4 - 2 * WITHOUT_ROTARY.get(name, {"smollm3": 0}.get(name, 0))
    assert count(graph, "rms_norm", "layer_norm") == count(graph, norm) == 2 * NORMS[name] + 1
    assert len(linears(graph)) == 2 * LINEARS[name] + 1
    assert not count(graph, "addmm", "chunk", "split", "scaled_dot_product_attention", "rsqrt", "var")
    assert all(n.args[2] is None for n in graph.graph.nodes if is_op(n, "rms_norm", "layer_norm"))


def test_attention_keeps_window_scale_and_soft_cap() -> None:
    graph = captured("gemma2")
    first, second = (n.args[3:] for n in graph.graph.nodes if is_op(n, "attention"))
    assert first == (8**-0.5, True, 4, 50.0)
    assert second == (8**-0.5, True, None, 50.0)


def test_parameters_keep_names_and_are_shared_with_the_model() -> None:
    model = tiny("llama")
    known = dict(model.named_parameters())
    found = parameters(capture(model))
    assert set(known) <= set(found)
    assert all(found[name].data_ptr() == known[name].data_ptr() for name in known)


def test_capture_leaves_the_model_as_it_was() -> None:
    model = tiny("llama", torch.float32).train()
    before = model.config._attn_implementation
    capture(model)
    assert model.training and model.config._attn_implementation == before


def test_capture_records_what_later_stages_need() -> None:
    config = info(captured("llama")).config
    assert (
        config["vocab_size"] == 97 and config["max_position_embeddings"] == 64 and config["eos_token_id"] == 2
    )


def test_not_a_language_model() -> None:
    with pytest.raises(CaptureError, match=r"found causal attention in LlamaAttention.*AutoModelForCausalLM"):
        capture(t.LlamaModel(t.LlamaConfig(**BASE)))
    with pytest.raises(CaptureError, match=r"found Linear"):
        capture(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value: float) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(
        CaptureError, match=r"1 NaN or infinite values in model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        capture(model)


def test_bidirectional_attention_is_refused() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(CaptureError, match="bidirectional"):
        capture(model)


def test_a_graph_that_disagrees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["rolora_passes.graphs.capture"]

    def wrong(exported: torch.nn.Module) -> fx.GraphModule:
        graph = canonicalize(exported)
        next(n for n in graph.graph.nodes if is_op(n, "attention")).update_arg(3, 0.5)
        graph.recompile()
        return graph

    monkeypatch.setattr(module, "canonicalize", wrong)
    with pytest.raises(CaptureError, match="relative difference"):
        capture(tiny("llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "bart"])
def test_every_node_says_where_in_the_model_it_comes_from(name: str) -> None:
    graph = copy_graph(captured(name))
    parts = constants(graph)  # rows of a fused weight: made here, like sizes
    for node in graph.graph.nodes:
        assert node.meta.keys() <= {"source"}
        if node.op == "call_function" and node not in parts and not is_op(node, "sym_size"):
            assert re.fullmatch(r"\w+\.py:\d+: .+", node.meta["source"]), node.format_node()
    sources = {
        n.meta["source"] for n in graph.graph.nodes if is_op(n, "attention", "rms_norm", "rotary_embedding")
    }
    assert all(source.startswith("modeling_") for source in sources)


def test_what_a_pass_inserts_takes_the_source_of_its_place() -> None:
    graph = copy_graph(captured("llama"))
    norm = next(n for n in graph.graph.nodes if is_op(n, "rms_norm"))
    assert "rsqrt" in norm.meta["source"]
    for new in (insert(graph, norm, torch.neg, norm.args[0]), insert_after(graph, norm, torch.neg, norm)):
        assert new.meta["source"] == norm.meta["source"]
    assert "source" not in insert_after(graph, next(iter(graph.graph.nodes)), torch.neg).meta


def test_the_name_of_a_model_is_not_where_it_lay(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config._name_or_path = str(tmp_path / "my-model")
    assert info(capture(model, check=False)).config["name"] == "my-model"
    model.config._name_or_path = "somebody/their-model"
    assert info(capture(model, check=False)).config["name"] == "somebody/their-model"


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "opt"])
def test_inferred_shapes_are_those_of_the_values(name: str) -> None:
    graph = captured(name)
    shapes, sizes = infer_shapes(graph), {BATCH: 3, SEQUENCE: 9, BATCH * SEQUENCE: 27}
    for node, value in values(graph, tokens_for(graph)):
        if isinstance(value, torch.Tensor):
            found = shapes[node]
            assert ([sizes.get(n, n) for n in found.shape], found.dtype) == ([*value.shape], value.dtype)


def test_the_mask_decides_what_is_seen() -> None:
    """OLMoE tells its attention of a window that its mask does not have."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2}
    model = t.OlmoeForCausalLM(t.OlmoeConfig(**UNTIED | {"head_dim": 6}, **sizes, sliding_window=16)).eval()
    graph = capture(model)
    assert {len(n.args) for n in graph.graph.nodes if is_op(n, "attention")} == {4}  # causal, no window
    tokens = tokens_for(graph, 2, 40)
    with torch.no_grad(), _static_experts(model):
        assert relative_error(run(graph, tokens), model(tokens, use_cache=False).logits) < 1e-5


def test_a_window_longer_than_twelve_tokens_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["rolora_passes.graphs.capture"]

    def wrong(exported: torch.nn.Module) -> fx.GraphModule:
        graph = canonicalize(exported)
        next(n for n in graph.graph.nodes if is_op(n, "attention")).update_arg(5, 17)
        graph.recompile()
        return graph

    model = t.MistralForCausalLM(t.MistralConfig(**UNTIED, sliding_window=16)).eval()
    capture(model)
    monkeypatch.setattr(module, "canonicalize", wrong)
    with pytest.raises(CaptureError, match="relative difference"):
        capture(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_nothing_from_the_check(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["rolora_passes.graphs.capture"]

    def wrong(exported: torch.nn.Module) -> fx.GraphModule:
        graph = canonicalize(exported)
        attention = next(n for n in graph.graph.nodes if is_op(n, "attention"))
        attention.update_arg(3, attention.args[3] * 1.05)  # type: ignore[operator]
        graph.recompile()
        return graph

    monkeypatch.setattr(module, "canonicalize", wrong)
    with pytest.raises(CaptureError, match="relative difference"):
        capture(tiny("llama", dtype))


def test_what_attention_is_given_and_is_not_known_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "inverted": True}), with_kwargs=True
    )
    with pytest.raises(CaptureError, match=r"LlamaAttention passes \['inverted'\] to attention"):
        capture(model)


def test_chunked_attention_is_refused() -> None:
    def chunks(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key // 8 == query // 8)

    def alternate(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & ((query - key) % 2 == 0)

    for function in (chunks, alternate):
        assert "neither causal nor a sliding window" in str(Masks()(mask_function=function).other)
    assert Masks()(mask_function=lambda b, h, q, k: k <= q) == Mask(True, None)
    assert Masks()(mask_function=lambda b, h, q, k: (k <= q) & (k > q - 9), local_size=9) == Mask(True, 9)
    assert Masks()(mask_function=lambda b, h, q, k: (q - k).abs() <= 4) == Mask(False, 5)
    assert Masks()(mask_function=lambda b, h, q, k: q >= 0) == Mask(False, None)


def test_every_module_goes_back_to_its_own_mode() -> None:
    model = tiny("llama", torch.float32).train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    capture(model)
    assert [m.training for m in model.modules()] == before


def test_captures_in_threads_wait_for_each_other() -> None:
    with ThreadPoolExecutor(2) as pool:
        decoder, encoder = pool.map(lambda name: capture(tiny(name)), ["llama", "modernbert"])
    causal = [
        [n.args[4] for n in g.graph.nodes if is_op(n, "attention") and len(n.args) > 4]
        for g in (decoder, encoder)
    ]
    assert causal == [[], [False, False]]


def test_angles_that_depend_on_the_length_are_refused_by_name() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(CaptureError, match="rotary embedding of LlamaForCausalLM is of type 'dynamic'"):
        capture(t.LlamaForCausalLM(t.LlamaConfig(**UNTIED, rope_parameters=rope)))
