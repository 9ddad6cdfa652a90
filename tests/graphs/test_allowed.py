"""A saved graph that somebody else made runs nothing and names nothing of Python's, whatever is in it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import captured
from safetensors import safe_open
from safetensors.torch import save_file

from rolora_passes import FuseNorm, Rotate, apply_passes
from rolora_passes.errors import GraphFormatError, RoloraError
from rolora_passes.graphs.allowed import find_operator
from rolora_passes.graphs.graph import aten, copy_graph, insert_after
from rolora_passes.graphs.serialize import load_graph, save_graph
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.text import graph_text

Content = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What a saved graph holds: its description and its tensors."""
    graph = apply_passes(captured("llama"), [FuseNorm(), Rotate()])
    path = save_graph(graph, tmp_path_factory.mktemp("graph") / "graph.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["graph"]), tensors


def written(described: Any, tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(tensors, path, metadata={"graph": json.dumps(described)})
    return path


@pytest.mark.parametrize(
    "name",
    [
        "import_module.__self__.import_module",
        "ops.load_library.__call__",
        "aten.__class__.__mro__",
        "aten.linear.__call__",
        "aten.linear.default.__self__",
        "aten.from_file.default",
        "aten.save.default",
        "aten.add_.Tensor",
        "aten.mul.out",
        "aten._print.default",
        "rolora.attention.__init__",
        "inductor.accumulate_grad_.default",
        "prim.Print.default",
        "os.system",
        "operator.methodcaller",
        "",
        None,
        7,
        ["aten", "linear", "default"],
    ],
)
def test_other_functions_have_no_name(name: Any) -> None:
    with pytest.raises(GraphFormatError, match=r"the graph calls|lacks"):
        find_operator(name)


def evil(place: Path) -> str:
    return f"__import__('pathlib').Path({str(place)!r}).write_text('ran', 'utf-8')"


def first(described: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in described["nodes"] if entry["op"] == op)
    return found


def _input(described: dict[str, Any], code: str) -> None:
    first(described, "placeholder")["target"] = f"tokens={code}"


def _keyword(described: dict[str, Any], code: str) -> None:
    first(described, "call_function")["kwargs"] = {f"x={code}, y": 1}


def _parameter(described: dict[str, Any], code: str) -> None:
    entry = first(described, "get_attr")
    described["aliases"][f'x"), {code}, (self, "x'] = entry["target"]
    entry["target"] = f'x"), {code}, (self, "x'


def _name(described: dict[str, Any], code: str) -> None:
    first(described, "get_attr")["name"] = f"x = {code} #"


def _method(described: dict[str, Any], code: str) -> None:
    first(described, "call_function").update(op="call_method", target=code)


def _module(described: dict[str, Any], code: str) -> None:
    first(described, "call_function").update(op="call_module", target="__class__")


def _type(described: dict[str, Any], code: str) -> None:
    first(described, "call_function")["args"] = [{"torch": "hub.load"}]


@pytest.mark.parametrize("tamper", [_input, _keyword, _parameter, _name, _method, _module, _type])
def test_no_code_in_names(
    tamper: Callable[[dict[str, Any], str], None], saved: Content, tmp_path: Path
) -> None:
    described, tensors = copy.deepcopy(saved[0]), saved[1]
    tamper(described, evil(tmp_path / "ran"))
    with pytest.raises(GraphFormatError, match=r"graph\.safetensors"):
        load_graph(written(described, tensors, tmp_path / "graph.safetensors"))
    assert not (tmp_path / "ran").exists()


OWN = [
    "forward",
    "graph",
    "_parameters.x",
    "__class__",
    "a.__dict__",
    "training",
    "a.forward",
    "a..b",
    "../a",
    "",
]


@pytest.mark.parametrize("name", OWN)
def test_no_parameter_takes_the_place_of_what_a_module_has(name: str, saved: Content, tmp_path: Path) -> None:
    described, tensors = copy.deepcopy(saved[0]), saved[1]
    entry = first(described, "get_attr")
    described["aliases"][name], entry["target"] = entry["target"], name
    with pytest.raises(GraphFormatError, match=r"parameter"):
        load_graph(written(described, tensors, tmp_path / "graph.safetensors"))


def test_what_writes_into_a_tensor_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    graph = copy_graph(captured("llama"))
    last = next(n for n in reversed(graph.graph.nodes) if n.op == "call_function")
    insert_after(graph, last, aten.mul_.Tensor, last, 2.0)
    with pytest.raises(GraphFormatError, match=r"cannot save .*writes into a tensor"):
        save_graph(graph, tmp_path / "graph.safetensors")
    assert not list(tmp_path.iterdir())


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in list(entries):
        yield value, key
        if isinstance(entry, (dict, list)):
            yield from places(entry)


POOL: list[Any] = [
    None, True, -1, 0, 10**30, 1e308, "", "x", "self", "None", "lambda", "forward", "__class__", "tokens",
    "linear", "aten.linear.default", "aten.mul_.Tensor", "operator.getitem", "call_module", "call_method",
    "get_attr", "placeholder", "output", "import_module.__self__.import_module", "lm_head.weight", "../../x",
    "x\u0000y", [], {}, [[]], {"node": "linear"}, {"node": "no such"}, {"torch": "float32"},
    {"torch": "load"}, {"torch": []}, {"device": "meta"}, {"device": "no such"}, {"float": "nan"},
    {"float": 3}, {"x": 1, "y": 2},
]  # fmt: skip


def mutated(content: Content, random_: random.Random, code: str) -> Content:
    """A description with one to three entries replaced, dropped, doubled or swapped, and tensors likewise."""
    described, tensors = copy.deepcopy(content[0]), dict(content[1])
    for _ in range(random_.randint(1, 3)):
        container, key = random_.choice(list(places(described)))
        others = [container[k] for k in (container if isinstance(container, dict) else range(len(container)))]
        action = random_.randrange(5)
        if action == 0 and isinstance(container, list):
            container.insert(key, copy.deepcopy(random_.choice(others)))
        elif action == 1:
            del container[key]
        elif action == 2:
            container[key] = copy.deepcopy(random_.choice(others))
        else:
            container[key] = copy.deepcopy(random_.choice([*POOL, code, f"x={code}"]))
    name = random_.choice(list(tensors))
    action = random_.randrange(4)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[name] = torch.zeros(random_.choice([(0,), (1,), (2, 3, 4)]), dtype=torch.uint8)
    return described, tensors


def test_damaged_graphs_load_or_are_refused(saved: Content, tmp_path: Path) -> None:
    """Whatever is changed: a graph that can be looked at, or an error of our own; and nothing runs."""
    random_, ran, loaded = random.Random(7), tmp_path / "ran", 0
    for _ in range(200):
        content = mutated(saved, random_, evil(ran))
        path = written(*content, tmp_path / "graph.safetensors")
        try:
            graph = load_graph(path)
            graph_text(graph)
            infer_shapes(graph)
            loaded += 1
        except RoloraError:
            pass
        assert not ran.exists()
    assert 10 < loaded < 190
