"""What another package adds by entry points: listed, explained, used from the command line, and saved."""

from __future__ import annotations

import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import captured
from test_quantize_weights import wide

from rolora_passes import QuantizeWeights, apply_passes, history
from rolora_passes.errors import LoweringError, PassError, PluginError
from rolora_passes.export import to_onnx
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.serialize import load_graph, save_graph
from rolora_passes.numerics.grids import codebook
from rolora_passes.passes.registry import PASSES, make_pass
from rolora_passes.recipes import dump_recipe, load_recipe

Run = Callable[..., tuple[int, str, str]]

# The package: its modules, by name, and what it registers, by group. A test of another kind of thing (an
# operator, a target) adds its module and its entry points here.
SOURCES = {
    "passes": '''
        from dataclasses import dataclass
        from typing import ClassVar

        from rolora_passes import Pass, Report
        from rolora_passes.graphs.graph import finish, linears, site_names


        @dataclass(frozen=True)
        class CountLinears(Pass):
            """Count the linears of a graph.

            Options:
                at_least: fail below.
            """

            name: ClassVar[str] = "acme-count"

            at_least: int = 1

            def run(self, graph):
                found = len(linears(graph))
                assert found >= self.at_least
                left = [(name, "counted") for name in site_names(graph).values()]
                return Report(left=left, notes={"count": found})


        class NotAPass:
            pass


        @dataclass(frozen=True)
        class Fails(Pass):
            """Fail."""

            name: ClassVar[str] = "acme-fails"

            def run(self, graph):
                raise ValueError("too many linears")
    ''',
    "quits": "raise SystemExit(0)",
    "grids": '''
        import torch


        def ternary(bits):
            """-1, 0 and 1, whatever the bits."""
            return torch.tensor([-1.0, 0.0, 1.0])


        def two_bits(bits):
            if bits != 2:
                raise ValueError("it has four values")
            return torch.tensor([-1.0, -0.25, 0.25, 1.0])


        def upside_down(bits):
            return torch.tensor([1.0, 0.0, -1.0])
    ''',
}
ENTRY_POINTS = {
    "rolora_passes.passes": {"acme-count": "acme.passes:CountLinears"},
    "rolora_passes.grids": {"acme-ternary": "acme.grids:ternary"},
}


def install(folder: Path, groups: dict[str, dict[str, str]], name: str = "acme") -> None:
    """Write a package with its metadata to a folder, as pip would install it."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for module, source in SOURCES.items():
        (package / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    sections = [
        "\n".join([f"[{group}]", *(f"{k} = {v}" for k, v in entries.items())])
        for group, entries in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs the package, and others of that name with other entry points."""

    def installed(groups: dict[str, dict[str, str]], name: str = "acme") -> None:
        folder = tmp_path / f"site-{name}"
        install(folder, groups, name)
        monkeypatch.syspath_prepend(folder)

    yield installed  # type: ignore[misc]
    for module in [m for m in sys.modules if m.partition(".")[0] in ("acme", "other")]:
        del sys.modules[module]


def test_a_pass_is_listed_explained_used_and_saved(
    acme: Callable[..., None], rolora: Run, tmp_path: Path
) -> None:
    assert "acme-count" not in PASSES
    acme(ENTRY_POINTS)
    status, listed, _ = rolora("passes")
    (line,) = (line for line in listed.splitlines() if line.startswith("acme-count"))
    assert (
        status == 0 and " ".join(line.split()) == "acme-count exact Count the linears of a graph. [acme 1.2]"
    )
    status, explained, _ = rolora("passes", "acme-count")
    assert status == 0 and re.search(r"^at_least +integer +1? .*fail below", explained, flags=re.MULTILINE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [fuse-norm, acme-count: {at_least: 3}]")
    graph = save_graph(captured("llama"), tmp_path / "graph.safetensors")
    status, _, said = rolora("inspect", graph, "--recipe", recipe)
    assert status == 0, said
    passes = load_recipe(recipe)
    assert [step.name for step in passes] == ["fuse-norm", "acme-count"]
    recipe.write_text(dump_recipe(passes))
    assert load_recipe(recipe) == passes
    with warnings.catch_warnings(action="ignore"):
        made = apply_passes(captured("llama"), passes)
    again = load_graph(save_graph(made, tmp_path / "made.safetensors"))
    assert history(again)[-1].name == "acme-count" and history(again)[-1].report.notes == {"count": 15}


def test_the_group_of_the_version_before_goes_on_working(acme: Callable[..., None]) -> None:
    acme({"rolora_passes": ENTRY_POINTS["rolora_passes.passes"]})
    with pytest.warns(
        FutureWarning, match=r"acme 1\.2 .*'rolora_passes', which is 'rolora_passes\.passes' now"
    ):
        assert make_pass("acme-count").name == "acme-count"


def test_what_cannot_be_used_is_refused_with_its_package_and_breaks_nothing_else(
    acme: Callable[..., None], rolora: Run
) -> None:
    broken = {
        "acme-count": "acme.passes:CountLinears",
        "acme-gone": "acme.gone:Gone",
        "acme-quits": "acme.quits:Quits",
        "acme-no-pass": "acme.passes:NotAPass",
        "acme-called-otherwise": "acme.passes:CountLinears",
        "rotate": "acme.passes:CountLinears",
    }
    acme({"rolora_passes.passes": broken})
    with pytest.raises(PluginError, match=r"acme 1\.2 registers .*cannot be loaded \(ModuleNotFoundError"):
        make_pass("acme-gone")
    with pytest.raises(PluginError, match=r"acme 1\.2 .*which is no pass: expected a frozen dataclass"):
        make_pass("acme-no-pass")
    with pytest.raises(PluginError, match=r"acme 1\.2 .*calls itself 'acme-count'"):
        make_pass("acme-called-otherwise")
    with pytest.warns(UserWarning, match=r"acme 1\.2 registers a pass 'rotate', which is a name of rolora-p"):
        assert type(make_pass("rotate")).__module__ == "rolora_passes.passes.rotate"
    assert make_pass("acme-count").name == "acme-count"
    status, listed, _ = rolora("passes")
    assert status == 0 and listed.count("cannot be used: acme 1.2 registers") == 4
    assert "acme 1.2 registers a pass 'rotate'" in listed


def test_what_fails_in_another_package_is_told_with_its_name(acme: Callable[..., None], rolora: Run) -> None:
    acme({"rolora_passes.passes": {"acme-fails": "acme.passes:Fails"}})
    with pytest.raises(PluginError, match=r"the pass acme-fails of acme 1\.2 failed: ValueError: too many"):
        apply_passes(captured("llama"), ["acme-fails"])


def test_a_grid_that_cannot_be_used_is_listed_so(acme: Callable[..., None], rolora: Run) -> None:
    acme({"rolora_passes.grids": {"acme-gone": "acme.grids:gone"}})
    status, listed, _ = rolora("passes")
    assert status == 0 and "cannot be used: acme 1.2 registers the grid 'acme-gone'" in " ".join(
        listed.split()
    )


def test_two_packages_with_one_name(acme: Callable[..., None]) -> None:
    acme(ENTRY_POINTS)
    acme({"rolora_passes.passes": {"acme-count": "other.passes:CountLinears"}}, "other")
    with pytest.raises(PluginError, match="both register a pass 'acme-count': uninstall one"):
        make_pass("acme-count")


def test_a_grid_is_listed_used_in_recipes_and_in_loftq(
    acme: Callable[..., None], rolora: Run, tmp_path: Path
) -> None:
    acme(ENTRY_POINTS)
    status, listed, _ = rolora("passes")
    (line,) = (line for line in listed.splitlines() if line.startswith("acme-ternary"))
    assert status == 0 and line.split()[1] == "grid" and line.rstrip().endswith("[acme 1.2]")
    recipe = tmp_path / "recipe.yaml"
    options = "{bits: 2, group_size: 8, grid: acme-ternary, head: null}"
    recipe.write_text(f"passes: [quantize-weights: {options}, fold-constants]")
    graph = save_graph(captured("llama", torch.float32), tmp_path / "graph.safetensors")
    status, shown, said = rolora("inspect", graph, "--recipe", recipe)
    assert status == 0 and "2 bits" in shown, said
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


def test_a_grid_that_kernels_do_not_have_is_refused_by_name(
    acme: Callable[..., None], tmp_path: Path
) -> None:
    acme(ENTRY_POINTS)
    step = {"quantize-weights": {"bits": 2, "grid": "acme-ternary", "head": None}}
    coded = apply_passes(wide(), [step, "fold-constants"])
    with pytest.raises(LoweringError, match=r"codes of a codebook, codebooks\.acme-ternary2"):
        to_onnx(coded, tmp_path / "model")


def test_grids_that_cannot_be_used(acme: Callable[..., None]) -> None:
    acme({
        "rolora_passes.grids": {
            "acme-two": "acme.grids:two_bits",
            "acme-down": "acme.grids:upside_down",
            "acme-gone": "acme.grids:gone",
            "nf": "acme.grids:ternary",
        }
    })  # fmt: skip
    assert QuantizeWeights(2, grid="acme-two", head=None)
    with pytest.raises(PassError, match="the grid 'acme-two' has no 4 bits: it has four values"):
        QuantizeWeights(4, grid="acme-two")
    with pytest.raises(PassError, match=r"the grid 'acme-down', of acme 1.2, to have 2 to 16 ascending"):
        QuantizeWeights(4, grid="acme-down")
    with pytest.raises(PluginError, match=r"acme 1\.2 registers the grid 'acme-gone' .*AttributeError"):
        QuantizeWeights(4, grid="acme-gone")
    with pytest.warns(UserWarning, match=r"acme 1\.2 registers a grid 'nf', which is a name of"):
        assert len(codebook("nf", 4)) == 16
