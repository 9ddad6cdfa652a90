"""Rotate changes bases, not the function; what it cannot rotate it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, chosen
from helpers import captured, check_exact, check_idempotent, difference, matrices
from torch import Tensor

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, InsertHadamard, Rotate, apply_passes, history
from rolora_passes.errors import PassError
from rolora_passes.graphs.bases.rotations import load_rotations, save_rotations
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.info import info

RIGID_RESIDUAL = {"gemma2", "gemma3", "olmo2"}


def orthogonal(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


@pytest.mark.parametrize("method", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_keeps_the_function(name: str, method: str) -> None:
    rotate = Rotate(residual=method, heads=method, others=method, seed=1)
    graph = check_exact(captured(name), [FuseNorm(), rotate, InsertHadamard(), FoldConstants()])
    check_idempotent(graph, FoldConstants())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "phi3", "mixtral"])
def test_given_matrices_keep_the_function(name: str) -> None:
    given = {"R1": orthogonal(24), "model.layers.1.self_attn.R2": orthogonal(6 if name == "opt" else 8)}
    graph = check_exact(captured(name), [FuseNorm(), Rotate(given=given, heads=None), FoldConstants()])
    methods = {key: entry.method for key, entry in info(graph).rotations.items()}
    assert methods == dict.fromkeys(given, "given")


@pytest.mark.parametrize("name", chosen(CONFIGS))
def test_rotates_the_residual_and_every_head_or_says_why_not(name: str) -> None:
    graph = apply_passes(captured(name), [FuseNorm(), Rotate()])
    report = history(graph)[-1].report
    heads = {f"model.layers.{i}.self_attn.R2" for i in (0, 1)}
    if name in RIGID_RESIDUAL:
        assert "R1" not in info(graph).rotations
        assert "mul" in dict(report.left)["residual"]
    else:
        assert "R1" in info(graph).rotations
    assert heads <= set(info(graph).rotations)


def test_gemma2_names_the_parameter_that_blocks_the_residual() -> None:
    report = history(apply_passes(captured("gemma2"), [FuseNorm(), Rotate()]))[-1].report
    assert "model.layers.0.post_attention_layernorm.weight" in dict(report.left)["residual"]


def test_every_weight_of_the_residual_changes() -> None:
    before = apply_passes(captured("llama"), [FuseNorm(), FoldConstants()])
    after = apply_passes(before, [Rotate(heads=None), FoldConstants()])
    old, new = parameters(before), parameters(after)
    assert set(old) == set(new)
    same = {name for name in old if torch.allclose(old[name], new[name])}
    assert same == {"model.rotary_emb.inv_freq"}


def test_classes_left_by_the_options_are_reported() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm(), Rotate(residual=None, heads="orthogonal")])
    assert dict(history(graph)[-1].report.left)["residual"] == "left at None by the options"
    assert set(info(graph).rotations) == {f"model.layers.{i}.self_attn.R2" for i in (0, 1)}


def test_a_seed_draws_the_same_rotations_and_another_seed_others() -> None:
    fused = apply_passes(captured("llama"), [FuseNorm()])
    first, again, other = (matrices(apply_passes(fused, [Rotate(seed=s)])) for s in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["R1"], other["R1"])
    alone = matrices(apply_passes(fused, [Rotate(heads=None)]))
    assert torch.equal(first["R1"], alone["R1"])


def test_float32_weights_stay_float32() -> None:
    graph = apply_passes(captured("llama", torch.float32), [FuseNorm(), Rotate(), FoldConstants()])
    assert {value.dtype for value in parameters(graph).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"R1": orthogonal(23)}, r"expected R1 to be 24 x 24 .*, found \[23, 23\]"),
        ({"R1": orthogonal(24) * 1.01}, r"expected R1 to be orthogonal, found .* up to"),
        ({"R1": torch.full((24, 24), float("nan"))}, "orthogonal"),
        ({"R1": torch.full((24,), 0.5)}, r"signs"),
        ({"R7": orthogonal(24)}, r"given \['R7'\] fit no free class; this graph has"),
    ],
)
def test_given_matrices_that_cannot_be_used(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply_passes(captured("llama"), [FuseNorm(), Rotate(given=given)])


def test_a_float32_matrix_is_made_exactly_orthogonal() -> None:
    given = {"R1": orthogonal(24).float()}
    check_exact(captured("llama"), [FuseNorm(), Rotate(given=given)], tolerance=1e-12)


@pytest.mark.parametrize("option", ["residual", "heads", "others"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(PassError, match=f"{option} must be 'hadamard', 'orthogonal' or None, found 'fast'"):
        Rotate(**{option: "fast"})


@pytest.mark.parametrize("method", ["hadamard", "orthogonal"])
def test_saved_rotations_load_again(method: str, tmp_path: Path) -> None:
    fused = apply_passes(captured("llama"), [FuseNorm()])
    rotated = apply_passes(fused, [Rotate(residual=method, heads=method)])
    save_rotations(rotated, tmp_path)
    dense = torch.load(tmp_path / "R.bin", weights_only=True)
    assert set(dense) == set(info(rotated).rotations)
    assert all(value.dtype == torch.float32 and value.dim() == 2 for value in dense.values())

    again = apply_passes(fused, [Rotate(given=tmp_path / "rotations.json")])
    close = apply_passes(fused, [Rotate(given=tmp_path / "R.bin")])
    kept = apply_passes(rotated, [FoldConstants()])
    for other, tolerance in ((again, 0.0 if method == "hadamard" else 1e-6), (close, 1e-6)):
        assert difference(other, fused) < 1e-10
        for name, value in parameters(apply_passes(other, [FoldConstants()])).items():
            torch.testing.assert_close(value, parameters(kept)[name], rtol=0, atol=tolerance)


def test_the_manifest_says_how_and_where(tmp_path: Path) -> None:
    save_rotations(apply_passes(captured("llama"), [FuseNorm(), Rotate(seed=4)]), tmp_path)
    entry = json.loads((tmp_path / "rotations.json").read_text())["R1"]
    assert entry["size"] == 24 and entry["seed"] == 4 and entry["method"] == "hadamard"
    assert entry["construction"]["order"] == 24 and len(entry["signs"]) == 24
    assert "model.embed_tokens.weight axis 1" in entry["parameters"]


def test_files_that_are_not_rotations(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no rotations at"):
        load_rotations(tmp_path / "R.bin")
    (tmp_path / "R.bin").write_bytes(b"not a file of torch.save")
    with pytest.raises(PassError, match=r"not a file of tensors that torch\.save wrote"):
        load_rotations(tmp_path / "R.bin")
    torch.save([1, 2], tmp_path / "R.bin")
    with pytest.raises(PassError, match="tensors by name"):
        load_rotations(tmp_path / "R.bin")
    (tmp_path / "rotations.json").write_text("{")
    with pytest.raises(PassError, match=r"rotations\.json"):
        load_rotations(tmp_path / "rotations.json")


def test_rotations_do_not_depend_on_machine_or_process() -> None:
    graph = apply_passes(captured("llama"), [FuseNorm(), Rotate(seed=3, heads=None)])
    signs = "".join("+" if s > 0 else "-" for s in matrices(graph)["R1"].tolist())
    assert signs == "-++--+-++-++++-+-++-+++-"


def test_adapters_rotate_with_the_weights() -> None:
    graph = apply_passes(captured("llama"), [AddLoRA(init="gaussian", rank=2)])
    check_exact(graph, [FuseNorm(), Rotate(), FoldConstants()])
