"""QuantizeEmbedding: the token table in eight or four bits."""

from __future__ import annotations

import pytest
import torch
from helpers import captured, check, difference
from test_quantize_weights import weights, wide

from rolora_passes import (
    FoldConstants,
    FuseNorm,
    QuantizeEmbedding,
    QuantizeWeights,
    Rotate,
    apply_passes,
    history,
)
from rolora_passes.errors import PassError
from rolora_passes.graphs.graph import is_op, parameters

TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 32)])
def test_rows_are_rounded_to_half_a_step(bits: int, group: int | None) -> None:
    graph = check(wide(), [QuantizeEmbedding(bits=bits, group_size=group), FoldConstants()])
    q, scale = weights(graph)[TABLE]
    most = 2 ** (bits - 1) - 1
    assert q.min() >= (-8 if bits == 4 else -127) and q.max() <= most
    steps = scale.reshape(q.shape[0], -1).repeat_interleave(group or q.shape[1], 1)
    allowed = 0.5 + (most * 2**-8 if group else 1e-5)
    assert ((q * steps - parameters(wide())[TABLE]).abs() <= steps * allowed).all()


def test_after_rotation_folded_as_unfolded() -> None:
    graph = apply_passes(
        wide(), [FuseNorm(), Rotate(), FoldConstants(), QuantizeEmbedding(bits=4, group_size=32)]
    )
    assert difference(check(graph, [FoldConstants()]), graph) < 1e-6


def test_a_table_that_the_head_reads_too() -> None:
    """Only the embedding reads the rounded table, or it is left with the reason."""
    graph = apply_passes(captured("llama-tied", torch.float32), [QuantizeEmbedding()])
    report = history(graph)[-1].report
    head = [n for n in graph.graph.nodes if is_op(n, "linear")][-1]
    assert head.args[1].op == "get_attr"
    assert report.changed or any("head" in reason for _, reason in report.left)


def test_with_quantized_weights_everything_is_integers() -> None:
    graph = apply_passes(wide(), [FuseNorm(), QuantizeWeights(), QuantizeEmbedding(), FoldConstants()])
    floating = [name for name, value in parameters(graph).items() if value.is_floating_point()]
    assert all(name.endswith("_scale") or "inv_freq" in name for name in floating)
    assert parameters(graph)[TABLE + "_q"].dtype == torch.int8


def test_errors() -> None:
    with pytest.raises(PassError, match="bits must be 2 to 8, found 9"):
        QuantizeEmbedding(bits=9)
    with pytest.raises(PassError, match=rf"groups of 48 do not divide {TABLE}, whose width is 64"):
        apply_passes(wide(), [QuantizeEmbedding(group_size=48)])
