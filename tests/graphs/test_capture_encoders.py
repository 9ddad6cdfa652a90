"""Encoders, and encoders with a decoder, become graphs that the passes work on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t
from architectures import BART, ENCODERS, OTHERS, SEQ2SEQ, SMALL, chosen, tiny
from helpers import captured, count, everything_in_float64, model_of, tokens_for
from torch import Tensor, fx

from rolora_passes.errors import CaptureError, GraphFormatError
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import is_op, linears, op_name, parameters
from rolora_passes.graphs.inputs import input_names, inputs_for
from rolora_passes.graphs.running import run, values
from rolora_passes.graphs.shapes import DECODER_SEQUENCE, SEQUENCE, infer_shapes
from rolora_passes.graphs.verify import relative_error

# In all: linears, norms, and nodes of attention.
PARTS = {
    "bert": (14, 6, 2), "bert-bare": (12, 5, 2), "bert-classifier": (14, 5, 2), "roberta": (14, 6, 2),
    "modernbert": (16, 6, 2), "deberta": (18, 7, 0), "deberta-bare": (16, 7, 0), "bart": (33, 12, 6),
    "mbart": (33, 14, 6), "marian": (33, 10, 6),
}  # fmt: skip


def expected(model: t.PreTrainedModel, tokens: Tensor, decoder_tokens: Tensor | None) -> Tensor:
    given = {} if decoder_tokens is None else {"decoder_input_ids": decoder_tokens, "use_cache": False}
    with torch.no_grad():
        output: Any = model(input_ids=tokens, **given)
    result: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return result


def texts(graph: fx.GraphModule, batch: int, lengths: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Tokens, and tokens of another length for the decoder if there is one."""
    tokens, others = (tokens_for(graph, batch, length, seed) for seed, length in enumerate(lengths))
    return tokens, others if "decoder_tokens" in input_names(graph) else None


@pytest.mark.parametrize("name", ["bert", "modernbert", "deberta", "bart"])
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_equals_the_models(name: str, batch: int) -> None:
    graph, model = captured(name, torch.float32), model_of(name, torch.float32)
    tokens = texts(graph, batch, (9, 7))
    assert relative_error(run(graph, *tokens), expected(model, *tokens)) < 1e-5


@pytest.mark.parametrize("name", chosen(OTHERS))
@pytest.mark.parametrize(
    ("batch", "lengths"), [(3, (9, 7)), (1, (1, 1)), (1, (23, 5)), (2, (2, 31)), (1, (7, 1)), (2, (1, 6))]
)
def test_float64_equals_the_models_run_in_float64(name: str, batch: int, lengths: tuple[int, int]) -> None:
    graph, model = captured(name), model_of(name)
    tokens = texts(graph, batch, lengths)
    with everything_in_float64():
        reference = expected(model, *tokens)
    assert reference.dtype == torch.float64
    assert relative_error(run(graph, *tokens), reference) < 1e-12


@pytest.mark.parametrize("name", chosen(OTHERS))
def test_inputs_are_named(name: str) -> None:
    second = ["decoder_tokens"] if name in SEQ2SEQ else []
    assert list(input_names(captured(name))) == ["tokens", *second]


@pytest.mark.parametrize("name", chosen(OTHERS))
def test_composites_are_one_node_each(name: str) -> None:
    graph = captured(name)
    norms = count(graph, "layer_norm", "rms_norm")
    assert (len(linears(graph)), norms, count(graph, "attention")) == PARTS[name]
    left = (
        "_assert",
        "sym_constrain",
        "_guards",
        "dropout",
        "alias",
        "detach",
        "clone",
        "wrap_with",
        "unbind",
    )
    for node in graph.graph.nodes:
        assert not op_name(node).startswith(left), node.format_node()
        assert not (node.op == "call_function" and not node.users), f"{node} has no use"
    assert all(value.dtype != torch.float32 for value in parameters(graph).values())


@pytest.mark.parametrize("name", chosen(OTHERS))
def test_there_is_no_mask(name: str) -> None:
    assert not count(captured(name), "masked_fill", "ones", "bitwise_not")


def test_attention_is_causal_in_the_decoders_own_alone() -> None:
    def causal(name: str) -> list[bool]:
        nodes = [n for n in captured(name).graph.nodes if is_op(n, "attention")]
        return [n.args[4] if len(n.args) > 4 else True for n in nodes]

    assert causal("bert") == [False, False]
    assert causal("bart") == [False, False, True, False, True, False]


def test_a_window_reaches_to_both_sides() -> None:
    first, second = (n.args[4:] for n in captured("modernbert").graph.nodes if is_op(n, "attention"))
    assert first == (False,) and second == (False, 5)  # half of 8 on either side, and the position itself


@pytest.mark.parametrize("name", chosen(OTHERS))
def test_both_lengths_stay_symbols(name: str) -> None:
    graph = captured(name)
    shapes = infer_shapes(graph)
    known = {n.name: shapes[n] for n in graph.graph.nodes if n.op == "call_function"}
    assert all(value is not None for value in known.values())
    (output,) = graph.graph.find_nodes(op="output")
    if name != "bert-classifier":
        assert shapes[output.args[0]].shape[1] == (DECODER_SEQUENCE if name in SEQ2SEQ else SEQUENCE)


def test_a_decoder_reads_the_later_half_unless_told() -> None:
    graph = captured("bart")
    tokens = tokens_for(graph, 2, 9)
    assert torch.equal(inputs_for(graph, tokens)["decoder_tokens"], tokens[:, 4:])
    assert torch.equal(run(graph, tokens), run(graph, tokens, tokens[:, 4:]))
    assert not torch.equal(run(graph, tokens, tokens[:, :5]), run(graph, tokens, tokens[:, 4:]))
    *_, (_, last) = values(graph, tokens)
    assert torch.equal(last, run(graph, tokens))
    rows = [inputs_for(graph, row)["decoder_tokens"] for row in tokens.split(1)]
    assert torch.equal(torch.cat(rows), tokens[:, 4:])


def test_a_graph_with_other_inputs_is_refused() -> None:
    graph = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph.graph.output(graph.graph.placeholder("input_pos"))
    with pytest.raises(
        GraphFormatError, match=r"tokens, positions, decoder_tokens .* found inputs input_pos"
    ):
        run(graph, torch.zeros(1, 3, dtype=torch.int64))


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 31}
REFUSED: dict[str, tuple[Any, str]] = {
    "an additive bias": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
        r"T5Attention.*position_bias",
    ),
    "two heads": (
        lambda: t.BertForQuestionAnswering(t.BertConfig(**SMALL)),
        "BertForQuestionAnswering, found start_logits, end_logits",
    ),
    "a decoder's body": (
        lambda: t.OPTModel(t.OPTConfig(num_attention_heads=2, hidden_size=16)),
        "OPTAttention",
    ),
    "a causal encoder": (
        lambda: t.CLIPTextModel(t.CLIPTextConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)),
        "found causal attention in CLIPAttention",
    ),
    "images": (
        lambda: t.ViTModel(t.ViTConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)),
        "found ViTModel, which takes pixel_values",
    ),
    "a batch that matters": (
        lambda: t.BartForSequenceClassification(t.BartConfig(**BART)),
        "BartForSequenceClassification cannot be captured",
    ),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_captured(model: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(model())


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_capture_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny(name, torch.float32).train()
    before = model.config._attn_implementation
    capture(model)
    assert model.training and model.config._attn_implementation == before


@pytest.mark.parametrize("name", chosen(ENCODERS))
def test_every_parameter_keeps_its_name(name: str) -> None:
    known = dict(model_of(name).named_parameters(remove_duplicate=False))
    found = parameters(captured(name))
    assert all(known[key].data_ptr() == value.data_ptr() for key, value in found.items() if key in known)
    unread = {"pooler.dense.weight", "pooler.dense.bias"}
    tensors = {value.data_ptr() for value in found.values()}
    assert {key for key, value in known.items() if value.data_ptr() not in tensors} <= unread
