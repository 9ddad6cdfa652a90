"""QuantizeKVCache: keys after rotary embedding and R3, values, each on its own grid."""

from __future__ import annotations

import pytest
import torch
from helpers import check, count, tokens_for
from test_quantize_weights import wide
from torch import fx

from rolora_passes import FuseNorm, InsertHadamard, QuantizeKVCache, apply_passes, history
from rolora_passes.errors import PassError, PassOrderError
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.running import values
from rolora_passes.numerics import affine


def attentions(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if is_op(n, "attention")]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["head", "token"])
def test_keys_and_values_are_those_of_the_arithmetic(per: str, symmetric: bool) -> None:
    step = QuantizeKVCache(keys=4, values=3, per=per, symmetric=symmetric, clip=0.95)  # type: ignore[arg-type]
    graph = check(wide(), [step])
    known = dict(values(graph, tokens_for(graph)))
    for node, plain in zip(attentions(graph), attentions(wide()), strict=True):
        for place, bits in ((1, 4), (2, 3)):
            source = next(n for n in graph.graph.nodes if n.name == plain.args[place].name)
            value = known[source]
            flat = value if per == "head" else value.flatten(-2)
            expected = affine.fake_quantize(flat, bits, None, symmetric, 0.95).reshape(value.shape)
            assert torch.equal(known[node.args[place]], expected)
            assert not torch.equal(expected, value)


def test_keys_are_quantized_after_rotary_embedding_and_r3() -> None:
    graph = check(wide(), [FuseNorm(), InsertHadamard(r4=False), QuantizeKVCache()])
    for node in attentions(graph):
        rounded = node.args[1]
        assert is_op(rounded, "fake_quantize") and is_op(rounded.args[0], "hadamard")
        assert is_op(rounded.args[0].args[0], "rotary_embedding")
        assert is_op(node.args[0], "hadamard"), "queries are not quantized"
    with pytest.raises(PassOrderError, match="insert-hadamard cannot run on a graph that is already 'cache"):
        apply_passes(wide(), [QuantizeKVCache(), InsertHadamard()])


def test_what_is_left_is_said() -> None:
    graph = apply_passes(wide(), [QuantizeKVCache(keys=None)])
    report = history(graph)[-1].report
    assert count(graph, "fake_quantize") == len(report.changed) == len(report.left) == 2
    assert all(name.endswith("keys") for name, _ in report.left)


def test_errors() -> None:
    with pytest.raises(PassError, match="values must be 2 to 8, found 1"):
        QuantizeKVCache(values=1)
    with pytest.raises(PassError, match="per must be 'head' or 'token', found 'row'"):
        QuantizeKVCache(per="row")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="clip must be above 0 and at most 1, found 2"):
        QuantizeKVCache(clip=2)
