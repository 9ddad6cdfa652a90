"""Checkpoints whose weights stay in their files: the graph of the model that was loaded whole."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from architectures import SOME, tiny
from helpers import tokens_for
from tiny_checkpoint import character_tokenizer, save_byte_checkpoint

from rolora_passes.errors import CaptureError
from rolora_passes.export.compile import compile_model
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.dtypes import convert, dtype_of
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.identity import base_hash
from rolora_passes.graphs.info import info
from rolora_passes.graphs.running import run
from rolora_passes.graphs.text import graph_text
from rolora_passes.loading import stored
from rolora_passes.loading.models import load_model, load_outlined
from rolora_passes.ondisk import is_on_disk
from rolora_passes.recipes.opening import open_source

CAPTURING = importlib.import_module("rolora_passes.graphs.capture.stored")
JOINED = ("mixtral",)  # transformers stacks the experts of several tensors


def checkpoint(name: str, dtype: torch.dtype, folder: Path) -> Path:
    tiny(name, dtype).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_the_graph_is_that_of_the_model_loaded_whole(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = str(checkpoint(name, dtype, tmp_path))
    model, _, weights = load_outlined(folder)
    assert bool(weights) == (name not in JOINED)
    found, whole = capture(model, weights=weights), capture(load_model(folder)[0])
    tokens = tokens_for(whole)
    assert torch.equal(run(found, tokens), run(whole, tokens))
    assert base_hash(found) == base_hash(whole) and info(found).tied == info(whole).tied
    assert info(found).config == info(whole).config
    assert dtype_of(found) == torch.float32
    if dtype == torch.float32:
        assert graph_text(found) == graph_text(whole)


def test_weights_stay_in_their_files_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CAPTURING, "_FEW", 64)
    graph = open_source(checkpoint("llama", torch.bfloat16, tmp_path), with_tokenizer=False).graph
    large = [value for value in parameters(graph).values() if value.numel() > 64]
    assert large and all(is_on_disk(value) and value.dtype == torch.bfloat16 for value in large)
    wider = convert(graph, torch.float64)
    assert dtype_of(wider) == torch.float64
    assert {value.dtype for value in parameters(wider).values() if value.numel() > 64} == {torch.bfloat16}
    tokens = tokens_for(graph)
    assert torch.allclose(run(wider, tokens).float(), run(graph, tokens), atol=1e-5)
    narrower = convert(graph, torch.bfloat16)
    assert "to_dtype" not in graph_text(narrower) and run(narrower, tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", ["rotated-8da4w", "8da4w"])
def test_programs_are_those_of_the_model_loaded_whole(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, however the weights come, from a checkpoint in half precision."""
    monkeypatch.setattr(CAPTURING, "_FEW", 64)
    folder = save_byte_checkpoint(tmp_path / "float32")
    model, tokenizer = load_model(str(folder))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = []
    for way in ("mapped", "whole"):
        if way == "whole":
            monkeypatch.setattr("rolora_passes.loading.models.load_stored", lambda folder, dtype: None)
        out = tmp_path / way
        compile_model(str(tmp_path / "model"), recipe, out, targets=["executorch", "onnx"], max_length=64)
        made.append([(out / name).read_bytes() for name in ("model.pte", "model.onnx", "model.onnx.data")])
        assert not list(tmp_path.glob("weights-*"))
    assert made[0] == made[1]


@pytest.mark.parametrize("spoil", ["missing", "cut", "lacking"])
def test_damage_is_refused_by_name(spoil: str, tmp_path: Path) -> None:
    tiny("llama", torch.float32).save_pretrained(tmp_path, max_shard_size="10KB")
    character_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    if spoil == "missing":
        shards[0].unlink()
    elif spoil == "cut":
        shards[0].write_bytes(shards[0].read_bytes()[:-10])
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        gone = next(name for name in index["weight_map"] if "up_proj" in name)
        shard = tmp_path / index["weight_map"].pop(gone)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        from safetensors.torch import load_file, save_file

        save_file({k: v for k, v in load_file(shard).items() if k != gone}, shard, {"format": "pt"})
    with pytest.raises(CaptureError, match=shards[0].name if spoil != "lacking" else "up_proj"):
        load_outlined(str(tmp_path))


def test_buffers_that_are_saved_have_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", torch.float32)
    model.model.register_buffer("counted", torch.arange(5.0))
    model.save_pretrained(tmp_path)
    kind = type(model)
    plain = kind.__init__

    def with_buffer(self: object, config: object, *args: object, **more: object) -> None:
        plain(self, config, *args, **more)
        self.model.register_buffer("counted", torch.zeros(5))  # type: ignore[attr-defined]

    monkeypatch.setattr(kind, "__init__", with_buffer)
    found = stored.load_stored(tmp_path, torch.float32)
    assert found is not None and "model.counted" not in found.weights
    assert torch.equal(found.model.model.counted, torch.arange(5.0))
