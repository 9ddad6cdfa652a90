"""What users get wrong: an error of ours that says what, where and what to do, and nothing half-written."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from architectures import UNTIED
from helpers import captured, model_of
from tiny_checkpoint import character_tokenizer

from rolora_passes import (
    AddLoRA,
    FuseNorm,
    InsertHadamard,
    QuantizeActivations,
    QuantizeEmbedding,
    QuantizeKVCache,
    QuantizeWeights,
    Rotate,
    apply_passes,
)
from rolora_passes.cli import main
from rolora_passes.errors import (
    CaptureError,
    GraphFormatError,
    LoweringError,
    MissingExtraError,
    PassError,
    PassOrderError,
)
from rolora_passes.export import compile_model, to_executorch
from rolora_passes.graphs import capture, load_graph, save_graph, save_rotations
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe

ROOT = Path(__file__).parent.parent
SMALL = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved(folder: Path, model: t.PreTrainedModel | None = None) -> Path:
    """A tiny checkpoint as transformers writes it, with a tokenizer."""
    if model is None:
        torch.manual_seed(0)
        widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        config = t.LlamaConfig(
            vocab_size=97, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **widths
        )
        model = t.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def rolora(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process: its status, and what it said on standard error."""

    def command(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, capsys.readouterr().err

    return command


# Models.


def meta_model() -> t.PreTrainedModel:
    with torch.device("meta"):
        return t.LlamaForCausalLM(t.LlamaConfig(**UNTIED))


def with_weights(change: Callable[[t.PreTrainedModel], None]) -> t.PreTrainedModel:
    model = copy.deepcopy(model_of("llama"))
    with torch.no_grad():
        change(model)
    return model


def damaged(model: t.PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight[3, 4:6] = torch.tensor([float("nan"), float("inf")])


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a path": (lambda: "model", "found str; load it with transformers.AutoModelForCausalLM"),
    "any module": (lambda: torch.nn.Linear(2, 2), "found Linear; load it with"),
    "no head": (
        lambda: model_of("llama").model,
        "found causal attention in LlamaAttention; a decoder is captured with its language-model head",
    ),
    "a classifier": (
        lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**UNTIED)),
        "found causal attention in LlamaAttention; a decoder is captured with its language-model head",
    ),
    "bidirectional": (
        lambda: t.BertLMHeadModel(t.BertConfig(intermediate_size=16, **SMALL)),
        "bidirectional attention in BertSelfAttention",
    ),
    "an additive bias": (
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=97)
        ),
        r"T5Attention passes \['position_bias'\] to attention",
    ),
    "attention of its own": (
        lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)),
        "the model computes with its attention mask itself",
    ),
    "no attention": (
        lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=1)
        ),
        "MambaForCausalLM does not run at another sequence length",
    ),
    "no weights": (meta_model, "found model.embed_tokens.weight on the meta device"),
    "NaN weights": (
        lambda: with_weights(damaged),
        r"found 2 NaN or infinite values in model.layers.1.mlp.up_proj.weight \[40, 24\]; the checkpoint is",
    ),
    "huge weights": (
        lambda: with_weights(lambda m: m.model.layers[1].mlp.up_proj.weight.fill_(1e200)),
        "itself returns NaN or infinite logits on random tokens in torch.float64",
    ),
}


@pytest.mark.parametrize(("model", "message"), MODELS.values(), ids=MODELS.keys())
def test_models_that_cannot_be_captured(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model())


def test_a_model_of_zeros_is_no_error() -> None:
    capture(with_weights(lambda m: [p.zero_() for p in m.parameters()] and None))


# Graphs, and the order of passes.


def test_passes_want_a_graph_and_a_list() -> None:
    with pytest.raises(
        GraphFormatError, match=r"found LlamaForCausalLM: call rolora_passes\.graphs\.capture"
    ):
        apply_passes(model_of("llama"), [FuseNorm()])  # type: ignore[arg-type]
    with pytest.raises(GraphFormatError, match=r"legal graph from .*capture: its inputs are input_1"):
        apply_passes(torch.fx.symbolic_trace(torch.nn.Linear(2, 2)), [FuseNorm()])
    for passes, message in (
        (FuseNorm(), r"found FuseNorm\(.*\): write \[FuseNorm"),
        ("fuse-norm", r"found 'fuse-norm': write \['fuse-norm'\]"),
        ([FuseNorm], r"found <class .*>; write FuseNorm\(\)"),
        ([3], "expected a pass, a name, or one {name: options}, found 3"),
        (["fuze-norm"], "found 'fuze-norm'; there are .*, fuse-norm, "),
        ([{"rotate": {"sead": 1}}], "rotate has no option 'sead'; there are residual, heads, others, seed"),
        ([{"rotate": {"seed": "1"}}], "rotate: expected seed to be int, found '1'"),
        ([{"rotate": 3}], "rotate: expected {option: value}, found 3"),
        ([{"quantize-weights": {"bits": True}}], "quantize-weights: expected bits to be int, found True"),
    ):
        with pytest.raises(PassError, match=message):
            apply_passes(captured("llama"), passes)  # type: ignore[arg-type]


ORDERS: dict[str, tuple[list[Any], str]] = {
    "rotate, norms not fused": (["rotate"], "rotate requires .*'norms fused', .*: run fuse-norm first"),
    "rotate twice": (
        ["fuse-norm", "rotate", "rotate"],
        r"rotate cannot run on a graph that is already 'rotated' \(by rotate\): move it before",
    ),
    "fuse-norm too late": (
        ["fuse-norm", "rotate", "fuse-norm"],
        r"fuse-norm cannot run on a graph that is already 'rotated' \(by rotate\)",
    ),
    "rotate quantized weights": (
        ["fuse-norm", "quantize-weights", "rotate"],
        r"rotate cannot run .* 'weights quantized' \(by quantize-weights\)",
    ),
    "smoothing before observing": (
        ["smooth-quant", "observe-activations"],
        "smooth-quant requires .*'activations observed', .*: run observe-activations first",
    ),
    "merge after activations are quantized": (
        ["add-lora", "quantize-activations", "merge-lora"],
        r"merge-lora cannot run .* 'activations quantized' \(by quantize-activations\)",
    ),
}


@pytest.mark.parametrize(("passes", "message"), ORDERS.values(), ids=ORDERS.keys())
def test_impossible_orders(
    passes: list[Any], message: str, tmp_path: Path, rolora: Callable[..., tuple[int, str]]
) -> None:
    done: list[object] = []
    with pytest.raises(PassOrderError, match=message):
        apply_passes(captured("llama"), passes, on_pass=done.append)
    assert not done, "a pass ran before the order was refused"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"passes": passes}))
    status, said = rolora("compile", "./no-such-model", "--recipe", recipe, "-o", tmp_path / "out")
    assert status == 2
    assert re.search(f"^error: PassOrderError: {message}", said), "found out before the model is looked for"


def test_a_rotated_graph_stays_known_as_such(tmp_path: Path) -> None:
    rotated = apply_passes(captured("llama"), [FuseNorm(), Rotate()])
    again = load_graph(save_graph(rotated, tmp_path / "graph.safetensors"))
    for graph in (rotated, again):
        with pytest.raises(PassOrderError, match=r"already 'rotated' \(before these passes\)"):
            apply_passes(graph, [Rotate()])


# Rotations.

BINARY = {
    "junk": b"not a file of tensors",
    "empty": b"",
    "cut": b"PK\x03\x04" + bytes(100),
}
ROTATIONS: dict[str, tuple[Any, str]] = {
    "size": ({"R1": torch.eye(16)}, r"expected R1 to be 24 x 24 \(or 24 signs\), found \[16, 16\]"),
    "not square": ({"R1": torch.eye(24)[:, :5]}, r"expected R1 to be 24 x 24 .*, found \[24, 5\]"),
    "signs": ({"R1": torch.full((24,), 0.5)}, r"expected R1 to hold signs \(\+1 or -1\)"),
    "not orthogonal": ({"R1": torch.ones(24, 24)}, "expected R1 to be orthogonal, found .* up to 2.4e"),
    "NaN": ({"R1": torch.full((24, 24), torch.nan)}, "expected R1 to be orthogonal, found .* up to nan"),
    "not a tensor": ({"R1": [[1.0]]}, "expected R1 to be a tensor, found list"),
    "no such class": ({"R7": torch.eye(24)}, r"given \['R7'\] fit no free class; this graph has \['R1', "),
    "no file": ("no/such/R.bin", "no rotations at no/such/R.bin; expected R.bin or rotations.json"),
}


@pytest.mark.parametrize(("given", "message"), ROTATIONS.values(), ids=ROTATIONS.keys())
def test_given_rotations(given: Any, message: str) -> None:
    with pytest.raises(PassError, match="^rotate: .*" + message):
        apply_passes(captured("llama"), [FuseNorm(), Rotate(given=given)])


@pytest.mark.parametrize("name", ["R.bin", "rotations.json"])
@pytest.mark.parametrize("content", BINARY.values(), ids=BINARY.keys())
def test_damaged_rotation_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PassError, match=rf"^rotate: {tmp_path / name} is damaged, or not a [^\n]*$"):
        apply_passes(captured("llama"), [FuseNorm(), Rotate(given=tmp_path / name)])


def test_rotation_files_of_something_else(tmp_path: Path) -> None:
    torch.save({"R1": [1.0, 2.0]}, tmp_path / "R.bin")
    with pytest.raises(PassError, match="to hold tensors by name"):
        apply_passes(captured("llama"), [FuseNorm(), Rotate(given=tmp_path / "R.bin")])
    (tmp_path / "rotations.json").write_text("[1]")
    with pytest.raises(PassError, match="or not a manifest"):
        apply_passes(captured("llama"), [FuseNorm(), Rotate(given=tmp_path / "rotations.json")])
    torch.save({"R2": torch.eye(8)}, tmp_path / "R.bin")
    for entry in ('{"signs": 3}', '{"signs": "++x"}', '{"signs": ["+"]}', "{}"):
        (tmp_path / "rotations.json").write_text('{"R1": ' + entry + "}")
        with pytest.raises(PassError, match=r"R1|or not a manifest"):
            apply_passes(captured("llama"), [FuseNorm(), Rotate(given=tmp_path / "rotations.json")])


def test_a_file_of_rotations_runs_nothing(tmp_path: Path) -> None:
    """R.bin is a pickle, of tensors alone."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"R1": Evil()}, tmp_path / "R.bin")
    with pytest.raises(PassError, match="is damaged, or not a file of tensors"):
        apply_passes(captured("llama"), [FuseNorm(), Rotate(given=tmp_path / "R.bin")])
    assert not (tmp_path / "ran").exists()


# Options.

OPTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "group does not divide": (QuantizeWeights, "groups of 32 do not divide .*q_proj, whose width is 24"),
    "group of the table": (
        lambda: QuantizeEmbedding(group_size=5),
        "groups of 5 do not divide .*, whose width is 24",
    ),
    "group of nothing": (lambda: QuantizeEmbedding(group_size=0), "must be positive or None, found 0"),
    "group of one": (
        lambda: QuantizeWeights(group_size=1),
        "group_size must be 2 or more, None or 'auto', found 1",
    ),
    "bits": (lambda: QuantizeWeights(bits=1), "bits must be 2 to 8, found 1"),
    "bits of activations": (lambda: QuantizeActivations(bits=2), "bits must be 3 to 8, found 2"),
    "clip": (lambda: QuantizeActivations(clip=0.0), "clip must be above 0 and at most 1, found 0.0"),
    "bits of keys": (lambda: QuantizeKVCache(keys=16), "keys must be 2 to 8, found 16"),
    "target": (
        lambda: QuantizeWeights(group_size=None, targets="qproj"),
        "no linear matches 'qproj'; there are q_proj, k",
    ),
    "target of adapters": (lambda: AddLoRA(targets=("qproj",)), r"no linear matches \('qproj',\); a branch"),
    "pattern": (lambda: AddLoRA(targets="re:("), r"'re:\(' is not a regular expression"),
    "rank": (lambda: AddLoRA(rank=99), "rank 99 exceeds .*q_proj, which is 32 x 24"),
    "block does not divide": (lambda: InsertHadamard(block=16), "blocks of 16 do not divide an axis of 8"),
    "no such Hadamard": (lambda: InsertHadamard(block=6), "no Hadamard of order 6 is known"),
    "method": (lambda: Rotate(residual="haar"), "'hadamard', 'orthogonal' or None, found 'haar'"),
}


@pytest.mark.parametrize(("make", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply_passes(captured("llama", torch.float32), [make()])


def test_a_misspelt_target_of_activations_is_no_silence() -> None:
    with pytest.raises(PassError, match="quantize-activations: no linear matches 'qproj'"):
        apply_passes(
            captured("llama", torch.float32),
            [QuantizeWeights(group_size=None), QuantizeActivations(targets="qproj")],
        )


RECIPES = {
    "not YAML": (b"passes: [", "is not YAML"),
    "not text": (b"\xff\xfe\x00", "is not a text file"),
    "no passes": (b"- rotate", r"expected a recipe {passes: \[...\]} in .*, found \['rotate'\]"),
    "one pass": (b"passes: rotate", "found passes: rotate"),
    "a pass unknown": (b"passes: [rotat]", "found 'rotat'; there are"),
    "a word for None": (b"passes: [{rotate: {heads: no}}]", r"expected heads to be str \| None, found False"),
}


@pytest.mark.parametrize(("content", "message"), RECIPES.values(), ids=RECIPES.keys())
def test_recipes(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(PassError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


# Checkpoints, by the library and by the command line.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_head(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(folder, t.LlamaModel(t.LlamaConfig(**UNTIED)))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def not_numbers(folder: Path) -> None:
    model = load_model(str(folder))[0]
    model.lm_head.weight.data[2, 3] = float("nan")
    model.save_pretrained(folder)


def masked_model(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(folder, t.BertForMaskedLM(t.BertConfig(intermediate_size=16, **SMALL)))


def sharded_with_one_lost(folder: Path) -> None:
    model = load_model(str(folder))[0]
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def gguf_only(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"hello")


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "expected a model folder or .gguf file at .*tiny, found nothing"),
    "empty": (
        lambda folder: [p.unlink() for p in folder.iterdir()],
        "expected config.json or one .gguf in .*tiny, found 0",
    ),
    "cut": (
        lambda folder: cut(folder / "model.safetensors"),
        r"model.safetensors is damaged or cut short \(\d+ bytes\): .*fetch it again",
    ),
    "no bytes": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        r"model.safetensors is damaged or cut short \(0 bytes\)",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "cannot load a causal language model from .*tiny: OSError: .*no file named model.safetensors",
    ),
    "a shard lost": (sharded_with_one_lost, "the files of the index in .*tiny, found no model-00001"),
    "no head": (without_head, "all weights of a LlamaForCausalLM in .*tiny, found no lm_head.weight: it is"),
    "no tokenizer": (without_tokenizer, "cannot load the tokenizer of .*tiny: "),
    "config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json.*(JSON file|JSONDecodeError)",
    ),
    "not a causal model": (masked_model, "found bidirectional attention in BertSelfAttention|expected all"),
    "NaN": (not_numbers, "found 1 NaN or infinite values in lm_head.weight"),
    "GGUF": (gguf_only, r"cannot load .*model\.gguf: expected a whole GGUF file"),
}


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoints(
    spoil: Callable[[Path], object],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    rolora: Callable[..., tuple[int, str]],
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "tiny"))
    spoil(model)
    with pytest.raises(CaptureError, match=message):
        capture(load_model(str(model))[0])
    before = sorted(tmp_path.iterdir())
    status, said = rolora("compile", model, "-o", tmp_path / "out", "--recipe", "float")
    assert status == 2
    (error,) = [line for line in said.splitlines() if line.startswith("error: CaptureError: ")]
    assert re.search(message, error)
    assert sorted(tmp_path.iterdir()) == before, "left something behind"


def test_saved_graphs(tmp_path: Path, checkpoint: Path, rolora: Callable[..., tuple[int, str]]) -> None:
    whole, path = (
        save_graph(captured("llama"), tmp_path / "whole.safetensors"),
        tmp_path / "graph.safetensors",
    )
    for content, message in (
        (None, "expected a saved graph at .*, found nothing"),
        (b"", "is damaged or not a safetensors file: .*; save it again"),
        (whole.read_bytes()[:-100], "is damaged or not a safetensors file: .*; save it again"),
        ((checkpoint / "model.safetensors").read_bytes(), "expected a graph of format .*, found no graph"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(GraphFormatError, match=message):
            load_graph(path)
        status, said = rolora("inspect", path)
        assert status == 2 and re.search(f"^error: GraphFormatError: .*{message}", said)


# The command line.

COMMANDS: dict[str, tuple[list[str], str]] = {
    "recipe": (["compile", "MODEL", "-o", "OUT", "--recipe", "none"], "PassError: .* or one of 8da4w, float"),
    "recipe file": (
        ["compile", "MODEL", "-o", "OUT", "--recipe", "no.yaml"],
        "PassError: expected a recipe at",
    ),
    "length": (["compile", "MODEL", "-o", "OUT", "--max-length", "0"], "--max-length: expected 16 or more"),
    "flavor": (
        ["compile", "MODEL", "-o", "OUT", "--flavor", "ort"],
        "LoweringError: expected --target onnx with --flavor, found executorch: add it, or leave",
    ),
    "accuracy level": (
        ["compile", "MODEL", "-o", "OUT", "--accuracy-level", "0"],
        "LoweringError: expected --target onnx with --accuracy-level, found executorch",
    ),
    "fast prefill": (
        ["compile", "MODEL", "-o", "OUT", "--fast-prefill", "--target", "onnx"],
        "LoweringError: expected --target executorch with --fast-prefill, found onnx",
    ),
    "output": (["compile", "MODEL", "-o", "MODEL"], "FileExistsError: .*tiny exists and is not a compiled"),
    "hub name": (
        ["compile", "no-such-model", "-o", "OUT"],
        "CaptureError: cannot load a causal language model from no-such-model",
    ),
    "not compiled": (["run", "MODEL", "--prompt", "x"], "FileNotFoundError: .*no manifest.json in .*tiny"),
    "temperature": (["run", "OUT", "--prompt", "x", "--temperature", "-1"], "expected 0 or more, found -1"),
    "pass": (["passes", "rotat"], "PassError: .*found 'rotat'; there are"),
    "nothing": ([], "the following arguments are required: COMMAND"),
}


@pytest.mark.parametrize(("arguments", "message"), COMMANDS.values(), ids=COMMANDS.keys())
def test_commands(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    rolora: Callable[..., tuple[int, str]],
) -> None:
    places = {"MODEL": str(checkpoint), "OUT": str(tmp_path / "out")}
    files = sorted(checkpoint.iterdir())
    status, said = rolora(*[places.get(a, a) for a in arguments])
    assert status == 2
    assert re.search(rf"error: .*{message}|^error: {message}", said, flags=re.MULTILINE), said
    assert sorted(checkpoint.iterdir()) == files and not list(tmp_path.iterdir())


def test_as_a_process(tmp_path: Path) -> None:
    """No traceback, no other library's warnings, the message on one line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "rolora_passes",
        "compile",
        "./none",
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert (
        done.stderr == "error: CaptureError: expected a model folder or .gguf file at none, found nothing\n"
    )


# A missing extra.


@pytest.fixture
def no_executorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules, "executorch", "executorch.exir"]:
        if name.partition(".")[0] == "executorch":
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_executorch")
def test_without_executorch(tmp_path: Path, rolora: Callable[..., tuple[int, str]]) -> None:
    message = r"executorch\S* is not installed: run `pip install rolora-passes\[executorch\]`"
    with pytest.raises(MissingExtraError, match=message):
        to_executorch(captured("llama"), tmp_path / "model.pte")
    with pytest.raises(ImportError, match=message):
        compile_model("./none", "float", tmp_path / "out")
    status, said = rolora("compile", "./none", "-o", tmp_path / "out")
    assert status == 2
    assert re.search(f"^error: MissingExtraError: {message}", said), "found out before the model is loaded"
    assert not list(tmp_path.iterdir())


def test_all_else_works_without_executorch() -> None:
    code = (
        "import sys; sys.modules['executorch'] = None\n"
        "import rolora_passes, rolora_passes.graphs, rolora_passes.export, rolora_passes.cli\n"
        "sys.exit(rolora_passes.cli.main(['passes']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


# Full disks and interruptions.


@contextlib.contextmanager
def disk_with(free: int) -> Iterator[None]:
    """No file of this process may grow beyond `free` bytes: writes fail in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_full_disk_while_saving(tmp_path: Path) -> None:
    rotated = apply_passes(captured("llama"), [FuseNorm(), Rotate()])
    with disk_with(1000):
        with pytest.raises(OSError, match=r"too large.*graph.safetensors|graph.safetensors.*too large"):
            save_graph(rotated, tmp_path / "graph.safetensors")
        with pytest.raises(OSError, match=r"too large.*R\.bin"):
            save_rotations(rotated, tmp_path)
    assert not list(tmp_path.iterdir())


def test_full_disk_while_compiling(
    checkpoint: Path, tmp_path: Path, rolora: Callable[..., tuple[int, str]]
) -> None:
    arguments = ("compile", checkpoint, "-o", tmp_path / "out", "--recipe", "float", "--max-length", 16)
    with disk_with(10_000):
        status, said = rolora(*arguments)
    assert status == 2
    assert re.search(r"^error: OSError: .*too large: '[^.]*out(/model.pte)?'$", said, flags=re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_compile_cut_short_leaves_what_was_there(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rolora: Callable[..., tuple[int, str]],
) -> None:
    arguments = ("compile", checkpoint, "-o", tmp_path / "out", "--recipe", "float", "--max-length", 16)
    assert rolora(*arguments)[0] == 0
    before = contents(tmp_path)
    stops: list[tuple[BaseException, int, str]] = [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError(), 2, "error: not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: not enough memory"),
    ]
    for error, expected, message in stops:

        def stop(graph: object, path: Path, error: BaseException = error, **_: object) -> None:
            path.write_bytes(b"half of a program")
            if path.parent.name.startswith(".out"):  # not what is tried before the model is loaded
                raise error

        monkeypatch.setattr("rolora_passes.export.targets.executorch.to_executorch", stop)
        status, said = rolora(*arguments)
        assert status == expected and message in said
        assert contents(tmp_path) == before


def test_an_interruption_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rolora: Callable[..., tuple[int, str]]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rolora_passes.recipes.opening.load_recipe", stop)
    arguments = ("compile", "./none", "-o", tmp_path / "out", "--log", tmp_path / "log")
    assert rolora(*arguments) == (
        130,
        f"interrupted; no result was written, but what --log {tmp_path / 'log'} had by then is kept\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.skipif(sys.platform == "win32", reason="a process there is ended, and not told")
def test_a_compile_that_is_told_to_end_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rolora: Callable[..., tuple[int, str]],
) -> None:
    def stop(*_: object) -> None:
        assert [path.name[:5] for path in tmp_path.iterdir()] == [".out."]
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("rolora_passes.recipes.opening.load_outlined", stop)
    arguments = ("compile", checkpoint, "-o", tmp_path / "out", "--recipe", "float", "--max-length", 16)
    assert rolora(*arguments)[0] == 130
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is handler


def test_an_error_of_torch_that_is_not_about_memory_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rolora: Callable[..., tuple[int, str]]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("rolora_passes.recipes.opening.load_recipe", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        rolora("compile", "./none", "-o", tmp_path / "out")


def test_a_folder_that_is_not_ours_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")  # many things have one
    with pytest.raises(FileExistsError, match="is not a compiled folder; choose another name"):
        compile_model(str(checkpoint), "float", tmp_path)
    assert contents(tmp_path) == {"manifest.json": b"{}"}
    with pytest.raises(LoweringError, match="at least 16 tokens, found max_length 0"):
        compile_model(str(checkpoint), "float", tmp_path / "out", max_length=0)
