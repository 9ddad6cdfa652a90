"""Several adapters over one base in one program: methods that share its weights."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from architectures import tiny_wide
from helpers import randomized
from test_executorch import steps
from torch import fx

from rolora_passes import (
    AddLoRA,
    FoldConstants,
    FuseNorm,
    QuantizeActivations,
    QuantizeEmbedding,
    QuantizeWeights,
    apply_passes,
)
from rolora_passes.errors import LoweringError
from rolora_passes.export.executorch.lower import to_executorch
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.graphs.capture import capture
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.verify import relative_error
from rolora_passes.numerics.packing import pack_nibbles

ROUNDED = [
    FuseNorm(), QuantizeWeights(), QuantizeActivations(), QuantizeEmbedding(), FoldConstants(),
]  # fmt: skip
pytestmark = pytest.mark.xdist_group("methods")  # they share graphs


@pytest.fixture(scope="module")
def graphs() -> dict[str, fx.GraphModule]:
    """A base with weights of 4 bits and activations of 8, and two adapters over it."""
    base = apply_passes(capture(tiny_wide()), ROUNDED, verify=False)
    adapted = {
        name: randomized(apply_passes(base, [AddLoRA(targets, rank=2)], verify=False), "lora_")
        for name, targets in (("queries", ("queries", "values")), ("all", "all-linear"))
    }
    return {"forward": base, **adapted}


def test_methods_compute_their_graphs_and_share_weights(
    graphs: dict[str, fx.GraphModule], tmp_path: Path
) -> None:
    base, others = graphs["forward"], {n: g for n, g in graphs.items() if n != "forward"}
    to_executorch(base, tmp_path / "model.pte", max_length=32, methods=others)
    written = (tmp_path / "model.pte").read_bytes()
    stored = {n: t for n, t in parameters(base).items() if t.dtype == torch.int8}
    assert len(stored) == 16
    for name, integers in stored.items():
        held = integers if "embed_tokens" in name else pack_nibbles(integers) ^ 0x88
        assert written.count(held.numpy().tobytes()) == 1, name
    for name, graph in graphs.items():
        pairs = [p for seed in range(4) for p in steps(graph, tmp_path / "model.pte", seed, 2, 3, name)]
        errors = sorted(relative_error(found, wanted) for found, wanted in pairs)
        # Where no activation is so near to half a step that it rounds the other way.
        assert errors[len(errors) // 4] < 1e-5 and errors[-1] < 0.05, name
    tokens, start = torch.tensor([[3, 1, 4]]), torch.tensor([0])
    found = [load_pte(tmp_path / "model.pte", name)(tokens, start) for name in graphs]
    assert all(relative_error(a, b) > 0.05 for a, b in itertools.pairwise(found))


def test_branches_in_8_bits_beside_weights_in_4(tmp_path: Path) -> None:
    base = apply_passes(capture(tiny_wide()), [FuseNorm(), QuantizeWeights(), FoldConstants()], verify=False)
    tuned = randomized(apply_passes(base, [AddLoRA(rank=8)], verify=False), "lora_")
    rest = [QuantizeActivations(), QuantizeEmbedding(), FoldConstants()]
    branches = QuantizeWeights(8, None, targets=("lora_A", "lora_B"))
    sizes = {}
    for name, passes in {"float": rest, "8 bits": [branches, FoldConstants(), *rest]}.items():
        graph = apply_passes(tuned, passes, verify=False)
        sizes[name] = to_executorch(graph, tmp_path / "model.pte", max_length=32).bytes
        pairs = [p for seed in range(4) for p in steps(graph, tmp_path / "model.pte", seed, 2, 3)]
        errors = sorted(relative_error(found, wanted) for found, wanted in pairs)
        assert errors[len(errors) // 4] < 1e-5 and errors[-1] < 0.1, name
    assert sizes["8 bits"] < sizes["float"] - 2 * sum(
        t.numel() for n, t in parameters(tuned).items() if "lora_" in n
    )


@pytest.mark.parametrize("name", ["forward", "two words", "get_bos_id", "use_kv_cache"])
def test_names_that_are_refused(name: str, graphs: dict[str, fx.GraphModule], tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="expected names of methods that are identifiers"):
        to_executorch(graphs["forward"], tmp_path / "model.pte", methods={name: graphs["all"]})
    assert not list(tmp_path.iterdir())
