"""What computes every node of a graph is known before anything is written: each value once, and in order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from architectures import tiny_wide
from helpers import captured
from torch import fx

from rolora_passes import apply_passes
from rolora_passes.export.fuse_heads import fuse_heads
from rolora_passes.export.onnx.emitter import Match
from rolora_passes.export.onnx.matching import match_all
from rolora_passes.export.onnx.ort import ORT
from rolora_passes.export.onnx.portable import PORTABLE
from rolora_passes.export.onnx.prepared import Prepared
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import copy_graph, is_op, op_name

FLAVORS = {"ort": ORT, "portable": PORTABLE}
QUANTIZED: list[Any] = [{"quantize-weights": {"group_size": 32}}, "quantize-activations", "fold-constants"]


def matches(graph: fx.GraphModule, flavor: str, level: int | None = None) -> list[Match]:
    module = copy_graph(graph)
    fuse_heads(module)
    return match_all(Prepared(module, 32, level, last_token=True), FLAVORS[flavor])


def roots(found: list[Match]) -> Counter[str]:
    return Counter(op_name(match.root) for match in found)


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "starcoder2", "mixtral", "gpt2"])
def test_every_value_is_given_once_and_before_it_is_read(name: str, flavor: str) -> None:
    given = set[fx.Node]()
    for match in matches(captured(name, torch.float32), flavor):
        assert all(node in given or node.op in ("get_attr", "placeholder") for node in match.reads)
        assert not given & {*match.gives}
        given |= {*match.gives}
    assert any(node.users and "output" in {u.op for u in node.users} for node in given)


def test_what_a_kernel_does_besides_is_left_to_it() -> None:
    graph = apply_passes(capture(tiny_wide()), QUANTIZED)
    found = roots(matches(graph, "ort"))
    assert not found.keys() & {"fake_quantize", "dequantize", "rotary_embedding", "slice"}
    assert found["rms_norm"] == 1, "the first; the others are given with the sums before them"
    assert found["fake_quantize"] == 0 < roots(matches(graph, "ort", level=0))["fake_quantize"]
    portable = roots(matches(graph, "portable"))
    assert portable["rms_norm"] == 5 and portable["rotary_embedding"] > 0 == portable["dequantize"]


def test_a_sum_and_its_norm_are_one_match_and_the_sum_is_read_by_others() -> None:
    found = matches(captured("llama", torch.float32), "ort")
    pairs = [match for match in found if len(match.gives) == 2]
    assert len(pairs) == 4
    for match in pairs:
        total, normed = match.gives
        assert is_op(total, "add") and match.root is total and is_op(normed, "rms_norm", "mul")
