"""Nothing that is read runs code, and nothing that is given is written into."""

from __future__ import annotations

import ast
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import matrices, tokens_for
from test_quantize_weights import wide

import rolora_passes
from rolora_passes import apply_passes, history
from rolora_passes.graphs.graph import copy_graph, parameters
from rolora_passes.graphs.info import info
from rolora_passes.passes.base import Calibration
from rolora_passes.passes.manager import PassLike
from rolora_passes.passes.registry import PASSES
from rolora_passes.recipes import load_recipe
from rolora_passes.reporting.arrays import Arrays
from rolora_passes.reporting.page import write_page

ROOT = Path(rolora_passes.__file__).parent
# What makes code of data, or objects of names; and where it is meant.
UNSAFE = {
    "eval", "exec", "compile", "__import__", "import_module", "pickle", "dill", "cloudpickle", "marshal",
    "shelve", "joblib", "runpy", "os.system", "subprocess", "torch.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "numpy.load", "np.load", "jit.load", "export.load", "load_library", "trust_remote_code",
    "allow_pickle",
}  # fmt: skip
MEANT = {
    ("extras.py", "import_module"),  # an extra, by a name that stands in the code
    ("moved.py", "import_module"),  # our own modules, by the table of their names
    ("passes/registry.py", "import_module"),  # the catalogue of passes
    ("plugins.py", "import_module"),  # the entry points of installed packages
    ("export/target.py", "import_module"),  # the files of a folder of ours
    ("graphs/bases/rotations.py", "torch.load"),  # weights_only, which is looked at below
    ("learning/loop.py", "torch.load"),
    ("loading/checkpoint.py", "torch.load"),
}


def uses(tree: ast.AST) -> set[str]:
    """What of UNSAFE a module names: in calls, imports and keywords."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            tail = ".".join(name.split(".")[-2:])
            plain = {name, tail} if "." in name else {name}
            last = name.rpartition(".")[2]
            found |= (plain | ({last} if last in ("import_module", "load_library") else set())) & UNSAFE
            found |= {k.arg for k in node.keywords if k.arg in ("trust_remote_code", "allow_pickle")}
            if tail == "torch.load":
                assert "weights_only=True" in ast.unparse(node), ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {module.split(".")[0] for module in modules} & UNSAFE
    return found


def test_nothing_makes_code_of_data() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in ROOT.rglob("*.py")
        for name in uses(ast.parse(path.read_text("utf-8")))
    }
    assert found == MEANT


def test_recipes_name_passes_and_nothing_else(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for text in (
        f"passes: [!!python/object/apply:os.mkdir ['{ran}']]",
        "passes: ['os:mkdir']",
        "passes: [{'rolora_passes.passes.rotate:Rotate': {}}]",
        "passes: [{rotate: {__class__: 1}}]",
    ):
        (tmp_path / "recipe.yaml").write_text(text, "utf-8")
        with pytest.raises(rolora_passes.errors.PassError):
            load_recipe(tmp_path / "recipe.yaml")
    assert not ran.exists()


HOSTILE = "</script></title><img src=x onerror=alert(1)>${x}$data\"'`<!--"


class Tags(HTMLParser):
    """The tags of a page and their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))


def test_names_in_a_report_are_text(tmp_path: Path) -> None:
    """A page of hostile names has the elements of any other, and its names are nowhere in it as they are."""

    def page(name: str) -> str:
        data = {"about": {"model": name, "recipe": name, "text": name, "beginning": name}, name: [name]}
        write_page(data, Arrays(), tmp_path / "page.html")
        return (tmp_path / "page.html").read_text("utf-8")

    hostile = page(HOSTILE)
    assert Tags(hostile).tags == Tags(page("model")).tags
    assert "onerror=alert" not in hostile.replace("&lt;img src=x onerror=alert(1)&gt;", "")
    scripts = (ROOT / "reporting" / "page").glob("*.js")
    for text in (script.read_text("utf-8") for script in scripts):
        assert not any(
            word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write")
        )


CALIBRATED = {"under": "W4A4", "steps": 2, "batch": 1}
ROTATED: list[PassLike] = ["fuse-norm", "rotate", "insert-hadamard"]
STORED: list[PassLike] = ["quantize-weights", "fold-constants"]
# Every pass after what it needs, with settings that make it change something.
PIPELINES: dict[str, list[PassLike]] = {
    "fuse-norm": ["fuse-norm"],
    "insert-scaling": ["fuse-norm", "insert-scaling"],
    "rotate": ["fuse-norm", {"rotate": {"others": "orthogonal"}}],
    "insert-hadamard": [{"insert-hadamard": {"factors": True}}],
    "learn-rotation": [*ROTATED, {"learn-rotation": CALIBRATED}],
    "learn-scales": [*STORED, {"learn-scales": {**CALIBRATED, "under": "W16A8"}}],
    "add-lora": ["add-lora"],
    "tune-lora": ["add-lora", {"tune-lora": {"steps": 2, "batch": 1}}],
    "rilq": [*STORED, "add-lora", {"rilq": {"steps": 2, "batch": 1}}],
    "loftq": [{"loftq": {"rank": 4}}],
    "merge-lora": [{"add-lora": {"init": "gaussian"}}, "merge-lora"],
    "observe-activations": ["observe-activations"],
    "smooth-quant": [{"observe-activations": {"per": "channel"}}, "smooth-quant"],
    "quantize-weights": [{"quantize-weights": {"method": "gptq"}}],
    "quantize-activations": [{"quantize-activations": {"clip_search": True, "float_weights": True}}],
    "quantize-kv-cache": ["quantize-kv-cache"],
    "quantize-embedding": ["quantize-embedding"],
    "fold-constants": ["fuse-norm", "rotate", "fold-constants"],
    "add-kv-cache": [{"add-kv-cache": {"max_length": 32}}],
}


@pytest.mark.parametrize("name", list(PIPELINES))
def test_no_pass_writes_into_what_it_was_given(name: str) -> None:
    """Neither into the tensors of the graph before it, which a model and others share, nor its nodes."""
    tokens, graph = tokens_for(wide(), 4, 16), copy_graph(wide())
    before, after = graph, graph
    for step in PIPELINES[name]:
        before = after
        steps = {n: t for way in info(before).ways.values() for n, t in way.tensors.items()}
        held = matrices(before) | steps | parameters(before)
        copies = {key: value.detach().clone() for key, value in held.items()}
        versions = {key: value._version for key, value in held.items()}
        grads = {key: value.requires_grad for key, value in held.items()}
        text = str(before.graph)
        after = apply_passes(before, [step], calibration=Calibration(tokens, reference=graph))
        for key, value in held.items():
            assert torch.equal(value, copies[key]), f"{name} wrote into {key}"
            assert value._version == versions[key] and value.requires_grad == grads[key], key
            assert value.grad is None, f"{name} left a gradient on {key}"
        assert str(before.graph) == text
    assert history(after)[-1].report.modified


def test_every_pass_is_tried() -> None:
    assert PIPELINES.keys() == {*PASSES}
