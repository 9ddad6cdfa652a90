"""AddKVCache: the graph with caches computes what the plain one does, and lowers as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

from rolora_passes import apply_passes, history
from rolora_passes.errors import LoweringError, PassOrderError
from rolora_passes.export import AddKVCache, to_executorch
from rolora_passes.export.runner import load_pte


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
