"""A checkpoint of what passes made of a model: transformers loads it, and it computes what the graph does."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from architectures import CONFIGS, chosen, tiny
from helpers import randomized
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_checkpoint import TEXT, character_tokenizer
from torch import Tensor

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    InsertHadamard,
    MergeLoRA,
    QuantizeActivations,
    QuantizeEmbedding,
    QuantizeKVCache,
    QuantizeWeights,
    Rotate,
    apply_passes,
)
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.errors import LoweringError
from rolora_passes.export import to_checkpoint, transform_model
from rolora_passes.export.checkpoint import checking, plan, solving
from rolora_passes.export.checkpoint.solving import Equation
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import aten, finish, get_tensor, insert_after, is_op, set_tensor
from rolora_passes.graphs.running import run
from rolora_passes.graphs.serialize import load_graph, save_graph
from rolora_passes.graphs.verify import relative_error
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe
from rolora_passes.tensor_files import form, write_tensors

Run = Callable[..., tuple[int, str, str]]
ROTATED = (FuseNorm(), Rotate(residual="hadamard", heads="hadamard"))
ROUNDED = (QuantizeWeights(4, 8, head=4), QuantizeEmbedding(bits=8), FoldConstants())
# A LayerNorm takes a mean, which is not the mean of a rotated stream.
LAYER_NORMS = {"phi", "opt", "gpt2", "gpt_neox", "cohere", "stablelm", "starcoder2"}
NAMES = chosen(CONFIGS)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a checkpoint of an architecture lies, which is written when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def place(name: str) -> Path:
        if not (root / name).exists():
            tiny(name, torch.float32).save_pretrained(root / name)
            character_tokenizer().save_pretrained(root / name)
        return root / name

    return place


def tokens() -> Tensor:
    return torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of a checkpoint as a user has them: nothing of this library's is between."""
    model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        found: Tensor = model(tokens()).logits
    return found


def in_files(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_graphs_logits(
    name: str, places: Callable[[str], Path], tmp_path: Path
) -> None:
    source = places(name)
    graph = capture(load_model(str(source))[0])
    before = (*ROTATED, *ROUNDED) if name not in LAYER_NORMS else ROUNDED
    graph = apply_passes(graph, before, verify=False)
    done = to_checkpoint(graph, tmp_path / "out", str(source))
    assert relative_error(logits(done.folder), run(graph, tokens())) < 1e-5
    assert done.rounding is not None and done.rounding < 1e-6
    names = {*in_files(source)}
    assert {*in_files(done.folder)} >= names
    assert done.untied == ({*in_files(done.folder)} > names)  # the table's name stays, the head's is new
    config = json.loads((done.folder / "config.json").read_text())
    assert not (done.untied and config["tie_word_embeddings"])


@pytest.mark.parametrize("name", sorted(LAYER_NORMS & {*NAMES}))
def test_a_rotated_layer_norm_is_refused(name: str, places: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        LoweringError, match=r"LayerNorm takes the mean again .* leave fuse-norm and rotate out"
    ):
        transform_model(str(places(name)), ROTATED, tmp_path / "out", printing={"verify": False})
    assert not [*tmp_path.iterdir()]


def test_a_graph_is_put_back_whether_folded_or_saved(places: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(places("phi3"))  # fused projections, of which a graph has the parts
    graph = apply_passes(capture(load_model(source)[0]), ROTATED)
    folded = apply_passes(graph, [FoldConstants()])
    save_graph(folded, tmp_path / "graph.safetensors")
    made = {"as written": graph, "folded": folded, "saved": load_graph(tmp_path / "graph.safetensors")}
    found = {how: in_files(to_checkpoint(g, tmp_path / how, source).folder) for how, g in made.items()}
    for name, value in found["folded"].items():
        assert torch.equal(value, found["saved"][name])
        assert torch.allclose(value, found["as written"][name], rtol=1e-6, atol=1e-7)
    assert "model.layers.0.self_attn.qkv_proj.weight" in found["folded"]


def test_a_gain_of_one_is_what_the_model_makes_one_of(places: Callable[[str], Path], tmp_path: Path) -> None:
    for name, expected in (("llama", 1.0), ("gemma", 0.0)):  # gemma computes 1 + weight
        done = transform_model(str(places(name)), [FuseNorm()], tmp_path / name)
        gain = in_files(done.folder)["model.norm.weight"]
        assert gain.equal(torch.full_like(gain, expected))


def test_experts_stand_under_the_names_of_the_models_files(
    places: Callable[[str], Path], tmp_path: Path
) -> None:
    source = places("mixtral")
    done = transform_model(str(source), ROTATED, tmp_path / "out", shard_size=9000)
    before, after = in_files(source), in_files(done.folder)
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    assert any(".experts.3.w1" in name for name in after)


def test_files_are_bounded_and_listed(places: Callable[[str], Path], tmp_path: Path) -> None:
    done = transform_model(str(places("llama")), None, tmp_path / "out", shard_size=20_000)
    files = sorted(done.folder.glob("*.safetensors"))
    assert len(files) == done.files > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    for file in files:
        held = load_file(file)
        assert sum(v.nbytes for v in held.values()) <= 20_000
        assert all(index["weight_map"][name] == file.name for name in held)
    whole = in_files(done.folder)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values()) == done.bytes


def test_a_tied_table_stays_tied_where_it_can(places: Callable[[str], Path], tmp_path: Path) -> None:
    done = transform_model(str(places("llama-tied")), [QuantizeWeights(4, 8, head=None)], tmp_path / "out")
    assert not done.untied and "lm_head.weight" not in in_files(done.folder)
    assert json.loads((done.folder / "config.json").read_text())["tie_word_embeddings"]


def test_values_are_rounded_once_to_the_type_of_the_files(
    places: Callable[[str], Path], tmp_path: Path
) -> None:
    source = str(places("llama"))
    wide = transform_model(source, ROTATED, tmp_path / "wide")
    narrow = transform_model(source, ROTATED, tmp_path / "narrow", dtype=torch.bfloat16)
    for name, value in in_files(narrow.folder).items():
        assert value.equal(in_files(wide.folder)[name].to(torch.bfloat16))
    assert narrow.rounding is not None and 1e-4 < narrow.rounding < 0.1
    # Without --dtype the files have the type of the files before.
    again = transform_model(str(narrow.folder), None, tmp_path / "again")
    assert again.dtype == torch.bfloat16
    for name, value in in_files(again.folder).items():
        assert value.equal(in_files(narrow.folder)[name])


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(
    places: Callable[[str], Path], tmp_path: Path
) -> None:
    rounding = [QuantizeWeights(4, 8), QuantizeActivations(), QuantizeKVCache()]
    passes = [*ROTATED, InsertHadamard(), AddLoRA(rank=2), *rounding, FoldConstants()]
    with pytest.raises(LoweringError) as refusal:
        transform_model(str(places("llama")), passes, tmp_path / "out", printing={"verify": False})
    for part in (
        "(insert-hadamard's R4) at model.layers.0.mlp.down_proj.weight and 1 more",
        "(insert-hadamard's R3) at model.layers.0.self_attn.k_proj.weight and 3 more",
        "its inverse is in the weight, so it cannot be left out; set r4: false in the recipe",
        "a low-rank branch beside a linear at model.layers.0",
        "--leave-out activation-quantizers",
        "--leave-out cache-quantizers",
    ):
        assert part in str(refusal.value)
    with pytest.raises(LoweringError, match="linear where the model has"):
        transform_model(str(places("llama-tied")), [FuseNorm(tied="keep")], tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_roundings_are_left_out_on_request_and_what_cancels_always(
    places: Callable[[str], Path], tmp_path: Path
) -> None:
    source = str(places("llama"))
    plain = [*ROTATED, QuantizeWeights(4, 8)]
    passes = [
        *ROTATED,
        InsertHadamard(r3=True, r4=False),
        plain[-1],
        QuantizeActivations(),
        QuantizeKVCache(),
    ]
    expected = transform_model(source, plain, tmp_path / "plain", printing={"verify": False})
    both = ("activation-quantizers", "cache-quantizers")
    found = transform_model(source, passes, tmp_path / "out", leave_out=both, printing={"verify": False})
    assert found.left_out["activation-quantizers"] > 4 and found.left_out["cache-quantizers"] == 4
    for name, value in in_files(found.folder).items():
        assert torch.allclose(value, in_files(expected.folder)[name], atol=1e-6)
    with pytest.raises(LoweringError, match="expected to leave out activation-quantizers or"):
        transform_model(source, None, tmp_path / "no", leave_out=["hadamards"])


@pytest.mark.parametrize("basis", ["model", "graph"])
def test_an_adapter_is_merged(basis: Any, places: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(places("llama"))
    captured = capture(load_model(source)[0])
    base = apply_passes(captured, ROTATED) if basis == "graph" else captured
    tuned = randomized(apply_passes(base, [AddLoRA(rank=2)]), "lora_")
    adapter = save_adapter(tuned, tmp_path / "adapter", basis=basis)
    done = transform_model(source, ROTATED, tmp_path / "out", adapter=adapter)
    assert relative_error(logits(done.folder), run(tuned, tokens())) < 1e-4
    # The recipe there makes the same again, with the adapter beside it.
    steps = load_recipe(done.folder / "recipe.yaml")
    assert {MergeLoRA, AddLoRA} < {type(step) for step in steps}
    again = transform_model(source, steps, tmp_path / "again")
    for name, value in in_files(again.folder).items():
        assert torch.equal(value, in_files(done.folder)[name])


def test_what_stands_beside_the_weights(places: Callable[[str], Path], tmp_path: Path) -> None:
    source = places("llama")
    done = transform_model(str(source), ROTATED, tmp_path / "out")
    names = {path.name for path in done.folder.iterdir()}
    assert names >= {"README.md", "recipe.yaml", "R.bin", "rotations.json", "tokenizer.json", "config.json"}
    assert (done.folder / "generation_config.json").read_text() == (
        source / "generation_config.json"
    ).read_text()
    card = (done.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "`rotate`" in card
    words = t.AutoTokenizer.from_pretrained(done.folder)
    assert words("Hello")["input_ids"] == character_tokenizer()("Hello")["input_ids"]
    model, _ = load_model(str(done.folder))  # ours takes it like any other checkpoint
    assert relative_error(run(capture(model), tokens()), logits(done.folder)) < 1e-5


def test_nothing_else_is_written_over(places: Callable[[str], Path], tmp_path: Path) -> None:
    source = places("llama")
    with pytest.raises(FileExistsError, match="is the model that the checkpoint is made of"):
        transform_model(str(source), None, source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a checkpoint of rolora transform"):
        transform_model(str(source), None, tmp_path / "mine")
    for _ in range(2):  # our own is replaced
        transform_model(str(source), None, tmp_path / "out", check=False)


def _off(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(graph: Any, own: Any, name: str, equations: list[Equation], dtype: torch.dtype) -> Tensor:
        value = original(graph, own, name, equations, dtype)
        return value.roll(1, 0) if name.endswith("k_proj.weight") else value

    return wrong


def test_a_checkpoint_that_computes_something_else_is_refused(
    places: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "solve", _off(solving.solve))
    with pytest.raises(LoweringError, match="does not compute what its graph does"):
        transform_model(str(places("llama")), None, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_tensor_that_transformers_loads_otherwise_is_refused(
    places: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(source: str, dtype: torch.dtype) -> Any:
        model, words = load_model(source, dtype)
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1
        return model, words, {}

    monkeypatch.setattr(checking, "load_outlined", other)
    with pytest.raises(
        LoweringError, match=r"expected transformers to load lm_head\.weight as it was written"
    ):
        transform_model(str(places("llama")), None, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_frequencies_that_no_file_holds_are_refused(
    places: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(source: str, dtype: torch.dtype) -> Any:
        model, words = load_model(source, dtype)
        model.model.rotary_emb.inv_freq.mul_(1.001)
        return model, words, {}

    monkeypatch.setattr(checking, "load_outlined", other)
    with pytest.raises(LoweringError, match=r"other values of model\.rotary_emb\.inv_freq"):
        transform_model(str(places("llama")), None, tmp_path / "out")
    graph = capture(load_model(str(places("llama")))[0])
    set_tensor(graph, "model.rotary_emb.inv_freq", get_tensor(graph, "model.rotary_emb.inv_freq") * 1.001)
    with pytest.raises(LoweringError, match=r"other values of model\.rotary_emb\.inv_freq"):
        to_checkpoint(graph, tmp_path / "out", str(places("llama")))


def test_values_that_a_type_cannot_hold_are_refused(places: Callable[[str], Path], tmp_path: Path) -> None:
    graph = capture(load_model(str(places("llama")))[0])
    name = "model.layers.1.mlp.up_proj.weight"
    set_tensor(graph, name, get_tensor(graph, name).detach() * 1e6)
    with pytest.raises(LoweringError, match=rf"float16 can hold, found larger ones in {name}"):
        to_checkpoint(graph, tmp_path / "out", str(places("llama")), dtype=torch.float16)
    assert not [*tmp_path.iterdir()]


def test_one_part_of_a_fused_projection_may_change(places: Callable[[str], Path], tmp_path: Path) -> None:
    graph = capture(load_model(str(places("phi3")))[0])
    slices = [n for n in graph.graph.nodes if is_op(n, "slice") and n.args[0].op == "get_attr"]
    first = insert_after(graph, slices[0], aten.mul.Tensor, slices[0], 2.0)
    slices[0].replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    done = to_checkpoint(finish(graph), tmp_path / "out", str(places("phi3")))
    before, after = in_files(places("phi3")), in_files(done.folder)
    name, (_, _, start, end) = str(slices[0].args[0].target), slices[0].args
    expected = before[name].clone()
    expected[start:end] *= 2
    assert after[name].equal(expected)


def test_one_parameter_is_in_memory_at_a_time(
    places: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = list[Any]()

    def watched(*arguments: Any) -> Tensor:
        assert not any(reference() is not None for reference in alive)
        value = solving.solve(*arguments)
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(plan, "solve", watched)
    transform_model(str(places("phi3")), ROTATED, tmp_path / "out", dtype=torch.bfloat16, check=False)
    assert len(alive) == len(in_files(places("phi3")))


def test_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    values = {
        "a": torch.arange(6, dtype=torch.int8),
        "b": torch.randn(3, 4).t(),
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.tensor(2.5, dtype=torch.float64),
        "e": torch.empty(0, 3),
        "f": torch.tensor([True, False]),
    }
    asked = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return values[name]

    path = tmp_path / "file.safetensors"
    write_tensors(path, {name: form(value) for name, value in values.items()}, read, {"format": "pt"})
    assert sorted(asked) == sorted(values)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_tensor(name).equal(value) for name, value in values.items())


def test_the_command(rolora: Run, places: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = places("llama"), tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text("passes:\n- fuse-norm\n- rotate: {residual: hadamard}\n")
    arguments = (
        "--recipe",
        tmp_path / "recipe.yaml",
        "--dtype",
        "bfloat16",
        "--shard-size",
        "10KB",
        "-o",
        out,
    )
    status, _, said = rolora("transform", source, *arguments)
    assert status == 0 and "transformers loads it and gives the graph's logits" in said
    assert len([*out.glob("*.safetensors")]) > 1
    status, _, said = rolora("transform", source, "--shard-size", "none", "-o", out)
    assert status == 2 and "expected a size such as 8GB" in said
    (tmp_path / "text.txt").write_text(TEXT)
    status, _, said = rolora("eval", out, "--text", tmp_path / "text.txt", "--window", 32, "--windows", 1)
    assert status == 0
