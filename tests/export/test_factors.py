"""Online transforms whose factors are parameters lower at a Hadamard's cost, whatever orthogonal matrices."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from test_executorch import steps
from test_onnx import FLAVORS, logits, lower, tokens_of
from tiny_llama import tiny_llama
from torch import Tensor, fx

from rolora_passes import FoldConstants, InsertHadamard, QuantizeKVCache, apply_passes
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.xnnpack import delegate as xnnpack_graph
from rolora_passes.graphs.graph import copy_graph, is_op, parameters, set_tensor
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error

CACHES = pytest.mark.parametrize("cache", [False, True], ids=["float cache", "int8 cache"])


def turned(factors: bool, cache: bool) -> fx.GraphModule:
    """Two layers with R3 (64) and R4 (48 x 32): Hadamards, or factors, random and others in every layer."""
    graph = tiny_llama(head_dim=64, mlp=1536)
    given = {key: random_rotation(n) for key, n in _orders(graph).items()} if factors else None
    rounded = [QuantizeKVCache(keys=8, values=8)] if cache else []
    return apply_passes(graph, [InsertHadamard(factors=factors, given=given), FoldConstants(), *rounded])


def random_rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def _orders(graph: fx.GraphModule) -> dict[str, int]:
    """The size of every factor that the pass asks for."""
    manifest = info(apply_passes(graph, [InsertHadamard(factors=True)])).rotations
    return {key: entry.size for key, entry in manifest.items()}


def factor_names(graph: fx.GraphModule) -> set[str]:
    return {str(f.target) for n in graph.graph.nodes if is_op(n, "kronecker") for f in n.args[1]}


def check_executorch(graph: fx.GraphModule, path: Path, cache: bool) -> None:
    errors = [(a - b).abs().max().item() for seed in range(3) for a, b in steps(graph, path, seed)]
    # One of thousands of keys and values may be so near to half a step that it rounds the other way, which
    # its cache keeps: how many are depends on the processor's order of sums.
    assert sorted(errors)[len(errors) // 2] <= (1e-3 if cache else 1e-5)
    assert max(errors) <= (1e-2 if cache else 1e-5)


def check_onnx(graph: fx.GraphModule, folder: Path, cache: bool) -> None:
    tokens = tokens_of(1, 3) if cache else tokens_of(2, 11)
    error = relative_error(logits(folder, tokens, tokens.shape[1] // 2 + 1), run(graph, tokens))
    assert error <= (1e-2 if cache else 5e-6)


@CACHES
def test_executorch_computes_the_graph(cache: bool, tmp_path: Path) -> None:
    graph, path = turned(True, cache), tmp_path / "model.pte"
    to_executorch(graph, path, max_length=32)
    check_executorch(graph, path, cache)


@CACHES
@pytest.mark.parametrize("flavor", FLAVORS)
def test_onnx_computes_the_graph(flavor: str, cache: bool, tmp_path: Path) -> None:
    graph = turned(True, cache)
    lower(graph, tmp_path / "model", flavor)
    check_onnx(graph, tmp_path / "model", cache)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Operators of every delegate that is written from now on, in the order of delegates."""
    found, write = list[Counter[str]](), xnnpack_graph.serialize_xnnpack_binary

    def note(graph: Any, *others: Any) -> Any:
        found.append(Counter(type(node.xnode_union).__name__ for node in graph.xnodes))
        return write(graph, *others)

    monkeypatch.setattr(xnnpack_graph, "serialize_xnnpack_binary", note)
    return found


def test_delegates_are_those_of_a_hadamard(inside: list[Counter[str]], tmp_path: Path) -> None:
    found = []
    for factors in (False, True):
        report = to_executorch(turned(factors, True), tmp_path / "model.pte", max_length=32)
        found.append((report.delegates, report.operators, list(inside)))
        inside.clear()
    assert found[0] == found[1]
    assert found[0][0] == len(found[0][2]) == 3, "one a layer, and one more"


@pytest.mark.parametrize("flavor", FLAVORS)
def test_onnx_operators_are_those_of_a_hadamard(flavor: str, tmp_path: Path) -> None:
    """In their order: the last token is taken before the last R4, not behind it."""
    found = []
    for factors in (False, True):
        lower(turned(factors, True), tmp_path / str(factors), flavor, last_token=True)
        model = onnx.load(tmp_path / str(factors) / "model.onnx", load_external_data=False)
        found.append([node.op_type for node in model.graph.node])
    assert found[0] == found[1] and "MatMul" in found[0]


def test_factors_in_float64_are_constants_in_float32(tmp_path: Path) -> None:
    """A matrix that was not converted with its graph costs nothing more."""
    graph = turned(True, False)
    wide = copy_graph(graph)
    for name in factor_names(wide):
        set_tensor(wide, name, parameters(wide)[name].double())
    sizes = []
    for kind, each in {"float32": graph, "float64": wide}.items():
        report = to_executorch(each, tmp_path / f"{kind}.pte", max_length=32)
        sizes.append([report.bytes, *(lower(each, tmp_path / kind / f, f).bytes for f in FLAVORS)])
    assert sizes[0] == sizes[1] and len(factor_names(wide)) == 6
    check_executorch(wide, tmp_path / "float64.pte", cache=False)
    for flavor in FLAVORS:
        check_onnx(wide, tmp_path / "float64" / flavor, cache=False)
