"""Rotate a model, add adapters, and check that it computes what it did.

python examples/rotate_and_verify.py                 a tiny random model, in seconds
python examples/rotate_and_verify.py --model PATH    a model folder or .gguf file
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rolora_passes import AddLoRA, FuseNorm, Rotate, apply_passes, history
from rolora_passes.graphs import capture, convert, run
from rolora_passes.graphs.info import info
from rolora_passes.inspection.summary import bases_text
from rolora_passes.loading.models import load_model


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or .gguf file")
    options = parser.parse_args()
    model = load_model(options.model)[0] if options.model else tiny_model()

    graph = convert(capture(model), torch.float64)  # so that rounding cannot hide anything
    rotated = apply_passes(graph, [FuseNorm(), Rotate(), AddLoRA()])

    for record in history(rotated):
        print(f"{record.name:10} {len(record.report.changed):4} sites, logits differ by {record.error:.0e}")
    tokens = torch.randint(0, info(graph).config["vocab_size"], (2, 16))
    before, after = run(graph, tokens), run(rotated, tokens)
    print(
        f"float64 logits, before and after: {(after - before).abs().max() / before.abs().max():.0e} relative"
    )
    print("\n" + bases_text(apply_passes(graph, [FuseNorm()])))


if __name__ == "__main__":
    main()
