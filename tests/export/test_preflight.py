"""What is refused before weights are loaded is exactly what a recipe and a lowering would refuse after."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from architectures import FULL, SOME, tiny_wide
from helpers import captured, count, model_of, tokens_for
from test_bad_input import saved
from test_quantize_weights import wide

from rolora_passes import apply_passes
from rolora_passes.errors import LoweringError, PassError, RoloraError
from rolora_passes.export.compile import compile_model
from rolora_passes.export.preflight import Outline, outline, require_kernels, require_memory
from rolora_passes.export.target import make_target
from rolora_passes.graphs.graph import site_names
from rolora_passes.graphs.shapes import infer_shapes
from rolora_passes.graphs.sites import is_head
from rolora_passes.passes.registry import make_pass

Run = Callable[..., tuple[int, str, str]]
TARGETS = {
    "executorch": make_target("executorch"),
    "ort": make_target("onnx"),
    "portable": make_target("onnx", flavor="portable"),
}
W4, A8 = {"quantize-weights": {}}, {"quantize-activations": {}}
NF = {"quantize-weights": {"grid": "nf"}}
BRANCHES = {"quantize-weights": {"bits": 8, "group_size": None, "targets": ["lora_A", "lora_B"]}}
LORA = {"add-lora": {"rank": 4}}
RECIPES: dict[str, tuple[list[Any], str]] = {
    "4 bits in groups of 32": ([W4, A8], ""),
    "per channel": ([{"quantize-weights": {"group_size": None}}, A8], ""),
    "3 bits": ([{"quantize-weights": {"bits": 3}}, A8], "executorch"),
    "3 bits by GPTQ": ([{"quantize-weights": {"bits": 3, "method": "gptq"}}, A8], "executorch"),
    "3 bits beside activations in float": ([{"quantize-weights": {"bits": 3}}], ""),
    "3 bits where no activation is rounded": (
        [
            {"quantize-weights": {"bits": 3, "targets": ["down_proj"], "head": None}},
            {"quantize-weights": {}},
            {"quantize-activations": {"targets": ["q_proj", "gate_proj"]}},
        ],
        "",
    ),
    "3 bits in one layer": (
        [
            {"quantize-weights": {"bits": 3, "targets": "re:.*layers\\.1\\.mlp\\.up_proj"}},
            {"quantize-weights": {}},
            A8,
        ],
        "executorch",
    ),
    "a head of 3 bits": ([{"quantize-weights": {"head": 3}}, A8], "executorch"),
    "groups of 16": ([{"quantize-weights": {"group_size": 16}}, A8], "executorch"),
    "groups of 8": ([{"quantize-weights": {"group_size": 8}}, A8], "executorch ort"),
    "groups of 48": ([{"quantize-weights": {"group_size": 48}}, A8], "executorch ort portable"),
    "zero points": ([{"quantize-weights": {"symmetric": False}}, A8], "executorch"),
    "a codebook": ([NF], "ort portable"),
    "a codebook, rounded activations": ([NF, A8], "executorch ort portable"),
    "activations of 4 bits": ([W4, {"quantize-activations": {"bits": 4}}], "executorch"),
    "symmetric activations": ([W4, {"quantize-activations": {"symmetric": True}}], "executorch"),
    "activations in groups": ([W4, {"quantize-activations": {"group_size": 32}}], "executorch"),
    "clipped activations": ([W4, {"quantize-activations": {"clip": 0.9}}], "executorch"),
    "clips to be found": (
        [W4, {"quantize-activations": {"bits": 4, "clip_search": True, "head": 4}}],
        "executorch",
    ),
    "float weights": ([{"quantize-activations": {"float_weights": True}}], "executorch"),
    "a cache of 8 bits": ([{"quantize-kv-cache": {"keys": 8, "values": 8}}], ""),
    "a cache of 4 bits": ([{"quantize-kv-cache": {}}], "executorch"),
    "a cache by the token": ([{"quantize-kv-cache": {"keys": 8, "values": 8, "per": "token"}}], "executorch"),
    "an embedding of 3 bits": ([{"quantize-embedding": {"bits": 3}}], "executorch"),
    "an embedding in groups of 8": ([{"quantize-embedding": {"group_size": 8}}], "ort"),
    "branches beside weights": ([W4, LORA, A8], ""),
    "float branches that read 8 bits": (
        [W4, LORA, {"quantize-activations": {"float_weights": True}}],
        "executorch",
    ),
    "branches of 8 bits": (
        [W4, LORA, BRANCHES, A8],
        "",
    ),
    "LoftQ with a table": ([{"loftq": {"group_size": 32}}], "ort portable"),
    "LoftQ on integers": ([{"loftq": {"group_size": 32, "grid": "int"}}, A8], ""),
    "SmoothQuant": ([{"observe-activations": {"per": "channel"}}, "smooth-quant", W4, A8], ""),
    "a static grid": (["observe-activations", W4, {"quantize-activations": {"static": True}}], ""),
    "online Hadamards": (["fuse-norm", "rotate", "insert-hadamard", W4, A8], ""),
}  # fmt: skip
# A whole .pte takes seconds, and other tests write many: of recipes that ExecuTorch takes, three.
FEW = {"4 bits in groups of 32", "3 bits where no activation is rounded", "branches of 8 bits"}
PAIRS = [
    (name, target)
    for name, (_, refused) in RECIPES.items()
    for target in TARGETS
    if FULL or target != "executorch" or "executorch" in refused or name in FEW
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Outline:
    folder = tmp_path_factory.mktemp("model")
    tiny_wide().config.save_pretrained(folder)
    return outline(str(folder))


def refusal(attempt: Callable[[], Any]) -> RoloraError | None:
    try:
        attempt()
    except RoloraError as error:
        return error
    return None


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_preflight_and_lowering_agree(name: str, target: str, known: Outline, tmp_path: Path) -> None:
    specs, refused = RECIPES[name]
    passes, lowering = [make_pass(spec) for spec in specs], TARGETS[target]
    expected = target in refused.split()
    before = refusal(lambda: require_kernels(known, passes, [lowering]))
    assert (before is not None) == expected, before

    def whole() -> None:
        data = tokens_for(wide(), 2, 16)
        graph = apply_passes(wide(), [*passes, make_pass("fold-constants")], calibration=data, verify=False)
        lowering.lower(graph, tmp_path, max_length=16)

    after = refusal(whole)
    assert (after is not None) == expected, after
    assert type(before) is type(after)


@pytest.mark.parametrize("name", SOME)
def test_an_outline_has_the_linears_of_the_graph(name: str, tmp_path: Path) -> None:
    model_of(name).config.save_pretrained(tmp_path)
    known, graph = outline(str(tmp_path)), captured(name)
    shapes = infer_shapes(graph)
    found = {site: int(shapes[node.args[0]].shape[-1]) for node, site in site_names(graph).items()}
    heads = [site for node, site in site_names(graph).items() if is_head(node)]
    assert [*known.linears][-1:] == heads or known.embedding[0].removesuffix(".weight") in heads
    for site, width in list(known.linears.items())[:-1]:
        parts = {n: w for n, w in found.items() if n == site or n.startswith(site + ".")}
        assert parts and set(parts.values()) == {width}, site
    assert known.vocabulary == 97 and known.positions == 64
    assert known.layers == count(graph, "attention")


def test_a_model_without_heads_has_an_outline(tmp_path: Path) -> None:
    t.MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1).save_pretrained(tmp_path)
    known = outline(str(tmp_path))
    assert "backbone.layers.0.mixer.in_proj" in known.linears and known.positions is None


# The command line.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "model", tiny_wide())


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(t.PreTrainedModel, "from_pretrained", load)


def lora(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2} | changes))
    return folder


def short_vocabulary(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 95}))


def write(path: Path, *passes: Any) -> Path:
    path.write_text(json.dumps({"passes": passes}))
    return path


def no_change(model: Path) -> None:
    pass


REFUSED: dict[str, tuple[list[Any], list[object], Callable[[Path], Any], str]] = {
    "bits": ([{"quantize-weights": {"bits": 3, "method": "gptq"}}, A8], [], no_change, "found 3 bits symm"),
    "groups": (
        [{"quantize-weights": {"group_size": 48}}], ["--target", "onnx"], no_change,
        r"groups of 48 do not divide model\.layers\.0\.self_attn\.q_proj, whose width is 64",
    ),
    "the cache": (["add-kv-cache"], [], no_change, "the cache is added when a graph is lowered"),
    "rotations": (["fuse-norm", {"rotate": {"given": "R.bin"}}], [], no_change, "no rotations at R.bin"),
    "an adapter": ([{"add-lora": {"adapter": "none"}}], [], no_change, "none"),
    "a method": ([W4], ["--adapter", "a=none"], no_change, "none"),
    "the tokenizer": (
        [W4], [], lambda model: [p.unlink() for p in model.glob("tokenizer*")], "cannot load the tokenizer",
    ),
    "the vocabulary": (
        [W4], [], short_vocabulary, "expected a tokenizer of at most 95 tokens, .* found 96: it is another",
    ),
    "the context": (
        [W4], ["--max-length", 10**12], no_change,
        r"a context of 1000000000000 tokens takes \S+ GB .* this machine has \S+ GB: give a --max-length of",
    ),
    "the text": (
        [{"quantize-weights": {"method": "gptq"}}], ["--length", 4000], no_change, "expected .*4000 tokens",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("passes", "options", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_loaded_or_deleted(
    passes: list[Any], options: list[object], change: Callable[[Path], Any], message: str,
    model: Path, tmp_path: Path, rolora: Run,
) -> None:  # fmt: skip
    change(model)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/finished").write_text("a stage")
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 " * 40)
    recipe = write(tmp_path / "recipe.yaml", *passes)
    before = sorted(tmp_path.rglob("*"))
    given = (
        "--calibration",
        tmp_path / "text.txt",
        "--samples",
        2,
        "--length",
        16,
        "--work",
        tmp_path / "work",
    )
    status, printed, said = rolora(
        "compile", model, "--recipe", recipe, "-o", tmp_path / "out", *given, *options
    )
    assert status == 2 and not printed
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_too_few_learned_positions_are_found_before_any_pass(tmp_path: Path) -> None:
    model, done = saved(tmp_path / "model", model_of("gpt2", torch.float32)), list[object]()
    with pytest.raises(
        LoweringError, match="expected a model with 80 positions, found a table that has fewer"
    ):
        compile_model(str(model), "float", tmp_path / "out", max_length=80, on_pass=done.append)
    assert not done and not (tmp_path / "out").exists()


def test_a_longer_context_than_a_model_is_made_for_is_told(model: Path, tmp_path: Path, rolora: Run) -> None:
    recipe = write(tmp_path / "recipe.yaml", "fold-constants")
    arguments = ("compile", model, "--recipe", recipe, "--target", "onnx", "-o", tmp_path / "out")
    status, _, said = rolora(*arguments, "--max-length", 80)
    assert status == 0 and "warning: the programs hold 80 tokens, and the model is made for 64" in said
    assert said.index("made for 64") < said.index("fold-constants") < said.rindex("made for 64")
    warnings = json.loads((tmp_path / "out/manifest.json").read_text())["warnings"]
    assert any("made for 64" in warning for warning in warnings)
    shutil.rmtree(tmp_path / "out")
    status, _, said = rolora(*arguments, "--max-length", 64)
    assert status == 0 and "made for" not in said


def test_memory_for_a_context(known: Outline, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, width, layers = known.heads[1], known.heads[2], known.layers
    one = 2 * 2 * 4 * width * (heads * layers + 1) + 4 * sum(set(known.linears.values()))
    monkeypatch.setattr("rolora_passes.export.preflight._memory", lambda: one * 1000)
    require_memory(known, [], 1000)
    with pytest.raises(LoweringError, match=r"a context of 1001 tokens .* a --max-length of 1000 or less"):
        require_memory(known, [], 1001)
    require_memory(known, [make_pass({"quantize-kv-cache": {"keys": 8, "values": 8}})], 1001)


def test_a_target_that_the_outline_does_not_show_is_left_to_the_pass(known: Outline, tmp_path: Path) -> None:
    experts = make_pass({"quantize-weights": {"bits": 3, "targets": "experts"}})
    require_kernels(known, [experts], [TARGETS["ort"]])
    with pytest.raises(PassError, match="no linear matches 'experts'"):
        apply_passes(wide(), [experts])
