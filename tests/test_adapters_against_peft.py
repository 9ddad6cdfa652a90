"""Whatever PEFT writes computes what PEFT loads, in any basis, or is refused by its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import captured, count, model_of
from torch import Tensor, fx

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, Pass, Rotate, apply_passes, history
from rolora_passes.adapters.exchange import save_adapter
from rolora_passes.errors import PassError
from rolora_passes.graphs import capture, load_graph, run, save_graph
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.verify import relative_error

TOKENS = torch.randint(0, 97, (2, 10), generator=torch.Generator().manual_seed(4))
TOKENS[:, 2:4] = torch.tensor([3, 5])
ROTATED: list[Pass] = [FuseNorm(), Rotate()]
TARGETS = {"phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "fc1", "fc2"]}


def trained(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    base: Callable[[str, torch.dtype], torch.nn.Module] = model_of,
    **options: Any,
) -> Tensor:
    """Save an adapter, all that PEFT trains of it changed at random; the logits of PEFT that loads it."""
    known = {"target_modules": TARGETS.get(name, ["q_proj", "down_proj"]), "r": 4, "lora_alpha": 8, **options}
    torch.manual_seed(6)
    model = peft.get_peft_model(copy.deepcopy(base(name, dtype)), peft.LoraConfig(**known))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    # PEFT's "auto" means that too, once it sees by a checkpoint's configuration that the base was resized.
    model.save_pretrained(str(folder), save_embedding_layers="auto" if base is model_of else True)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base(name, dtype)), str(folder)).eval()
    with torch.no_grad():
        found: Tensor = again(TOKENS).logits
    return found


def require_equal(name: str, folder: Path, wanted: Tensor, steps: list[Pass], bound: float = 2e-5) -> None:
    require_equal_to(captured(name, wanted.dtype), folder, wanted, steps, bound)


def require_equal_to(
    graph: fx.GraphModule, folder: Path, wanted: Tensor, steps: list[Pass], bound: float = 2e-5
) -> None:
    assert relative_error(run(graph, TOKENS), wanted) > 1e-2
    found = apply_passes(graph, [*steps, AddLoRA(adapter=folder)], verify=False)
    assert relative_error(run(found, TOKENS), wanted) < bound
    assert relative_error(run(apply_passes(found, [FoldConstants()]), TOKENS), wanted) < bound


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "rslora": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {".*0.*q_proj": 2}},
    "eva": {"init_lora_weights": "eva", "layers_to_transform": [1]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [5]}},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "all but a pattern": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ".*(0.*q|o)_proj"},
    "all but what is whole": {"target_modules": "all-linear", "modules_to_save": ["mlp", "v_proj"]},
    "a pattern": {"target_modules": ".*1.*(q|k)_proj|model.layers.0.mlp.up_proj"},
    "layers of a list": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [[], ROTATED], ids=["captured", "rotated"])
def test_as_peft_loads_it(kind: str, steps: list[Pass], tmp_path: Path) -> None:
    require_equal("llama", tmp_path, trained("llama", tmp_path, **KINDS[kind]), steps)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "phi3", "gemma", "gpt2", "opt"])
@pytest.mark.parametrize("steps", [[], ROTATED], ids=["captured", "rotated"])
def test_pissa_with_biases(name: str, steps: list[Pass], tmp_path: Path) -> None:
    """Fused projections, weights stored [in, out], and biases that a norm's is pushed into."""
    wanted = trained(name, tmp_path, init_lora_weights="pissa", bias="all")
    require_equal(name, tmp_path, wanted, steps)


@pytest.mark.parametrize("kind", ["default", "pissa", "olora"])
def test_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """What a start leaves is rounded once, as PEFT rounds it: what differs is the branch's own rounding."""
    wanted = trained("llama", tmp_path, torch.bfloat16, **KINDS[kind])
    require_equal("llama", tmp_path, wanted, [], bound=0.03)
    found = apply_passes(captured("llama", torch.bfloat16), [AddLoRA(adapter=tmp_path), FoldConstants()])
    base = peft.PeftModel.from_pretrained(copy.deepcopy(model_of("llama", torch.bfloat16)), str(tmp_path))
    name = "model.layers.0.self_attn.q_proj"
    own = base.get_submodule(f"base_model.model.{name}.base_layer").weight
    assert float((parameters(found)[f"{name}.weight"] != own).float().mean()) < 0.01


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_new_tokens_of_a_tied_table_are_the_heads_too(name: str, tmp_path: Path) -> None:
    wanted = trained(name, tmp_path, trainable_token_indices=[3, 9])
    require_equal(name, tmp_path, wanted, [])
    require_equal(name, tmp_path, wanted, ROTATED)
    save_graph(apply_passes(captured(name, torch.float32), ROTATED), tmp_path / "graph.safetensors")
    require_equal_to(load_graph(tmp_path / "graph.safetensors"), tmp_path, wanted, [])


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("steps", [[], ROTATED], ids=["captured", "rotated"])
def test_tables_that_peft_unties_are_refused(modules: list[str], steps: list[Pass], tmp_path: Path) -> None:
    trained("llama-tied", tmp_path, modules_to_save=modules)
    with pytest.raises(PassError, match=r"the model ties.*merge it with PEFT first"):
        apply_passes(captured("llama-tied", torch.float32), [*steps, AddLoRA(adapter=tmp_path)])


@pytest.mark.parametrize("kind", ["pissa", "modules_to_save", "tokens"])
def test_weights_that_are_folded_are_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    trained("llama", tmp_path, **KINDS[kind])
    with pytest.raises(PassError, match="put add-lora before fold-constants"):
        apply_passes(captured("llama", torch.float32), [*ROTATED, FoldConstants(), AddLoRA(adapter=tmp_path)])


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    trained("llama", tmp_path, **KINDS["pissa"])
    with pytest.raises(
        PassError, match=r"pissa start .* cannot be taken from .*: another adapter was merged"
    ):
        apply_passes(captured("llama", torch.float32), [AddLoRA(adapter=tmp_path), AddLoRA(adapter=tmp_path)])


def resized(name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A tiny model with a few tokens more, drawn anew each time."""
    model = copy.deepcopy(model_of(name, dtype))
    model.resize_token_embeddings(101)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(table.weight.data[97:], std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "modules_to_save"),  # which PEFT unties where they are tied: refused
        *[
            (name, kind)
            for name in ("llama", "llama-tied")
            for kind in ("trainable_token_indices", "neither")
        ],
    ],
)
@pytest.mark.parametrize("steps", [[], ROTATED], ids=["captured", "rotated"])
def test_resized_embeddings_as_peft_saves_them(
    name: str, kind: str, steps: list[Pass], tmp_path: Path
) -> None:
    """PEFT saves both tables then, what they were before too, and loads them onto any model of that size."""
    options = {
        "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
        "trainable_token_indices": {"trainable_token_indices": [3, 99]},
        "neither": {},
    }
    wanted = trained(name, tmp_path, base=resized, **options[kind])
    graph = capture(resized(name, torch.float32))  # its new rows are others than the adapter's
    require_equal_to(graph, tmp_path, wanted, steps)


def nf4(weight: Tensor) -> Tensor:
    """bitsandbytes' NF4 in blocks of 64, from its published table."""
    table = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
         0.7229568362236023, 1.0]
    )  # fmt: skip
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (table[(blocks / largest).unsqueeze(-1).sub(table).abs().argmin(-1)] * largest).reshape(
        weight.shape
    )


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(iterations: int, tmp_path: Path) -> None:
    """PEFT's own needs bitsandbytes and a GPU: its few lines are repeated here."""
    trained("llama", tmp_path, target_modules=["q_proj"])
    change(tmp_path, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": iterations})
    found = apply_passes(captured("llama", torch.float32), [AddLoRA(adapter=tmp_path)])
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = parameters(captured("llama", torch.float32))[name].detach()
    rounded = nf4(weight)
    for _ in range(iterations - 1):
        u, s, vh = torch.linalg.svd(weight - rounded, full_matrices=False)
        rounded = nf4(weight - (u[:, :4] * s[:4]) @ vh[:4])
    assert relative_error(parameters(found)[name], rounded) < 1e-6 < relative_error(rounded, weight)
    with pytest.raises(PassError, match=r"an adapter replaced .* of the base"):
        save_adapter(found, tmp_path / "back")


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "something_new"])
def test_starts_that_cannot_be_computed_again_are_refused(init: str, tmp_path: Path) -> None:
    trained("llama", tmp_path)
    change(tmp_path, init_lora_weights=init)
    with pytest.raises(PassError, match=f"init_lora_weights .* found '{init}'.*have PEFT convert it"):
        apply_passes(captured("llama", torch.float32), [AddLoRA(adapter=tmp_path)])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [(0, 1), (0, 2)]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, "ensure_weight_tying"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    ],
)
def test_what_is_more_than_branches_is_refused_by_name(
    options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    trained("mixtral" if "target_parameters" in options else "llama", tmp_path, **options)
    with pytest.raises(PassError, match=f"{name}.*merge it with PEFT first"):
        apply_passes(captured("llama", torch.float32), [AddLoRA(adapter=tmp_path)])


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.IA3Config])
def test_other_kinds_are_refused(kind: Callable[..., peft.PeftConfig], tmp_path: Path) -> None:
    options = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    model = peft.get_peft_model(
        copy.deepcopy(model_of("llama", torch.float32)), kind(target_modules=["q_proj"], **options)
    )
    model.save_pretrained(str(tmp_path))
    with pytest.raises(PassError, match=r"expected peft_type LORA, found '(LOHA|IA3)'"):
        apply_passes(captured("llama", torch.float32), [AddLoRA(adapter=tmp_path)])


def test_attention_of_a_mixture_of_experts(tmp_path: Path) -> None:
    require_equal("mixtral", tmp_path, trained("mixtral", tmp_path, target_modules=["q_proj"]), ROTATED)


def test_the_report_names_what_was_changed_and_nothing_shared_is_written(tmp_path: Path) -> None:
    wanted = trained("llama", tmp_path, **KINDS["modules_to_save"])
    graph = captured("llama", torch.float32)
    before = parameters(graph)["lm_head.weight"].clone()
    found = apply_passes(graph, [AddLoRA(adapter=tmp_path)])
    report = history(found)[-1].report
    assert "lm_head.weight: the adapter's own" in report.changed
    assert torch.equal(parameters(graph)["lm_head.weight"], before)
    save_graph(found, tmp_path / "graph.safetensors")
    loaded = load_graph(tmp_path / "graph.safetensors")
    assert relative_error(run(loaded, TOKENS), wanted) < 2e-5
    with pytest.raises(PassError, match="which a folder of branches does not hold"):
        save_adapter(loaded, tmp_path / "back")


def test_a_start_costs_rank_times_width_not_a_matrix(tmp_path: Path) -> None:
    trained("llama", tmp_path, **KINDS["pissa"])
    graph = captured("llama", torch.float32)
    found = apply_passes(graph, [AddLoRA(adapter=tmp_path)])
    sizes = {name: value.numel() for name, value in parameters(found).items() if "taken_" in name}
    assert len(sizes) == 2 * 4 and max(sizes.values()) == 4 * 40
    assert count(apply_passes(found, [FoldConstants()]), "matmul") == count(graph, "matmul")


def test_rows_of_tables_that_this_model_does_not_tie_are_refused(tmp_path: Path) -> None:
    trained("llama-tied", tmp_path, base=resized, trainable_token_indices=[3, 99])
    with pytest.raises(PassError, match=r"lm_head\.weight and model\.embed_tokens\.weight, which .* not tie"):
        apply_passes(capture(resized("llama", torch.float32)), [AddLoRA(adapter=tmp_path)])


@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2"])
@pytest.mark.parametrize("steps", [[], ROTATED], ids=["captured", "rotated"])
def test_a_branch_of_a_tied_head_is_the_heads_alone(name: str, steps: list[Pass], tmp_path: Path) -> None:
    """Fuse-norm gives the head a table of its own: it is still the model's head, to an adapter and back."""
    wanted = trained(name, tmp_path / "peft", target_modules=["lm_head"])
    require_equal(name, tmp_path / "peft", wanted, steps)
    found = apply_passes(captured(name, torch.float32), [*steps, AddLoRA(adapter=tmp_path / "peft")])
    save_graph(found, tmp_path / "graph.safetensors")
    save_adapter(load_graph(tmp_path / "graph.safetensors"), tmp_path / "back")
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(model_of(name, torch.float32)), str(tmp_path / "back")
    ).eval()
    with torch.no_grad():
        assert relative_error(again(TOKENS).logits, wanted) < 2e-5


@pytest.mark.parametrize("saved", [False, True], ids=["made", "loaded"])
def test_rows_of_a_tied_table_whose_head_is_folded_are_refused(saved: bool, tmp_path: Path) -> None:
    """The embedding is still the model's then, and the head is not: not to be changed by halves."""
    trained("llama-tied", tmp_path / "peft", trainable_token_indices=[3, 9])
    graph = apply_passes(captured("llama-tied", torch.float32), [FuseNorm(), FoldConstants()])
    if saved:
        save_graph(graph, tmp_path / "graph.safetensors")
        graph = load_graph(tmp_path / "graph.safetensors")
    with pytest.raises(PassError, match="put add-lora before fold-constants"):
        apply_passes(graph, [AddLoRA(adapter=tmp_path / "peft")])
