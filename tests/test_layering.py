"""Imports point one way: graphs <- passes <- pipelines, recipes, data <- export <- evaluation <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import rolora_passes
from rolora_passes.registry import PASSES

ROOT = Path(rolora_passes.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))
MODULES = {
    ".".join(("rolora_passes", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in FILES
}
PASS_MODULES = {place.partition(":")[0] for place in PASSES.values()}
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
}
# Modules that are subclasses of an extra's; nothing else imports them outside a function.
LATE = (
    "rolora_passes.export.xnnpack",
    "rolora_passes.export.last_token",
    *(f"rolora_passes.export.onnx_{name}" for name in ("emitter", "store", "inputs", "norms", "ops", "ort")),
    *(f"rolora_passes.export.onnx_{name}" for name in ("portable", "rotary", "weights", "fake_quantize")),
    "rolora_passes.export.onnx_genai",
    "rolora_passes.evaluation.harness",
)
# From the bottom to the top; what is not named here lies between the first two.
TOP = (
    "rolora_passes.export",
    "rolora_passes.evaluation",
    "rolora_passes.debugging",
    "rolora_passes.reporting",
    "rolora_passes.display",
    "rolora_passes.commands",
    "rolora_passes.cli",
)
# What a pass may import of the package; the manager and what is above it also import passes.
BELOW = {"rolora_passes.errors", "rolora_passes.passes"}


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


def beyond(modules: Iterable[str], allowed: set[str]) -> list[str]:
    """Imports of the package that are neither of its graphs nor allowed."""
    return [
        f"{module} imports {other}"
        for module in modules
        for other in sorted(ours(module) - allowed)
        if not under(other, "rolora_passes.graphs")
    ]


def test_graphs_import_graphs_and_errors_alone() -> None:
    graphs = [m for m in MODULES if under(m, "rolora_passes.graphs")]
    assert graphs and not beyond(graphs, {"rolora_passes.errors"})


# Passes that stand above the others: one that composes them for a runtime, one that trains under them.
ABOVE = ("rolora_passes.export", "rolora_passes.learning")


def test_a_pass_imports_no_other_pass() -> None:
    passes = sorted(m for m in PASS_MODULES if not m.startswith(ABOVE))
    assert passes and not beyond(passes, BELOW)


def test_nothing_imports_what_is_above_it() -> None:
    found = []
    for module in MODULES.keys() - {"rolora_passes.__main__"}:
        own = [level for level, package in enumerate(TOP) if under(module, package)]
        above = TOP[own[0] + 1 :] if own else TOP
        wrong = [other for other in ours(module) if any(under(other, package) for package in above)]
        found += [f"{module} imports {other}" for other in wrong]
    assert not found


def test_extras_are_imported_inside_functions() -> None:
    found = []
    for module in (m for m in MODULES if not m.startswith(LATE)):
        for name in set(imported(ast.parse(MODULES[module].read_text()), top_only=True)):
            if name.split(".")[0] in EXTRAS | {"transformers"} or name.startswith(LATE):
                found.append(f"{module} imports {name}")
    assert not found


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, rolora_passes, rolora_passes.graphs, rolora_passes.export, rolora_passes.recipes\n"
        "import rolora_passes.data, rolora_passes.evaluation, rolora_passes.cli\n"
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {EXTRAS | {'transformers'}!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_and_functions_stay_small() -> None:
    long = [p.name for p in FILES if len(p.read_text().splitlines()) > 400]
    assert not long
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "export" not in path.parts:
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{path.name}: {node.name}"


def test_every_folder_of_the_package_is_installed() -> None:
    known = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    folders = {p.parent.relative_to(ROOT.parent) for p in ROOT.rglob("__init__.py")}
    assert {*known} == {".".join(folder.parts) for folder in folders}
