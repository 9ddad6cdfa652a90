"""Reproducers: a script and the smallest graph on which a pass still fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import fx

from rolora_passes.errors import RoloraError
from rolora_passes.files import writing_folder
from rolora_passes.graphs.graph import copy_graph, finish
from rolora_passes.graphs.layers import find_layers
from rolora_passes.graphs.serialize import save_graph
from rolora_passes.log import environment, without_home
from rolora_passes.passes.manager import Failure, apply_passes
from rolora_passes.recipes import dump_recipe

_SCRIPT = '''"""{title}"""

from pathlib import Path

from safetensors.torch import load_file

from rolora_passes import apply_passes
from rolora_passes.graphs import load_graph
from rolora_passes.recipes import load_recipe

here = Path(__file__).resolve().parent
graph, passes = load_graph(here / "graph.safetensors"), load_recipe(here / "recipe.yaml")
tokens = {tokens}
apply_passes(graph, passes, verify={verify}, calibration=tokens)
'''


def reproducer_in(folder: str | Path, tell: Callable[[str], None]) -> Callable[[Failure], None]:
    """An `on_failure` for `apply_passes` that writes a reproducer to `folder`/reproducer.

    Args:
        folder: created if it does not exist.
        tell: called with a line for the user: where the reproducer is, or why there is none. The pass's own
            error is raised afterwards in both cases.
    """

    def write(failure: Failure) -> None:
        try:
            place, size = write_reproducer(failure, Path(folder) / "reproducer"), 0.0
            size = sum(file.stat().st_size for file in place.iterdir()) / 1e6
            tell(f"{failure.step.name} failed; {place} reproduces it ({size:.1f} MB, with weights)")
        except (RoloraError, OSError) as error:
            tell(f"{failure.step.name} failed, and no reproducer could be written: {error}")

    return write


def write_reproducer(failure: Failure, folder: Path) -> Path:
    """Write a folder: `reproduce.py`, `recipe.yaml` (the pass that failed, with its seed), the graph that it
    read, its calibration tokens, and `failure.txt` (the traceback, versions, and which part of the graph).

    The graph has only as many of the first or last decoder layers, and as many windows of calibration, as are
    needed for the same error at the same line; if no part fails, it is the whole graph. It always includes
    weights, the embedding and the head.

    Raises:
        PassError: the pass has an option that a recipe cannot hold, such as tensors.
        GraphFormatError: the graph cannot be saved.
    """
    recipe = dump_recipe([failure.step])
    smallest, about = _smallest(failure)
    summary = without_home("".join(traceback.format_exception_only(failure.error)).strip())
    with writing_folder(folder) as temporary:
        save_graph(smallest.graph, temporary / "graph.safetensors")
        tokens = "None"
        if smallest.calibration is not None:
            save_file({"tokens": smallest.calibration.tokens}, temporary / "calibration.safetensors")
            tokens = 'load_file(here / "calibration.safetensors")["tokens"]'
        title = f"{failure.step.name} fails: {summary}".replace("\\", "/").replace('"', "'")
        (temporary / "reproduce.py").write_text(
            _SCRIPT.format(title=title, tokens=tokens, verify=failure.verify), "utf-8"
        )
        (temporary / "recipe.yaml").write_text(recipe, "utf-8")
        trace = without_home("".join(traceback.format_exception(failure.error)))
        lines = [f"{failure.step}", about, *environment(), "", trace]
        (temporary / "failure.txt").write_text("\n".join(lines), "utf-8")
    return folder


def _smallest(failure: Failure) -> tuple[Failure, str]:
    """The failure on the smallest graph that still fails, and which part of the whole that is."""
    for graph, about in _cuts(failure.graph):
        for candidate in _with_less_data(replace(failure, graph=graph)):
            if _fails_again(candidate):
                return candidate, about
    return failure, "the whole graph: no part of it fails in the same way"


def _cuts(graph: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, str]]:
    """Graphs with the first or last 1, 2, 4, … decoder layers, each with a description."""
    found = find_layers(graph)
    stream, kept = [*found.before[-1:], *(layer[-1] for layer in found.layers)], 1
    while kept < len(stream) - 1:
        of = f"{kept} of {len(stream) - 1} decoder layers"
        yield _bypassed(graph, stream[kept].name, stream[-1].name), f"the first {of}"
        yield _bypassed(graph, stream[0].name, stream[-1 - kept].name), f"the last {of}"
        kept *= 2


def _bypassed(graph: fx.GraphModule, earlier: str, later: str) -> fx.GraphModule:
    """A copy in which readers of one value of the residual stream read an earlier one instead."""
    result = copy_graph(graph)
    nodes = {node.name: node for node in result.graph.nodes}
    nodes[later].replace_all_uses_with(nodes[earlier])
    return finish(result)


def _with_less_data(failure: Failure) -> Iterator[Failure]:
    """The failure with one calibration window, and with all; finished parts of an earlier run are unused."""
    data = failure.calibration
    if data is not None and len(data.tokens) > 1:
        yield replace(failure, calibration=replace(data, tokens=data.tokens[:1], work=None))
    yield failure if data is None else replace(failure, calibration=replace(data, work=None))


def _fails_again(failure: Failure) -> bool:
    """Whether the pass raises the same error from the same line."""
    try:
        apply_passes(failure.graph, [failure.step], verify=failure.verify, calibration=failure.calibration)
    except Exception as error:
        return _origin(error) == _origin(failure.error)
    return False


def _origin(error: Exception) -> tuple[type, str, int | None]:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return type(error), last.filename, last.lineno
