"""An ONNX model computes what its graph computes, in either flavour, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from architectures import CONFIGS, OTHERS, chosen, tiny_wide
from helpers import captured, randomized
from tiny_llama import tiny_llama
from torch import Tensor, fx

from rolora_passes import apply_passes
from rolora_passes.errors import LoweringError, RunError
from rolora_passes.export.onnx.lower import OnnxReport, to_onnx
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.dtypes import convert
from rolora_passes.graphs.graph import copy_graph, insert_after, is_op, parameters
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.running import run
from rolora_passes.graphs.verify import relative_error
from rolora_passes.passes.manager import PassLike

FLAVORS = ("ort", "portable")
NARROW = {"opt", "gpt2", "gpt_neox"}  # heads of 6 channels, which ONNX Runtime's kernel does not have
FUSED: list[PassLike] = ["fuse-norm", {"rotate": {"seed": 1}}]
QUANTIZED: list[PassLike] = [
    {"quantize-weights": {"group_size": 32}},
    {"quantize-activations": {"bits": 8}},
    {"quantize-embedding": {"bits": 8}},
    "fold-constants",
]


@pytest.fixture(scope="module")
def wide() -> fx.GraphModule:
    """Linears 64 and 128 wide, 4 heads on 2."""
    return capture(tiny_wide())


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def lower(graph: fx.GraphModule, folder: Path, flavor: str, **options: Any) -> OnnxReport:
    return to_onnx(graph, folder, flavor, max_length=32, **{"last_token": False} | options)  # type: ignore[arg-type]


def logits(folder: Path, tokens: Tensor, prefill: int) -> Tensor:
    """A prompt in one call, then token by token through the caches."""
    program, length = OnnxProgram(folder), tokens.shape[1]
    parts = [program(tokens[:, :prefill], 0)]
    parts += [program(tokens[:, i : i + 1], i) for i in range(prefill, length)]
    return torch.cat(parts, 1)


def check(graph: fx.GraphModule, folder: Path, flavor: str, **options: Any) -> OnnxReport:
    report = lower(graph, folder, flavor, **options)
    tokens = tokens_of(2, 11)
    assert relative_error(logits(folder, tokens, 7), run(graph, tokens)) <= 5e-6
    return report


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_every_architecture_in_both_flavours(name: str, tmp_path: Path) -> None:
    """Windows of 4 in a prompt of 7, soft caps, partial rotary, experts, learned positions."""
    graph = captured(name, torch.float32)
    check(graph, tmp_path / "portable", "portable")
    if name in NARROW:
        with pytest.raises(
            LoweringError, match=r"multiple of 8 channels, .* found 6: take flavor='portable'"
        ):
            lower(graph, tmp_path / "ort", "ort")
        assert not (tmp_path / "ort").exists()
    else:
        check(graph, tmp_path / "ort", "ort")


@pytest.mark.parametrize(
    ("name", "flavor"),
    [("llama", "ort"), ("llama", "portable"), ("stablelm", "portable"), ("starcoder2", "ort")],
)
def test_fused_and_rotated(name: str, flavor: str, tmp_path: Path) -> None:
    check(apply_passes(captured(name, torch.float32), FUSED), tmp_path / "model", flavor)


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"hadamard": True},
        {"hadamard": True, "head_dim": 24, "mlp": 480},
        {"hadamard": True, "factors": True, "head_dim": 24, "mlp": 480},
        {"rotary_dim": 8, "interleaved": True},
        {"rotary_dim": 8, "window": 4, "softcap": 5.0},
        {"layer_norm": True, "learned_positions": 32},
        {"kv_heads": 4, "head_dim": 32},
    ],
    ids=str,
)
def test_kinds_of_decoder(sizes: dict[str, Any], flavor: str, tmp_path: Path) -> None:
    check(tiny_llama(layers=1, **sizes), tmp_path / "model", flavor)


# Zero points in one flavour, none in the other; either way round for the width that is used most.
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "flavor"),
    [
        (bits, group, symmetric == (flavor == "ort"), flavor)
        for bits, group, signs in [
            (4, 32, (True, False)), (4, None, (False,)), (2, 64, (True,)), (3, 16, (False,)),
            (5, None, (True,)), (8, 32, (False,)), (4, 8, (True,)),
        ]
        for symmetric in signs
        for flavor in FLAVORS
    ],
)  # fmt: skip
def test_weights_of_every_width(
    bits: int, group: int | None, symmetric: bool, flavor: str, wide: fx.GraphModule, tmp_path: Path
) -> None:
    steps: list[PassLike] = [
        {"quantize-weights": {"bits": bits, "group_size": group, "symmetric": symmetric}},
        {"quantize-embedding": {"bits": bits, "group_size": group}},
        "fold-constants",
    ]
    graph = apply_passes(wide, steps)
    if group == 8 and flavor == "ort":
        with pytest.raises(
            LoweringError, match=r"groups of 16, 32, 64, 128 or 256.*found groups of 8"
        ) as error:
            lower(graph, tmp_path / "model", flavor)
        assert str(error.value).count("found groups of 8") == 2 * 5 + 2  # each of them is told
        return
    report = check(graph, tmp_path / "model", flavor)
    assert bool(report.notes) == (flavor == "ort" and bits not in (4, 8))


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(
    "options",
    [{"bits": 4}, {"bits": 8}, {"bits": 6, "symmetric": True, "clip": 0.9}, {"bits": 4, "group_size": 32}],
)
def test_activations_written_out(
    options: dict[str, Any], flavor: str, wide: fx.GraphModule, tmp_path: Path
) -> None:
    """Few tokens: one value that rounds the other way is seen by all tokens after it."""
    graph = apply_passes(wide, [*QUANTIZED[:1], {"quantize-activations": options}, "fold-constants"])
    lower(graph, tmp_path / "model", flavor, accuracy_level=0)
    errors = []
    for seed in range(8):
        tokens = torch.randint(0, 97, (1, 3), generator=torch.Generator().manual_seed(seed))
        errors.append(relative_error(logits(tmp_path / "model", tokens, 2), run(graph, tokens)))
    assert sorted(errors)[4] <= 5e-6
    assert max(errors) <= 0.1


def test_the_kernel_rounds_activations_to_8_bits(wide: fx.GraphModule, tmp_path: Path) -> None:
    graph = apply_passes(wide, QUANTIZED)
    report = lower(graph, tmp_path / "model", "ort")
    model = onnx.load(tmp_path / "model/model.onnx", load_external_data=False)
    products = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    levels = {a.i for n in products for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {4} and "Round" not in report.operators
    assert len(products) == 2 * 5 + 1  # queries, keys and values in one
    tokens = tokens_of(1, 9)
    assert relative_error(logits(tmp_path / "model", tokens, 5), run(graph, tokens)) <= 0.1


@pytest.mark.parametrize("flavor", FLAVORS)
def test_keys_and_values_are_rounded_but_held_in_float(
    flavor: str, wide: fx.GraphModule, tmp_path: Path
) -> None:
    graph = apply_passes(wide, [{"quantize-kv-cache": {"keys": 8, "values": 8}}])
    report = lower(graph, tmp_path / "model", flavor)
    assert any("held in float32" in note for note in report.notes)
    tokens = tokens_of(1, 3)
    assert relative_error(logits(tmp_path / "model", tokens, 2), run(graph, tokens)) <= 1e-2


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(
    "then",
    [
        [],
        ["merge-lora", "fold-constants"],
        [
            {"quantize-weights": {"bits": 8, "group_size": None, "targets": ["lora_A", "lora_B"]}},
            "fold-constants",
        ],
    ],
    ids=["kept", "merged", "8 bits"],
)
def test_adapters_kept_or_merged(then: list[Any], flavor: str, wide: fx.GraphModule, tmp_path: Path) -> None:
    graph = randomized(apply_passes(wide, [{"add-lora": {"rank": 4}}]), "lora")
    check(apply_passes(graph, then), tmp_path / "model", flavor)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_learned_gains_are_the_norms_own(flavor: str, wide: fx.GraphModule, tmp_path: Path) -> None:
    """No operator more than without: a norm has a gain to multiply by in ONNX."""
    rounded: list[PassLike] = ["fuse-norm", {"quantize-weights": {"group_size": 32}}, "fold-constants"]
    learn = {"learn-scales": {"steps": 2, "batch": 2, "lr": 0.1}}
    graph = apply_passes(wide, [*rounded, learn], calibration=tokens_of(4, 8))
    assert any(name.endswith("input_gain") for name in parameters(graph))
    check(graph, tmp_path / "learned", flavor)
    check(apply_passes(wide, rounded), tmp_path / "rounded", flavor)
    counts = [len(onnx.load(tmp_path / f / "model.onnx").graph.node) for f in ("learned", "rounded")]
    assert counts[0] == counts[1]


def test_one_table_for_embedding_and_head_is_written_once(tmp_path: Path) -> None:
    sizes = {}
    for tie in (True, False):
        graph = capture(tiny_wide())
        if tie:
            linear = graph.graph.output_node().args[0]
            table = next(n.args[0] for n in graph.graph.nodes if is_op(n, "embedding"))
            linear.update_arg(1, table)  # type: ignore[union-attr]
        graph = apply_passes(graph, [{"quantize-weights": {"group_size": 32, "head": 4}}, "fold-constants"])
        if tie:
            head = graph.graph.output_node().args[0]
            lookup = next(n for n in graph.graph.nodes if is_op(n, "embedding"))
            weight = head.args[1]  # type: ignore[union-attr]
            while weight > lookup:
                lookup.prepend(weight)
            lookup.update_arg(0, weight)
            graph.recompile()
        sizes[tie] = check(graph, tmp_path / str(tie), "ort").bytes
    assert sizes[True] < sizes[False] - 97 * 64 * 3


# Encoders


def encoded(folder: Path, **inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    feed = {name: value.numpy() for name, value in inputs.items() if name in taken}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("name", chosen(OTHERS))
def test_encoders_and_encoders_with_a_decoder(name: str, tmp_path: Path) -> None:
    """Without a cache; windows to both sides, relative positions, a convolution, cross attention."""
    graph = captured(name, torch.float32)
    report = lower(graph, tmp_path / "model", "portable")
    assert report.layers == 0 and not (tmp_path / "model/genai_config.json").exists()
    onnx.checker.check_model(str(tmp_path / "model/model.onnx"), full_check=True)
    tokens, decoder = tokens_of(2, 13).clamp(min=3), tokens_of(2, 5).clamp(min=3)
    with torch.no_grad():
        expected = graph(**inputs_for(graph, tokens, decoder))
    mask = torch.ones(2, 13, dtype=torch.int64)
    found = encoded(tmp_path / "model", input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder)
    assert relative_error(found, expected) <= 5e-6
    masked = any(is_op(n, "attention") for n in graph.graph.nodes)
    assert any("must be of one length" in note for note in report.notes) == (not masked)
    with pytest.raises(LoweringError, match="take flavor='portable'"):
        lower(graph, tmp_path / "ort", "ort")


@pytest.mark.parametrize("name", ["bert", "modernbert", "bart"])
def test_padded_rows_of_an_encoder(name: str, tmp_path: Path) -> None:
    graph = captured(name, torch.float32)
    lower(graph, tmp_path / "model", "portable")
    rows, decoder = [tokens_of(1, n)[0].clamp(min=3) for n in (9, 4)], tokens_of(2, 5).clamp(min=3)
    tokens, mask = padded(rows, [False, False])
    found = encoded(tmp_path / "model", input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder)
    for i, row in enumerate(rows):
        with torch.no_grad():
            expected = graph(**inputs_for(graph, row[None], decoder[i : i + 1]))
        length = expected.shape[1]
        assert relative_error(found[i : i + 1, :length], expected) <= 5e-6


def test_a_quantized_encoder(tmp_path: Path) -> None:
    graph = captured("bert", torch.float32)
    graph = apply_passes(graph, [{"quantize-weights": {"bits": 4, "group_size": None}}, "fold-constants"])
    lower(graph, tmp_path / "model", "portable")
    tokens = tokens_of(2, 7)
    found = encoded(tmp_path / "model", input_ids=tokens, attention_mask=torch.ones_like(tokens))
    with torch.no_grad():
        assert relative_error(found, graph(**inputs_for(graph, tokens))) <= 1e-2


# Batches


def padded(rows: list[Tensor], left: list[bool]) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, (row, on_left) in enumerate(zip(rows, left, strict=True)):
        place = slice(width - len(row), width) if on_left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, 1
    return tokens, mask


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("options", [{}, {"learned_positions": 32}, {"window": 4}], ids=str)
def test_a_padded_batch_of_4_equals_its_rows_alone(
    options: dict[str, Any], flavor: str, tmp_path: Path
) -> None:
    graph = tiny_llama(**options)
    lower(graph, tmp_path / "model", flavor, last_token=True)
    program = OnnxProgram(tmp_path / "model")
    for left in ([True] * 4, [False] * 4, [True, False, True, False]):
        follow(graph, program, left)


def follow(graph: fx.GraphModule, program: OnnxProgram, left: list[bool]) -> None:
    """Whatever side rows are padded on, in the prompt and while 4 more tokens are decoded."""
    rows = [tokens_of(1, n)[0] for n in (3, 9, 1, 6)]
    tokens, mask = padded(rows, left)
    found = program(tokens, 0, mask)
    for _ in range(4):
        expected = torch.cat([run(graph, row[None])[:, -1:] for row in rows])
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= 5e-6
        new = found.argmax(-1)
        rows = [torch.cat([row, token]) for row, token in zip(rows, new, strict=True)]
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.int64)], 1)
        found = program(new, mask.shape[1] - 1, mask)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_prompt_in_pieces(flavor: str, tmp_path: Path) -> None:
    graph, tokens = tiny_llama(layers=3), tokens_of(1, 12)
    lower(graph, tmp_path / "model", flavor)
    program, expected = OnnxProgram(tmp_path / "model"), run(graph, tokens)
    for start, end in ((0, 5), (5, 9), (9, 12)):
        found = program(tokens[:, start:end], start)
        assert relative_error(found, expected[:, start:end]) <= 5e-6


@pytest.mark.parametrize("flavor", FLAVORS)
def test_only_the_last_token_reaches_the_head(flavor: str, wide: fx.GraphModule, tmp_path: Path) -> None:
    lower(wide, tmp_path / "model", flavor, last_token=True)
    tokens = tokens_of(2, 8)
    found = OnnxProgram(tmp_path / "model")(tokens, 0)
    assert found.shape == (2, 1, 97)
    assert relative_error(found, run(wide, tokens)[:, -1:]) <= 5e-6
    model = onnx.load(tmp_path / "model/model.onnx", load_external_data=False)
    assert [n.op_type for n in model.graph.node].count("GatherND") <= 2


# The standard, and the runtimes


@pytest.mark.parametrize("steps", [FUSED, [*FUSED, *QUANTIZED], [{"add-lora": {"rank": 2}}]], ids=len)
def test_portable_models_pass_the_checker_and_the_reference_evaluator(
    steps: list[PassLike], wide: fx.GraphModule, tmp_path: Path
) -> None:
    from onnx.reference import ReferenceEvaluator

    graph = apply_passes(wide, steps)
    lower(graph, tmp_path / "model", "portable", accuracy_level=0)
    path = str(tmp_path / "model/model.onnx")
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 23)}
    tokens = tokens_of(2, 6)
    feed: dict[str, Any] = {"input_ids": tokens.numpy(), "attention_mask": np.ones((2, 6), np.int64)}
    feed |= {
        i.name: np.zeros((2, 2, 0, 16), np.float32) for i in model.graph.input if i.name.startswith("past")
    }
    found = torch.from_numpy(ReferenceEvaluator(model).run(["logits"], feed)[0])
    assert relative_error(found, run(graph, tokens)) <= 1e-5


@pytest.mark.parametrize("flavor", FLAVORS)
def test_genai_generates_what_the_graph_would(flavor: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="part of the extra onnx")
    graph = tiny_llama(layers=2)
    set_info(graph, config={**info(graph).config, "eos_token_id": 98})
    lower(graph, tmp_path / "model", flavor, last_token=True)
    prompts = [tokens_of(1, n) for n in (6, 3)]
    model = genai.Model(str(tmp_path / "model"))
    for rows in ([prompts[0]], [prompts[1]]):
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=16)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(rows[0].numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = list(generator.get_sequence(0))
        expected = rows[0]
        while expected.shape[1] < len(found):
            expected = torch.cat([expected, run(graph, expected)[:, -1].argmax(-1)[None]], 1)
        assert found == expected[0].tolist()


# Bad input


def test_operators_without_a_lowering_are_told_at_once(tmp_path: Path) -> None:
    graph = copy_graph(captured("llama", torch.float32))
    for node in [n for n in graph.graph.nodes if is_op(n, "silu")]:
        new = insert_after(graph, node, torch.ops.aten.erfinv.default, node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)  # type: ignore[misc]
        new.meta["source"] = "model.py:12: x = erfinv(x)"
    with pytest.raises(LoweringError, match="2 nodes have operators without a lowering") as error:
        lower(graph, tmp_path / "model", "ort")
    assert str(error.value).count("aten.erfinv.default: `erfinv") == 2
    assert "model.py:12: x = erfinv(x)" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavor": "tflite"}, "expected a flavor of ort, portable, found 'tflite'"),
        ({"accuracy_level": 1}, "expected accuracy_level 0, 4 or None, found 1"),
        ({"max_length": 8}, "at least 16 tokens, found max_length 8"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=message):
        to_onnx(tiny_llama(), tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


def test_graphs_that_cannot_be_lowered(wide: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"expected a graph in torch.float32, .* found torch.float64"):
        lower(convert(tiny_llama(), torch.float64), tmp_path / "model", "ort")
    coded = apply_passes(wide, [{"quantize-weights": {"grid": "nf"}}, "fold-constants"])
    with pytest.raises(LoweringError, match=r"uniform grid.* codes of a codebook"):
        lower(coded, tmp_path / "model", "ort")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    lower(tiny_llama(), folder, "ort")
    (folder / "old").write_text("x")
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(LoweringError):
        lower(tiny_llama(group=8, weights=4), folder, "ort")
    assert sorted(p.name for p in folder.iterdir()) == before and [p.name for p in tmp_path.iterdir()] == [
        "model"
    ]
    lower(tiny_llama(layers=1), folder, "portable")
    assert "old" not in {p.name for p in folder.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"holds no model.onnx"):
        lower(tiny_llama(), tmp_path / "mine", "ort")


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    lower(tiny_llama(), tmp_path / "model", "ort")
    (tmp_path / "model/model.onnx").write_bytes(b"nothing")
    with pytest.raises(RunError, match="ONNX Runtime refuses"):
        OnnxProgram(tmp_path / "model")


def test_genai_is_told_the_models_own_padding(tmp_path: Path) -> None:
    lower(captured("llama", torch.float32), tmp_path / "model", "ort")
    config = json.loads((tmp_path / "model/genai_config.json").read_text())["model"]
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 2)
