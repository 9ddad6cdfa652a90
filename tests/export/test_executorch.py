"""A lowered program computes what its graph computes, in few delegates, or leaves no file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantize_weights import wide
from tiny_llama import tiny_llama
from torch import Tensor, fx

from rolora_passes import apply_passes
from rolora_passes.decoding.kv_cache import add_kv_cache
from rolora_passes.errors import LoweringError, MissingExtraError
from rolora_passes.export.executorch.lower import LoweringReport, to_executorch
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.extras import require
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.info import info

OUTSIDE = {
    "llama::update_cache.out",
    "llama::custom_sdpa.out",
    "aten::embedding.out",
    "quantized_decomposed::embedding_byte.out",
    "quantized_decomposed::embedding_4bit.out",
    "aten::slice_copy.Tensor_out",
    "aten::sym_size.int",
    "aten::_local_scalar_dense",
    "executorch_prim::add.Scalar",
    "executorch_prim::sub.Scalar",
    "aten::mul.Scalar_out",
    "aten::add.Scalar_out",
    "aten::le.Scalar_out",
}

# One layer where a second would show nothing more; options that do not touch each other share a program.
PLAIN = {
    "llama": {},
    "partial rotary": {"rotary_dim": 8, "layers": 1},
    "interleaved rotary, softcap": {"rotary_dim": 8, "interleaved": True, "softcap": 5.0, "layers": 1},
    "hadamard 16 and 96": {"hadamard": True, "layers": 1},
    "hadamard 12 and 480": {"hadamard": True, "head_dim": 12, "mlp": 480, "layers": 1},
    "factors 12 and 480": {"hadamard": True, "factors": True, "head_dim": 12, "mlp": 480, "layers": 1},
    "window": {"window": 4},
    "window and softcap": {"window": 4, "softcap": 5.0, "layers": 1},
    "layer norm, learned positions": {"layer_norm": True, "learned_positions": 64, "layers": 1},
}


def steps(
    graph: fx.GraphModule,
    pte: Path,
    seed: int = 1,
    prefill: int = 8,
    length: int = 12,
    method: str = "forward",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(program's, graph's) logits of the last token, after a prefill and after each decoded token."""
    vocabulary = info(graph).config["vocab_size"]
    tokens = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = graph(tokens, torch.arange(length)[None])
    forward, start = load_pte(pte, method), 0
    for end in range(prefill, length + 1):
        yield forward(tokens[:, start:end], torch.tensor([start]))[:, -1], expected[:, end - 1]
        start = end


def lower(graph: fx.GraphModule, path: Path, **options: object) -> LoweringReport:
    report = to_executorch(graph, path, max_length=32, **options)  # type: ignore[arg-type]
    layers = len(graph.graph.find_nodes(op="call_function", target=torch.ops.rolora.attention.default))
    assert report.delegates <= (2 * layers if options.get("fast_prefill") else layers) + 2
    assert report.operators.get("llama::custom_sdpa.out", 0) <= layers  # the last one of the last token alone
    assert set(report.operators) <= OUTSIDE
    assert report.bytes == path.stat().st_size
    return report


@pytest.mark.parametrize("sizes", PLAIN.values(), ids=PLAIN.keys())
def test_plain_program_equals_its_graph(sizes: dict[str, object], tmp_path: Path) -> None:
    graph = tiny_llama(**sizes)
    lower(graph, tmp_path / "model.pte")
    for found, expected in steps(graph, tmp_path / "model.pte"):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("longest", [None, 512, 4])
def test_calls_of_any_length(longest: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts and parts of them, up to all the caches hold, by either kind of attention."""
    monkeypatch.setattr("rolora_passes.export.executorch.xnnpack.attention._LONGEST", longest)
    graph = tiny_llama()
    lower(graph, tmp_path / "model.pte", fast_prefill=longest is not None)
    forward = load_pte(tmp_path / "model.pte")
    tokens = torch.randint(0, 99, (1, 32), generator=torch.Generator().manual_seed(2))
    expected = graph(tokens, torch.arange(32)[None])
    for ends in ([32], [31, 32], [1, 2, 7], [4, 5], [5, 10, 32], [3, 4]):
        for start, end in zip([0, *ends], ends, strict=False):
            found = forward(tokens[:, start:end], torch.tensor([start]))
            torch.testing.assert_close(found[:, -1], expected[:, end - 1], atol=1e-5, rtol=0)


def test_factors_cost_what_a_hadamard_costs(tmp_path: Path) -> None:
    """The same operators outside of the delegates, and a file of the same size: nodes and constants alike."""
    found = []
    for factors in (False, True):
        sizes = {"mlp": 1536, "head_dim": 64, "layers": 1, "weights": 4, "table": 8}
        graph = tiny_llama(hadamard=True, factors=factors, **sizes)
        report = lower(graph, tmp_path / f"{factors}.pte")
        found.append((report.delegates, report.operators, report.bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize(("weights", "table", "hadamard"), [(4, 8, False), (8, 4, False), (4, 4, True)])
def test_quantized_program_equals_its_graph(weights: int, table: int, hadamard: bool, tmp_path: Path) -> None:
    graph = tiny_llama(layers=1, weights=weights, table=table, hadamard=hadamard)
    lower(graph, tmp_path / "model.pte")
    pairs = (p for seed in range(8) for p in steps(graph, tmp_path / "model.pte", seed, 2, 3))
    errors = [(found - expected).abs().max().item() for found, expected in pairs]
    # An activation within 1e-7 of half a step may round the other way, and stays in the cache: short
    # prompts, of which most have none.
    assert sorted(errors)[len(errors) // 2] <= 1e-5
    assert max(errors) <= 0.1


def test_all_tokens(tmp_path: Path) -> None:
    graph = tiny_llama(layers=1)
    lower(graph, tmp_path / "model.pte", last_token=False)
    tokens = torch.arange(10)[None]
    found = load_pte(tmp_path / "model.pte")(tokens, torch.tensor([0]))
    torch.testing.assert_close(found, graph(tokens, tokens), atol=1e-5, rtol=0)


def test_a_graph_with_caches_is_lowered_as_it_is(tmp_path: Path) -> None:
    graph = tiny_llama(layers=1)
    to_executorch(add_kv_cache(graph, 16), tmp_path / "model.pte", max_length=99)
    for found, expected in steps(graph, tmp_path / "model.pte"):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_cached_graph_runs_in_torch() -> None:
    graph = tiny_llama()
    before = str(graph.graph)
    cached = add_kv_cache(graph, 16)
    assert str(graph.graph) == before
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = graph(tokens, tokens)
        cached(tokens[:, :6], torch.tensor([0]))
        found = cached(tokens[:, 6:], torch.tensor([6]))
    torch.testing.assert_close(found, expected[:, 6:], atol=1e-5, rtol=0)


def test_two_sided_attention_is_refused() -> None:
    graph = tiny_llama()
    node = graph.graph.find_nodes(op="call_function", target=torch.ops.rolora.attention.default)[0]
    node.args = (*node.args[:4], False)
    with pytest.raises(LoweringError, match=node.name):
        add_kv_cache(graph, 16)


def test_failure_leaves_no_file(tmp_path: Path) -> None:
    graph = tiny_llama(weights=8)
    weight = next(n for n in graph.graph.nodes if is_op(n, "dequantize"))
    with graph.graph.inserting_before(weight):
        weight.update_arg(2, graph.graph.get_attr("layers.0.down.scale"))
    with pytest.raises(LoweringError, match="found 8 bits with zero points, per row"):
        to_executorch(graph, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_metadata_for_the_runner(tmp_path: Path) -> None:
    from executorch.exir._serialize import _deserialize_pte_binary

    to_executorch(tiny_llama(layers=1), tmp_path / "model.pte", max_length=32)
    program = _deserialize_pte_binary((tmp_path / "model.pte").read_bytes()).program
    names = {plan.name for plan in program.execution_plan}
    assert {"forward", "get_max_seq_len", "get_eos_ids", "get_bos_id", "use_kv_cache"} <= names


def test_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install rolora-passes\[executorch\]"):
        require("no_such_runtime.module", "executorch")


def test_a_graph_in_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"expected a graph in torch.float32, .* found torch.float64"):
        to_executorch(convert(tiny_llama(), torch.float64), tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("passes", "widened"),
    [([{"quantize-weights": {}}], 15), ([{"quantize-weights": {}}, "quantize-activations"], 0), ([], 0)],
)
def test_weights_that_no_kernel_reads_as_they_are_stored_are_told(
    passes: list[Any], widened: int, tmp_path: Path
) -> None:
    graph = apply_passes(wide(), [*passes, "fold-constants"])
    report = to_executorch(graph, tmp_path / "m.pte", max_length=32, check=False)
    assert report.widened == widened
    assert any("stored in float32" in row for row in report.rows()) == (widened > 0)
