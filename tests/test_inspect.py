"""`rolora inspect` and `rolora diff`, as a user meets them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import TEXT, save_checkpoint

from rolora_passes import apply_passes
from rolora_passes.cli import main
from rolora_passes.graphs import capture, load_graph, save_graph
from rolora_passes.inspection.diff import diff_text
from rolora_passes.inspection.structure import structure_text
from rolora_passes.loading.models import load_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def saved(checkpoint: Path) -> Path:
    return save_graph(capture(load_model(str(checkpoint))[0]), checkpoint.parent / "graph.safetensors")


@pytest.fixture(scope="module")
def compiled(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "compiled"
    assert (
        main(["compile", str(checkpoint), "-o", str(folder), "--recipe", "float", "--max-length", "32"]) == 0
    )
    return folder


def test_a_model(checkpoint: Path, saved: Path, rolora: Run) -> None:
    status, printed, said = rolora("inspect", checkpoint)
    graph = apply_passes(load_graph(saved), ["fuse-norm"])
    assert status == 0 and printed.endswith("\n\n" + structure_text(graph)), said
    assert re.search(r"model +tiny \(llama\)\nfacts +canonical, norms fused\nweights +0.0 M", printed)
    assert "admits" not in printed and "= linear(" not in printed
    assert str(checkpoint.parent) not in printed
    _, printed, _ = rolora("inspect", checkpoint, "--as-captured", "--bases", "--graph")
    assert structure_text(load_graph(saved)) in printed
    assert "Axes that can change basis together" in printed and "= linear(" in printed


def test_a_recipe(saved: Path, rolora: Run) -> None:
    status, printed, said = rolora("inspect", saved, "--recipe", "rotated-8da4w")
    assert status == 0, said
    assert "R1 (32, hadamard), model.layers.*.self_attn.R2 (16, hadamard)" in printed
    assert "mlp.down_proj     [32, 64] 4 bits in groups of 32" in printed
    assert "mul, hadamard 64, fake_quantize 8 bits a token" in printed
    assert "fold-constants" in said


def test_a_saved_graph_that_is_quantized(saved: Path, rolora: Run) -> None:
    path = saved.with_name("quantized.safetensors")
    save_graph(apply_passes(load_graph(saved), ["quantize-weights"]), path)
    status, printed, said = rolora("inspect", path)
    assert status == 0 and "4 bits in groups of 32" in printed, said


def test_a_compiled_folder(compiled: Path, rolora: Run) -> None:
    status, printed, said = rolora("inspect", compiled)
    manifest = json.loads((compiled / "manifest.json").read_text())
    assert status == 0, said
    assert re.search(r"^source +tiny \(llama\), 32 tokens of context$", printed, re.M)
    assert re.search(r"^executorch +0\.\d MB, cache 0\.0 MB, seconds: prepare", printed, re.M)
    assert re.search(
        rf"^  delegated +{manifest['targets']['executorch']['delegates']} delegates$", printed, re.M
    )
    outside = manifest["targets"]["executorch"]["operators"]
    assert re.search(rf"^  not delegated +{sum(outside.values())} instructions: ", printed, re.M)
    assert all(name in printed for name in outside)
    for record in manifest["passes"]:
        assert re.search(rf"^{record['name']} +{len(record['report']['changed'])} +0 ", printed, re.M)
    for path in compiled.iterdir():
        assert f"{path.stat().st_size / 1e3:,.1f} kB  {path.name}" in printed
    assert manifest["versions"]["torch"] in printed


def test_diff(saved: Path, compiled: Path, rolora: Run) -> None:
    other = saved.with_name("fused.safetensors")
    fused = apply_passes(load_graph(saved), ["fuse-norm"])
    save_graph(fused, other)
    status, printed, said = rolora("diff", saved, other)
    assert status == 0 and printed == diff_text(load_graph(saved), fused), said
    assert rolora("diff", other, other)[1] == "no difference\n"
    status, printed, said = rolora("diff", saved, "--recipe", "8da4w")
    assert status == 0, said
    stages = ["quantize-weights", "quantize-activations", "quantize-embedding", "fold-constants"]
    assert re.findall(r"^== (.*)$", printed, re.M) == stages
    assert "float32 -> 4 bits in groups of 32" in printed[: printed.index("== quantize-activations")]


def test_diff_of_compiled_folders(compiled: Path, rolora: Run, tmp_path: Path) -> None:
    assert rolora("diff", compiled, compiled)[1] == "no difference\n"
    manifest = json.loads((compiled / "manifest.json").read_text())
    manifest["passes"][0] |= {"seconds": 99, "options": {"tied": "keep"}}
    manifest["targets"]["executorch"]["delegates"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    lines = rolora("diff", compiled, tmp_path)[1].splitlines()
    count = manifest["targets"]["executorch"]["delegates"]
    assert f"~ targets.executorch.delegates: {count - 1} -> {count}" in lines
    assert f"+ passes.{manifest['passes'][0]['name']}.options.tied: keep" in lines
    assert any(line.startswith("- size of model.pte: ") for line in lines)
    assert not any("seconds" in line for line in lines)


def test_views(saved: Path, checkpoint: Path, tmp_path: Path, rolora: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    status, _, said = rolora(
        *("inspect", saved, "--recipe", "8da4w", "--view", tmp_path / "v.json"),
        *("--text", text, "--window", 32, "--tokenizer", checkpoint),
    )
    assert status == 0 and "open it with: model-explorer " in said, said
    sqnr = json.loads((tmp_path / "v.sqnr.json").read_text())["graph"]["results"]
    known = {n["id"] for n in json.loads((tmp_path / "v.json").read_text())["graphs"][0]["nodes"]}
    assert len(sqnr) > 7 and sqnr.keys() <= known
    assert all(0 < entry["value"] < 100 for entry in sqnr.values())
    status, _, said = rolora("inspect", saved, "--view", tmp_path / "v.onnx")
    assert status == 0 and (tmp_path / "v.onnx").is_file() and "open it with: netron " in said, said


NO_GRAPH = "is compiled and has no graph: leave"
BAD: dict[str, tuple[list[str], str]] = {
    "view": (["inspect", "SAVED", "--view", "a.pdf"], "--view: expected a file ending in .json or .onnx"),
    "text": (["inspect", "SAVED", "--text", "a.txt"], "--text is what SQNR is measured on: give --recipe"),
    "recipe of a program": (["inspect", "COMPILED", "--recipe", "8da4w"], f"{NO_GRAPH} --recipe out"),
    "view of a program": (["inspect", "COMPILED", "--view", "a.json"], f"{NO_GRAPH} --view out"),
    "program": (["inspect", "COMPILED/model.pte"], "expected a model or a saved graph, found a compiled"),
    "recipe": (["inspect", "SAVED", "--recipe", "none"], "PassError: expected a recipe file .* found 'none'"),
    "no calibration": (["inspect", "SAVED", "--recipe", "gptq:W4A16"], "looks at data and was given none"),
    "no tokenizer": (
        ["diff", "SAVED", "--recipe", "gptq:W4A16", "--calibration", "TEXT"],
        "a saved graph has no tokenizer: give --tokenizer FOLDER",
    ),
    "nothing to compare": (["diff", "SAVED"], "expected another graph .* or a --recipe, found neither"),
    "too much": (["diff", "SAVED", "SAVED", "--recipe", "float"], "or a --recipe, found both"),
    "graph and program": (["diff", "SAVED", "COMPILED"], "expected a model or a saved graph, found"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(
    arguments: list[str], message: str, saved: Path, compiled: Path, tmp_path: Path, rolora: Run
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"SAVED": str(saved), "COMPILED": str(compiled), "TEXT": str(tmp_path / "text.txt")}
    known = [re.sub("|".join(places), lambda found: places[found[0]], argument) for argument in arguments]
    status, printed, said = rolora(*known)
    assert status == 2 and not printed
    assert re.search(f"error: .*{message}", said), said
