"""Imports point one way: graphs <- passes <- pipelines, recipes, data <- export <- evaluation <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import rolora_passes
from rolora_passes.passes.registry import PASSES

ROOT = Path(rolora_passes.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))
MODULES = {
    ".".join(("rolora_passes", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in FILES
}
PASS_MODULES = {PASSES[name].__module__ for name in PASSES}
EXTRAS = {
    "executorch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime_genai",
    "peft",
    "lm_eval",
    "datasets",
    "torchao",
    "plotly",
    "matplotlib",
    "transformers",
    "gguf",
    "accelerate",
    "fast_hadamard_transform",
}
# Modules that are subclasses of an extra's; nothing else imports them outside a function.
LATE = (
    "rolora_passes.export.executorch.xnnpack",
    "rolora_passes.export.executorch.last_token",
    *(f"rolora_passes.export.onnx.{name}" for name in ("writer", "store", "inputs", "emitter", "matching")),
    *(
        f"rolora_passes.export.onnx.{name}"
        for name in ("standard", "reshaping", "transforms", "norms", "rotary")
    ),
    *(f"rolora_passes.export.onnx.{name}" for name in ("fake_quantize", "ort", "portable", "genai")),
    "rolora_passes.evaluation.harness",
)
# The rooms from the bottom to the top, each with its trade: a module imports its own room and those below.
ROOMS = {
    "": "errors, files, memory: what every room needs",
    "numerics": "arithmetic on plain tensors",
    "graphs": "what a graph is",
    "loading": "models, tokenizers and texts",
    "quantize": "what quantizers share on a graph",
    "adapters": "low-rank branches, and PEFT's format",
    "learning": "loops and losses",
    "decoding": "state, positions and caches",
    "passes": "one file a pass, and the manager",
    "recipes": "pipelines as data",
    "export": "lowering",
    "evaluation": "how good a model still is",
    "inspection": "graphs in words",
    "debugging": "where a recipe loses accuracy",
    "reporting": "reports and pictures",
    "cli": "the command line",
}


def imported(tree: ast.AST, top_only: bool = False) -> Iterator[str]:
    """Modules that are imported, `from a import b` as `a.b`; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node, top_only)


def ours(module: str) -> set[str]:
    """Modules of the package that a module imports, anywhere."""
    found = set()
    for name in imported(ast.parse(MODULES[module].read_text())):
        if name.split(".")[0] == "rolora_passes":
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found


def under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room(module: str) -> int:
    """The floor of the room that a module lies in."""
    name = module.split(".")[1] if "." in module else ""
    return list(ROOMS).index(name if name in ROOMS else "")


def test_every_folder_is_a_room() -> None:
    folders = {p.parent.relative_to(ROOT).parts[0] for p in FILES if p.parent != ROOT}
    assert folders == {*ROOMS} - {""}


def test_imports_point_down() -> None:
    found = [
        f"{module} imports {other}"
        for module in MODULES.keys() - {"rolora_passes", "rolora_passes.__main__"}
        for other in ours(module)
        if room(other) > room(module)
    ]
    assert not found


def test_numerics_knows_no_graph() -> None:
    files = [path for module, path in MODULES.items() if under(module, "rolora_passes.numerics")]
    found = {name for path in files for name in imported(ast.parse(path.read_text()))}
    assert found and not any(name.startswith("torch.fx") or name == "torch.export" for name in found)


# What a pass may import of its room: what a pass is. Passes that train also apply the quantizers to come.
BELOW = {"rolora_passes.passes", "rolora_passes.passes.base"}
TRAINED = BELOW | {f"rolora_passes.passes.{name}" for name in ("training", "manager", "tune_lora")}


def test_a_pass_imports_no_other_pass() -> None:
    passes = {m for m in MODULES if m in PASS_MODULES}
    found = [
        f"{module} imports {other}"
        for module in passes
        for other in ours(module) - (TRAINED if "rolora_passes.passes.training" in reached(module) else BELOW)
        if under(other, "rolora_passes.passes")
    ]
    assert len(passes) == len([*PASSES]) and not found


def reached(module: str) -> set[str]:
    """What a pass imports of its room, and what that does."""
    own = {m for m in ours(module) if under(m, "rolora_passes.passes")}
    return own | {m for other in own for m in ours(other)}


def cycles() -> list[set[str]]:
    """Circles of imports between modules, those for type checkers alone left out."""
    edges = {m: ours(m) - {m, "rolora_passes"} for m in MODULES if m != "rolora_passes"}
    while leaf := [m for m, to in edges.items() if not to & edges.keys()]:
        edges = {m: to for m, to in edges.items() if m not in leaf}
    return [{*edges}] if edges else []


def test_modules_import_one_another_in_no_circle() -> None:
    assert not cycles()


def test_extras_are_imported_inside_functions() -> None:
    found = []
    for module in (m for m in MODULES if not m.startswith(LATE)):
        for name in set(imported(ast.parse(MODULES[module].read_text()), top_only=True)):
            if name.split(".")[0] in EXTRAS or name.startswith(LATE):
                found.append(f"{module} imports {name}")
    assert not found


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, rolora_passes, rolora_passes.graphs, rolora_passes.export, rolora_passes.recipes\n"
        "import rolora_passes.loading.data, rolora_passes.evaluation, rolora_passes.cli\n"
        "import rolora_passes.passes.catalogue\n"
        "assert 'torch.distributed.fsdp' not in sys.modules, 'it takes as long as all of torch'\n"
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {EXTRAS!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_and_functions_stay_small() -> None:
    for module, path in MODULES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 300, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{module}: {node.name}"


def test_every_folder_of_the_package_is_installed() -> None:
    known = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    folders = {p.parent.relative_to(ROOT.parent) for p in ROOT.rglob("__init__.py")}
    assert {*known} == {".".join(folder.parts) for folder in folders}
