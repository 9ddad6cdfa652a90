"""Records of operators: complete, and open to other packages."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import captured
from torch import Tensor, fx, nn

from rolora_passes import apply_passes, history
from rolora_passes.decoding.state import mixing
from rolora_passes.errors import GraphFormatError, PluginError
from rolora_passes.graphs import infer_bases, load_graph, run, save_graph
from rolora_passes.graphs.capture import from_exported
from rolora_passes.graphs.operators import OURS, Operator, Trait, has, operator_of, operators
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.text import graph_text
from rolora_passes.inspection.structure import structure_text

Install = Callable[..., None]
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


class Scaled(nn.Module):
    """A table and a head; in between every token's row is scaled by its position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17, bias=False)
        self.double()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        factors = 1 / (positions.double() + 1)
        logits: Tensor = self.head(torch.ops.acme.scale_rows(self.embed(tokens), factors))
        return logits


def scaled() -> fx.GraphModule:
    assert "acme::scale_rows" in operators()
    auto = torch.export.Dim.AUTO
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    given = {"tokens": tokens, "positions": torch.arange(6).expand(2, 6)}
    shapes = {name: {0: auto, 1: auto} for name in given}
    with torch.no_grad():
        return from_exported(torch.export.export(Scaled(), (), given, dynamic_shapes=shapes))


def test_every_record_has_a_name_of_its_own() -> None:
    names = [record.name for record in OURS]
    assert len(names) == len({*names}) and {*names} <= operators().keys()


def test_every_operator_of_ours_says_what_it_computes_and_is_known_to_torch() -> None:
    own = [record for record in OURS if record.name.startswith("rolora::")]
    assert len(own) == 14
    for record in own:
        assert record.implementation is not None, record.name
        known = getattr(torch.ops.rolora, record.name[8:]).default._schema.arguments
        assert [a.name for a in known] == [*inspect.signature(record.implementation).parameters]


def test_a_record_is_found_by_node_and_by_operator() -> None:
    (attention, *_) = (n for n in captured("llama").graph.nodes if has(n, Trait.ONE_TYPE) and len(n.args) > 3)
    found = operator_of(attention)
    assert found is not None and found.name == "rolora::attention"
    assert found is operator_of(torch.ops.rolora.attention.default)
    getitem = operator_of(operator.getitem)
    assert getitem is not None and getitem.name == "operator.getitem"
    assert operator_of(operator.mod) is None and operator_of(torch.ops.aten.special_i0.default) is None


def test_a_name_says_its_namespace_and_a_schema_comes_with_what_computes_it() -> None:
    with pytest.raises(PluginError, match="namespace"):
        Operator("scale_rows")
    with pytest.raises(PluginError, match="a schema with its implementation"):
        Operator("acme::scale_rows", "(Tensor x) -> Tensor")


def test_another_packages_rule_frees_a_class(install: Install) -> None:
    install()
    graph = scaled()
    (residual,) = infer_bases(graph).rotatable()
    assert residual.name == "residual" and {a.parameter for a in residual.parameters} == {
        "embed.weight",
        "head.weight",
    }
    assert "acme::scale_rows(" in graph_text(graph) and "acme scale_rows of 8" in structure_text(graph)
    assert not mixing(graph)
    rotated = apply_passes(graph, ["rotate"])
    (record,) = history(rotated)
    assert record.report.modified and record.error is not None
    torch.testing.assert_close(run(rotated, TOKENS), run(graph, TOKENS))


def test_without_its_record_the_operator_is_rigid_and_may_mix(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    graph = scaled()
    uninstall(monkeypatch)
    bases = infer_bases(graph)
    assert not bases.rotatable()
    (table,) = (cls for cls in bases.classes if cls.name == "residual")
    assert "acme::scale_rows acme_scale_rows has no rule" in table.why_rigid()
    assert [*mixing(graph).values()] == ["no rule says that it works position by position"]


def uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no package added records."""
    monkeypatch.undo()
    operators.cache_clear()


def test_a_graph_with_it_is_saved_and_loaded_where_the_package_is(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    graph = scaled()
    save_graph(graph, tmp_path / "graph.safetensors")
    loaded = load_graph(tmp_path / "graph.safetensors")
    torch.testing.assert_close(run(loaded, TOKENS), run(graph, TOKENS))
    uninstall(monkeypatch)
    with pytest.raises(GraphFormatError, match=r"acme\.scale_rows.*an installed package has a record"):
        load_graph(tmp_path / "graph.safetensors")


def test_its_shape_is_found_by_its_implementation(install: Install) -> None:
    install()
    graph = scaled()
    (node,) = (n for n in graph.graph.nodes if "scale_rows" in n.name)
    assert infer_shapes(graph)[node].shape[-1] == 8


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import nothing_of_this_name",
            r"acme 1.2 registers .*cannot be loaded.*nothing_of_this_name",
        ),
        ("OPERATORS = 3", r"acme 1.2 registers .*which is no list of records"),
        ("OPERATORS = ['acme::scale_rows']", r"acme 1.2 registers .*which is no list of records"),
        (
            "from rolora_passes.graphs.operators import Operator\nOPERATORS = [Operator('aten::linear')]",
            r"acme 1.2 adds a record for aten::linear, which rolora-passes has",
        ),
        (
            "from rolora_passes.graphs.operators import Operator\n"
            "from rolora_passes.graphs.operators.steps import AxisMap\n"
            "OPERATORS = [Operator('acme::turn', axis_map=AxisMap(lambda r, n: [], 'rotate'))]",
            r"acme 1.2 gives acme::turn an axis map of the kind 'rotate', which another operator has",
        ),
        (
            "from rolora_passes.graphs.operators import Operator\n"
            "OPERATORS = [Operator('acme::bad', '(Nonsense x) -> Tensor', lambda x: x)]",
            r"torch cannot define acme::bad of acme 1.2",
        ),
    ],
)
def test_a_broken_package_is_named(install: Install, code: str, message: str) -> None:
    install("acme", {"rolora_passes.operators": {"rows": "acme_operators:OPERATORS"}}, acme_operators=code)
    with pytest.raises(PluginError, match=message):
        operators()


def test_no_pass_fails_for_records_it_never_meets(install: Install) -> None:
    install()
    assert apply_passes(captured("llama"), ["fuse-norm"]) is not None
