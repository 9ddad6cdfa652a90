"""A graph that is far from its model is not lowered, and what is to blame is named; others pass."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t
from architectures import tiny_wide
from helpers import tokens_for
from test_bad_input import contents
from test_quantize_weights import wide
from tiny_checkpoint import character_tokenizer
from torch import fx

from rolora_passes import AddLoRA, QuantizeWeights, apply_passes, history
from rolora_passes.debugging.quality import NOTED, REFUSED, require_likeness
from rolora_passes.errors import QualityError
from rolora_passes.evaluation.parity import Loss, measure_loss, sample_text
from rolora_passes.export.order import Made
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import copy_graph, parameters, set_tensor
from rolora_passes.passes.manager import Applied
from rolora_passes.recipes import load_recipe

Run = Callable[..., tuple[int, str, str]]


def brittle() -> t.PreTrainedModel:
    """Outliers on channels that carry nothing, in every group that its last projections read: 4 bits lose the
    others, and with them what the layers say."""
    model = tiny_wide()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
        model.model.embed_tokens.weight.mul_(0.02)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for writer, reader in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
                writer.weight[::16] *= 1e-5
                reader.weight[:, ::16] *= 1e4
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brittle") / "model"
    brittle().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def test_a_loss_is_refused_with_what_is_to_blame_and_what_may_help(
    model: Path, tmp_path: Path, rolora: Run
) -> None:
    out = tmp_path / "out"
    arguments = ("compile", model, "--recipe", "8da4w", "--target", "onnx", "--max-length", 32, "-o", out)
    status, printed, said = rolora(*arguments)
    assert status == 3 and not printed and not out.exists()
    error = said[
        said.index("error: QualityError: the quantized graph is far from the model: it loses more") :
    ]
    assert "quantize-weights loses the most: KL is" in error
    named = [line for line in error.splitlines() if " alone: KL " in line]
    assert named and all("o_proj" in line or "down_proj" in line for line in named[:2])
    assert "rotate first, as rotated-8da4w does; round weights by GPTQ, as rotated-gptq-8da4w does" in error
    assert "--accept-loss" in error
    status, printed, said = rolora(*arguments, "--accept-loss")
    assert (
        status == 0 and "warning: the quantized graph is far from the model: it loses more than all" in said
    )
    loss = json.loads((out / "manifest.json").read_text())["loss"]
    assert loss["part"] > REFUSED and loss["summary"] in " ".join(said.split())
    assert "it loses more than all of the information in the model's predictions" in " ".join(printed.split())
    before = contents(out)
    assert rolora(*arguments)[0] == 3 and contents(out) == before


def test_what_is_proposed_helps(model: Path, tmp_path: Path, rolora: Run) -> None:
    arguments = ("compile", model, "--target", "onnx", "--max-length", 32, "-o", tmp_path / "out")
    error = rolora(*arguments, "--recipe", "8da4w")[2]
    (option,) = re.findall(r"in float, `(exclude: \[.*\])` of quantize-weights: KL is then", error)
    recipe = rolora("passes", "8da4w")[1]
    assert recipe.count("- quantize-weights:\n") == 1
    more = tmp_path / "more.yaml"
    more.write_text(recipe.replace("- quantize-weights:\n", f"- quantize-weights:\n    {option}\n"))
    graph, tokens = capture(brittle()), tokens_for(wide(), 1, 60)
    before, after = (
        measure_loss(graph, apply_passes(graph, load_recipe(which), verify=False), tokens).kl
        for which in ("8da4w", more)
    )
    assert after < before / 2


def test_no_check_leaves_it_out(model: Path, tmp_path: Path, rolora: Run) -> None:
    arguments = ("--target", "onnx", "--max-length", 32, "-o", tmp_path / "out", "--no-check")
    status, printed, said = rolora("compile", model, "--recipe", "8da4w", *arguments)
    assert status == 0 and "far from" not in said and "loses" not in printed
    assert not json.loads((tmp_path / "out/manifest.json").read_text()).keys() & {"loss", "parity"}


def scaled(graph: fx.GraphModule, factor: float) -> fx.GraphModule:
    """A copy whose head is multiplied: a model that is surer of what it says, or less sure."""
    result = copy_graph(graph)
    head = parameters(graph)["lm_head.weight"]
    set_tensor(result, "lm_head.weight", torch.nn.Parameter(head.detach() * factor))
    return result


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0, 10.0])
def test_random_models_pass_however_flat_their_predictions(factor: float) -> None:
    graph = scaled(wide(), factor)
    quantized = apply_passes(graph, load_recipe("8da4w"), verify=False)
    loss = measure_loss(graph, quantized, tokens_for(graph, 1, 60))
    assert loss.part < NOTED


def test_a_graph_that_says_one_thing_whatever_it_reads_is_far() -> None:
    graph, tokens = scaled(wide(), 40), tokens_for(wide(), 1, 60)
    other = copy_graph(graph)
    for name, value in parameters(other).items():
        if "norm" in name:
            set_tensor(other, name, torch.nn.Parameter(torch.zeros_like(value)))
    loss = measure_loss(graph, other, tokens)
    assert loss.kl > 1 and loss.part > REFUSED and loss.tokens == 60
    itself = measure_loss(graph, graph, tokens)
    assert (itself.kl, itself.part, itself.top1, itself.perplexity) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("kl", "said", "expected"),
    [
        (0.05, 0.05, "less than can be told"),
        (0.09, 0.3, "30%"),
        (0.001, 0.3, "less than 1%"),
        (0.5, 2.0, "25%"),
        (0.5, 0.05, "more than all"),
        (math.inf, 2.0, "more than all"),
    ],
)
def test_a_loss_in_words(kl: float, said: float, expected: str) -> None:
    assert f"it loses {expected} of the information in the model's predictions" in str(
        Loss(8, kl, said, 0.9, 1.0)
    )


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    loss = Loss(8, math.nan, 2.0, 0.0, math.inf)
    assert loss.part == math.inf
    assert loss.row()["part"] is None and loss.row()["kl"] is None
    assert issubclass(QualityError, Exception) and "more than all" in str(loss)


def test_what_an_adapter_changes_on_purpose_is_no_loss() -> None:
    base = capture(brittle())
    adapter, tuned = AddLoRA(init="gaussian", rank=4), copy_graph(base)
    adapter.run(tuned)
    for name, value in parameters(tuned).items():
        if "lora_" in name:
            set_tensor(tuned, name, value * 30)
    tokens = sample_text(base, character_tokenizer())
    assert measure_loss(base, tuned, tokens).part > REFUSED
    rounding = QuantizeWeights(8, None)
    rounded = apply_passes(tuned, [rounding])
    record = history(rounded)[-1]
    steps = [Applied(adapter, tuned, record, None), Applied(rounding, rounded, record, None)]
    loss = require_likeness(Made(base, rounded, steps, character_tokenizer(), None))
    assert loss == measure_loss(tuned, rounded, tokens) and loss.part < NOTED
    lost, table = copy_graph(rounded), "model.embed_tokens.weight"
    set_tensor(lost, table, parameters(rounded)[table].roll(7, 0))
    steps[1] = Applied(rounding, lost, record, None)
    with pytest.raises(QualityError, match="quantize-weights loses the most"):
        require_likeness(Made(base, lost, steps, character_tokenizer(), None))
