"""A failing pass leaves a folder that makes it fail again."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import captured, tokens_for
from torch import fx

from rolora_passes import Pass, Report, apply_passes
from rolora_passes.debugging.reproducer import reproducer_in
from rolora_passes.errors import PassError, VerificationError
from rolora_passes.graphs import load_graph
from rolora_passes.graphs.graph import finish, parameters, set_tensor
from rolora_passes.passes import catalogue
from rolora_passes.passes.base import Calibration


@dataclass(frozen=True)
class Breaks(Pass):
    """A planted failure: cannot work with a parameter of this name, or with an id of this token."""

    name_part: str = "layers.1.mlp"
    token: int | None = None

    @property
    def needs_calibration(self) -> bool:
        return self.token is not None

    def run(self, graph: fx.GraphModule) -> Report:
        if any(self.name_part in name for name in parameters(graph)):
            raise ValueError(f"cannot work with {self.name_part}")
        return Report()

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        if bool((calibration.tokens == self.token).any()):
            raise ValueError("cannot work with this token")
        return Report()


@dataclass(frozen=True)
class LosesAWeight(Pass):
    """A planted mistake: claims to be exact."""

    def run(self, graph: fx.GraphModule) -> Report:
        name = next(name for name in parameters(graph) if name.endswith("up_proj.weight"))
        set_tensor(graph, name, parameters(graph)[name] * 0)
        finish(graph)
        return Report(changed=[name])


@dataclass(frozen=True)
class NeedsTwoLayers(Pass):
    """A planted failure that no single layer shows."""

    def run(self, graph: fx.GraphModule) -> Report:
        if len({name.split(".")[2] for name in parameters(graph) if ".layers." in name}) > 1:
            raise ValueError("cannot work with two layers")
        return Report()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Breaks, LosesAWeight, NeedsTwoLayers):
        monkeypatch.setattr(catalogue, cls.__name__, cls, raising=False)


def failed(tmp_path: Path, step: object, error: type[Exception], **options: object) -> tuple[Path, list[str]]:
    """The reproducer of a pass that fails on a tiny model of two layers, and what the user was told."""
    told: list[str] = []
    with pytest.raises(error) as first:
        apply_passes(
            captured("llama"), ["fuse-norm", step],  # type: ignore[list-item]
            on_failure=reproducer_in(tmp_path / "new", told.append), **options,  # type: ignore[arg-type]
        )  # fmt: skip
    folder = tmp_path / "new" / "reproducer"
    if folder.is_dir():
        with pytest.raises(error, match=str(first.value)[:20]):
            runpy.run_path(str(folder / "reproduce.py"))
    return folder, told


def layers_in(folder: Path) -> set[str]:
    names = parameters(load_graph(folder / "graph.safetensors"))
    return {name.split(".")[2] for name in names if ".layers." in name}


@pytest.mark.parametrize("layer", ["0", "1"])
def test_the_graph_has_the_layer_that_fails_alone(tmp_path: Path, layer: str) -> None:
    folder, told = failed(tmp_path, Breaks(f"layers.{layer}.mlp"), ValueError)
    assert layers_in(folder) == {layer}
    assert {p.name for p in folder.iterdir()} == {
        "reproduce.py", "recipe.yaml", "graph.safetensors", "failure.txt",
    }  # fmt: skip
    text = (folder / "failure.txt").read_text()
    assert f"Breaks(name_part='layers.{layer}.mlp'" in text and "ValueError: cannot work with" in text
    assert f"the {'first' if layer == '0' else 'last'} 1 of 2 decoder layers" in text
    assert "rolora-passes" in text and "in run" in text and str(Path.home()) + "/" not in text
    assert "name_part" in (folder / "recipe.yaml").read_text() or layer == "1"
    (line,) = told
    assert line.startswith(f"breaks failed; {folder} reproduces it (0.") and "MB" in line


def test_the_whole_graph_if_nothing_less_fails(tmp_path: Path) -> None:
    folder, _ = failed(tmp_path, NeedsTwoLayers(), ValueError)
    assert layers_in(folder) == {"0", "1"}
    assert "the whole graph: no part of it fails in the same way" in (folder / "failure.txt").read_text()


def test_a_pass_that_changes_the_function(tmp_path: Path) -> None:
    folder, _ = failed(tmp_path, LosesAWeight(), VerificationError)
    assert layers_in(folder) == {"0"}


def test_calibration_comes_with_it(tmp_path: Path) -> None:
    tokens = tokens_for(captured("llama"), 4, 6).clamp_min(2)
    tokens[0, 3] = 1
    folder, _ = failed(tmp_path / "first", Breaks(token=1), ValueError, calibration=tokens)
    assert _tokens(folder).equal(tokens[:1]), "one window is enough"
    folder, _ = failed(tmp_path / "last", Breaks(token=1), ValueError, calibration=tokens.flip(0))
    assert _tokens(folder).equal(tokens.flip(0))


def _tokens(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "calibration.safetensors")["tokens"]


def test_what_a_recipe_cannot_hold_is_said_and_the_error_is_the_pass_s_own(tmp_path: Path) -> None:
    step = {"rotate": {"given": {"R9": torch.eye(3)}}}
    folder, told = failed(tmp_path, step, PassError)
    assert not folder.exists() and list((tmp_path).rglob("*.*")) == []
    (line,) = told
    assert line.startswith("rotate failed, and no reproducer could be written: a recipe cannot hold given")
