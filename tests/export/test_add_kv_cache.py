"""AddKVCache: the graph with caches computes what the plain one does, and lowers as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import tiny_wide
from tiny_llama import tiny_llama

from rolora_passes import apply_passes, history
from rolora_passes.errors import CaptureError, LoweringError, PassOrderError
from rolora_passes.export import AddKVCache, to_executorch
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import get_tensor, is_op, parameters, set_tensor
from rolora_passes.graphs.running import run


def test_a_graph_with_caches(tmp_path: Path) -> None:
    plain = tiny_llama()
    cached = apply_passes(plain, [AddKVCache(max_length=16)])
    (record,) = history(cached)
    assert record.error is not None
    assert record.error < 1e-5
    assert len(record.report.changed) == 2
    assert [n.name for n in cached.graph.find_nodes(op="placeholder")] == ["tokens", "input_pos"]
    to_executorch(cached, tmp_path / "model.pte")
    tokens = torch.arange(9)[None]
    found = load_pte(tmp_path / "model.pte")(tokens, torch.tensor([0]))
    torch.testing.assert_close(found[:, -1], plain(tokens, tokens)[:, -1], atol=1e-5, rtol=0)


def test_errors() -> None:
    plain = tiny_llama()
    with pytest.raises(PassOrderError, match="already 'kv cache'"):
        apply_passes(plain, [AddKVCache(), "add-kv-cache"])
    with pytest.raises(LoweringError, match="at least 16 tokens, found max_length 1"):
        AddKVCache(max_length=1)


def test_weights_are_never_written(tmp_path: Path) -> None:
    """Whatever they are called: caches are what the pass made."""
    plain = tiny_llama(layers=1)
    renamed = {"layers.0.down.weight": "layers.0.cached.weight", "layers.0.up.weight": "cache.key_0"}
    for node in plain.graph.find_nodes(op="get_attr"):
        if node.target in renamed:
            set_tensor(plain, renamed[node.target], get_tensor(plain, node.target))
            node.target = renamed[node.target]
    plain.recompile()
    before = {name: value.clone() for name, value in parameters(plain).items()}
    cached = apply_passes(plain, [AddKVCache(max_length=16)])
    to_executorch(plain, tmp_path / "model.pte", max_length=16)
    for graph in (plain, cached):
        found = parameters(graph)
        assert all(torch.equal(found[name], before[name]) for name in before if name in found)
        assert "cache.key_0" in found


def test_expressions_are_folded_before_there_are_caches() -> None:
    graph = apply_passes(capture(tiny_wide()), ["fuse-norm", "rotate", AddKVCache(max_length=16)])
    assert not any(is_op(n, "rotate") for n in graph.graph.nodes)


def test_longrope_is_what_the_model_takes_at_the_programs_length(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + i / 9 for i in range(4)], "long_factor": [1.0 + i for i in range(4)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20, **factors}
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.Phi3Config(
        **sizes,
        **heads,
        original_max_position_embeddings=20,
        max_position_embeddings=64,
        rope_parameters=rope,
    )
    model = transformers.Phi3ForCausalLM(config).eval()
    graph = capture(model)
    tokens = torch.arange(32)[None]
    for length, count in ((20, 12), (48, 32)):
        with torch.no_grad():
            expected = model(tokens[:, :count], use_cache=False).logits
        torch.testing.assert_close(run(graph, tokens[:, :count]), expected, atol=1e-5, rtol=0)
        to_executorch(graph, tmp_path / "model.pte", max_length=length)
        found = load_pte(tmp_path / "model.pte")(tokens[:, :count], torch.tensor([0]))
        torch.testing.assert_close(found[:, -1], expected[:, -1], atol=1e-5, rtol=0)


def test_a_rope_that_grows_with_the_text_is_refused_by_its_type() -> None:
    model = tiny_wide()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(CaptureError, match=r"of type 'dynamic'"):
        capture(transformers.LlamaForCausalLM(model.config).eval())
