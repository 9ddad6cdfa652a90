"""Adapters before or after rotation: the order of two passes, and the same function.

python examples/lora_before_or_after.py                 a tiny random model, in seconds
python examples/lora_before_or_after.py --model PATH    a model folder or .gguf file
"""

from __future__ import annotations

import argparse

import torch
from torch import fx
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rolora_passes import AddLoRA, FoldConstants, FuseNorm, MergeLoRA, Rotate, apply_passes
from rolora_passes.graphs import capture, convert, run
from rolora_passes.graphs.graph import copy_graph, parameters, set_tensor
from rolora_passes.graphs.info import info
from rolora_passes.loading.models import load_model


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def with_adapters_of(graph: fx.GraphModule, source: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that has the adapters of another."""
    result = copy_graph(graph)
    for name, value in parameters(source).items():
        if ".lora_" in name:
            set_tensor(result, name, value)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or .gguf file")
    options = parser.parse_args()
    model = load_model(options.model)[0] if options.model else tiny_model()

    graph = convert(capture(model), torch.float64)
    tokens = torch.randint(0, info(graph).config["vocab_size"], (2, 16))
    rotate = [FuseNorm(), Rotate()]

    # Adapters that do something, as after training: A and B both random.
    adapted = apply_passes(graph, [AddLoRA(rank=8, init="gaussian")])
    expected = run(adapted, tokens)

    def compare(what: str, found: fx.GraphModule) -> None:
        print(f"{what:58} {(run(found, tokens) - expected).abs().max() / expected.abs().max():.0e}")

    print(f"{'logits against the model with its adapters, relative:':58}")
    before = apply_passes(adapted, [*rotate, FoldConstants()])
    compare("adapters, then rotation", before)
    after = apply_passes(graph, [*rotate, AddLoRA(rank=8), FoldConstants()])
    compare("rotation, then the adapters as the rotation left them", with_adapters_of(after, before))
    compare("adapters merged, then rotation", apply_passes(adapted, [MergeLoRA(), *rotate]))
    compare("rotation, then adapters merged", apply_passes(adapted, [*rotate, MergeLoRA()]))
    compare("rotation, then adapters of the old basis (a mistake)", with_adapters_of(after, adapted))


if __name__ == "__main__":
    main()
