"""What another package adds by entry points: listed, explained, used from the command line, and saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import captured
from packages import ACME
from tiny_checkpoint import save_byte_checkpoint

from rolora_passes import QuantizeWeights, apply_passes, history
from rolora_passes.errors import PassError, PluginError
from rolora_passes.evaluation import ProgramScorer
from rolora_passes.export.target import TARGETS
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.serialize import load_graph, save_graph
from rolora_passes.graphs.text import graph_text
from rolora_passes.numerics.grids import codebook
from rolora_passes.passes.registry import PASSES, make_pass
from rolora_passes.recipes import dump_recipe, load_recipe

Run = Callable[..., tuple[int, str, str]]
Install = Callable[..., None]
TERNARY = "quantize-weights: {bits: 2, group_size: 8, grid: acme-ternary, head: null}"

FAILING = """
from dataclasses import dataclass

from rolora_passes import Pass


class NotAPass:
    pass


@dataclass(frozen=True)
class AcmeFails(Pass):
    def run(self, graph):
        raise ValueError("too many linears")
"""
TABLES = """
import torch


def two_bits(bits):
    if bits != 2:
        raise ValueError("it has four values")
    return torch.tensor([-1.0, -0.25, 0.25, 1.0])


def upside_down(bits):
    return torch.tensor([1.0, 0.0, -1.0])
"""


def test_a_pass_an_operator_a_grid_and_a_target_work_together(
    install: Install, rolora: Run, tmp_path: Path
) -> None:
    """The pass puts the operator into the graph, weights go onto the grid, and the target has the program."""
    install()
    assert list(TARGETS) == ["executorch", "onnx", "echo"]
    model, folder = save_byte_checkpoint(tmp_path / "model", layers=1), tmp_path / "out"
    recipe, text, table = tmp_path / "recipe.yaml", tmp_path / "text.txt", tmp_path / "eval.json"
    recipe.write_text(f"passes: [fuse-norm, rotate, acme-even, {TERNARY}, fold-constants]")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 2)
    command = ("compile", model, "--recipe", recipe, "--max-length", 32, "--accept-loss", "-o", folder)
    status, _, said = rolora(*command, "--target", "onnx")
    assert status == 2 and "codes of a codebook, codebooks.acme-ternary2" in said, (
        "no kernel of ours has the grid"
    )
    status, _, said = rolora(*command, "--target", "echo", "--echo-shout", "--echo-seed", 3)
    assert status == 0 and re.search(r"acme-even +1 sites, 7 left, .* same function", said), said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["packages"] == {"acme-even": "acme 1.2", "echo": "acme 1.2"}
    assert manifest["targets"] == {"echo": {"length": 32, "seed": 3}}
    (row,) = (row for row in manifest["parity"] if row["name"] == "echo")
    assert row["kl_graph"] < 1e-6 and row["greedy"] == row["of"]
    program = load_graph(folder / "echo.safetensors")
    assert "acme::scale_rows(" in graph_text(program)
    assert parameters(program)["codebooks.acme-ternary2"].tolist() == [-1, 0, 1]
    status, shown, said = rolora("inspect", model, "--recipe", recipe)
    assert status == 0 and "acme scale_rows of 257" in shown and "2 bits" in shown, said
    status, shown, said = rolora("diff", model, "--recipe", recipe)
    assert status == 0 and "scale_rows" in shown, said
    values = []
    for source in ([folder, "--target", "echo"], [model, "--recipe", recipe]):
        assert rolora("eval", *source, "--text", text, "--window", 16, "--windows", 2, "-o", table)[0] == 0
        values.append(json.loads(table.read_text())["perplexity"][0]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    status, printed, said = rolora("run", folder, "--prompt", "fox", "--raw")
    assert (status, printed) == (0, "FOX\n"), said
    assert ProgramScorer(folder).target.name == "echo"
    assert rolora(*command, "--target", "echo")[0] == 0, "a compiled folder may be replaced"


def test_a_pass_is_listed_explained_used_and_saved(install: Install, rolora: Run, tmp_path: Path) -> None:
    assert "acme-even" not in PASSES
    install()
    status, listed, _ = rolora("passes")
    (line,) = (line for line in listed.splitlines() if line.startswith("acme-even"))
    assert status == 0 and line.split()[:2] == ["acme-even", "exact"]
    assert line.rstrip().endswith(" Have the head read rows that are equally large. [acme 1.2]")
    status, explained, _ = rolora("passes", "acme-even")
    assert status == 0 and re.search(r"^size +number +1\.0 .*any but 0", explained, flags=re.MULTILINE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [fuse-norm, acme-even: {size: 0.5}]")
    graph = save_graph(captured("llama"), tmp_path / "graph.safetensors")
    status, _, said = rolora("inspect", graph, "--recipe", recipe)
    assert status == 0, said
    passes = load_recipe(recipe)
    assert [step.name for step in passes] == ["fuse-norm", "acme-even"]
    recipe.write_text(dump_recipe(passes))
    assert load_recipe(recipe) == passes
    made = apply_passes(captured("llama"), passes)
    again = load_graph(save_graph(made, tmp_path / "made.safetensors"))
    assert history(again)[-1].name == "acme-even" and history(again)[-1].report.notes == {"size": 0.5}


def test_the_group_of_the_version_before_goes_on_working(install: Install) -> None:
    install(groups={"rolora_passes": ACME["entry-points"]["rolora_passes.passes"]})
    with pytest.warns(
        FutureWarning, match=r"acme 1\.2 .*'rolora_passes', which is 'rolora_passes\.passes' now"
    ):
        assert make_pass("acme-even").name == "acme-even"


def test_what_cannot_be_used_is_refused_with_its_package_and_breaks_nothing_else(
    install: Install, rolora: Run
) -> None:
    broken = {
        "acme-even": "acme.passes:EvenRows",
        "acme-gone": "acme.gone:Gone",
        "acme-quits": "acme_quits:Quits",
        "acme-no-pass": "acme_passes:NotAPass",
        "acme-called-otherwise": "acme.passes:EvenRows",
        "rotate": "acme.passes:EvenRows",
    }
    install("acme", {"rolora_passes.passes": broken}, acme_passes=FAILING, acme_quits="raise SystemExit(0)")
    with pytest.raises(PluginError, match=r"acme 1\.2 registers .*cannot be loaded \(ModuleNotFoundError"):
        make_pass("acme-gone")
    with pytest.raises(PluginError, match=r"acme 1\.2 .*which is no pass: expected a frozen dataclass"):
        make_pass("acme-no-pass")
    with pytest.raises(PluginError, match=r"acme 1\.2 .*calls itself 'acme-even'"):
        make_pass("acme-called-otherwise")
    with pytest.warns(UserWarning, match=r"acme 1\.2 registers a pass 'rotate', which is a name of rolora-p"):
        assert type(make_pass("rotate")).__module__ == "rolora_passes.passes.rotate"
    assert make_pass("acme-even").name == "acme-even"
    status, listed, _ = rolora("passes")
    assert status == 0 and listed.count("cannot be used: acme 1.2 registers") == 4
    assert "acme 1.2 registers a pass 'rotate'" in listed


def test_what_fails_in_another_package_is_told_with_its_name(install: Install, rolora: Run) -> None:
    install("acme", {"rolora_passes.passes": {"acme-fails": "acme_passes:AcmeFails"}}, acme_passes=FAILING)
    with pytest.raises(PluginError, match=r"the pass acme-fails of acme 1\.2 failed: ValueError: too many"):
        apply_passes(captured("llama"), ["acme-fails"])


def test_a_grid_that_cannot_be_used_is_listed_so(install: Install, rolora: Run) -> None:
    install("acme", {"rolora_passes.grids": {"acme-gone": "acme.grids:gone"}})
    status, listed, _ = rolora("passes")
    assert status == 0 and "cannot be used: acme 1.2 registers the grid 'acme-gone'" in " ".join(
        listed.split()
    )


def test_two_packages_with_one_name(install: Install) -> None:
    install()
    install("other", {"rolora_passes.passes": {"acme-even": "acme.passes:EvenRows"}})
    with pytest.raises(PluginError, match="both register a pass 'acme-even': uninstall one"):
        make_pass("acme-even")


def test_a_grid_is_listed_used_in_recipes_and_in_loftq(install: Install, rolora: Run, tmp_path: Path) -> None:
    install()
    status, listed, _ = rolora("passes")
    (line,) = (line for line in listed.splitlines() if line.startswith("acme-ternary"))
    assert status == 0 and line.split()[1] == "grid" and line.rstrip().endswith("[acme 1.2]")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"passes: [{TERNARY}, fold-constants]")
    made = apply_passes(captured("llama", torch.float32), load_recipe(recipe))
    held = parameters(load_graph(save_graph(made, tmp_path / "made.safetensors")))
    assert held["codebooks.acme-ternary2"].tolist() == [-1, 0, 1]
    codes = [value for name, value in held.items() if name.endswith("_q")]
    assert len(codes) == 14 and {int(c) for value in codes for c in value.unique()} == {0, 1, 2}
    loftq = {"bits": 2, "group_size": 8, "grid": "acme-ternary", "rank": 4}
    near = apply_passes(captured("llama", torch.float32), [{"loftq": loftq}, "fold-constants"])
    notes = history(near)[0].report.notes
    assert notes["error"] < 0.9 * notes["error_quantized"]
    merged = apply_passes(near, [{"merge-lora": {"requantize": True}}, "fold-constants"])
    assert "codebooks.acme-ternary2" in parameters(merged)


def test_grids_that_cannot_be_used(install: Install) -> None:
    grids = {
        "acme-two": "acme_tables:two_bits",
        "acme-down": "acme_tables:upside_down",
        "acme-gone": "acme_tables:gone",
        "nf": "acme.grids:ternary",
    }
    install("acme", {"rolora_passes.grids": grids}, acme_tables=TABLES)
    assert QuantizeWeights(2, grid="acme-two", head=None)
    with pytest.raises(PassError, match="the grid 'acme-two' has no 4 bits: it has four values"):
        QuantizeWeights(4, grid="acme-two")
    with pytest.raises(PassError, match=r"the grid 'acme-down', of acme 1.2, to have 2 to 16 ascending"):
        QuantizeWeights(4, grid="acme-down")
    with pytest.raises(PluginError, match=r"acme 1\.2 registers the grid 'acme-gone' .*AttributeError"):
        QuantizeWeights(4, grid="acme-gone")
    with pytest.warns(UserWarning, match=r"acme 1\.2 registers a grid 'nf', which is a name of"):
        assert len(codebook("nf", 4)) == 16
