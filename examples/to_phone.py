"""From a model to a .pte, and tokens from it in ExecuTorch's runtime.

pip install rolora-passes[executorch]
python examples/to_phone.py                                 a tiny random model, in seconds
python examples/to_phone.py --model PATH --prompt "Once"    a model folder or .gguf file
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rolora_passes import apply_passes
from rolora_passes.export import to_executorch
from rolora_passes.export.executorch.runner import Forward, load_pte
from rolora_passes.graphs import capture
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def continue_greedily(forward: Forward, prompt: list[int], count: int) -> list[int]:
    """The prompt in one call, then a token a call; the program keeps its key-value cache between calls."""
    logits = forward(torch.tensor([prompt]), torch.tensor([0]))
    found = [int(logits[0, -1].argmax())]
    while len(found) < count:
        logits = forward(torch.tensor([found[-1:]]), torch.tensor([len(prompt) + len(found) - 1]))
        found.append(int(logits[0, -1].argmax()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or .gguf file")
    parser.add_argument("--prompt", default="The capital of France is", help="with --model")
    parser.add_argument("--recipe", default="rotated-8da4w", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="where to keep the .pte (default: a temporary folder)")
    options = parser.parse_args()
    tokenizer = None
    if options.model:
        model, tokenizer = load_model(options.model)
        prompt = tokenizer(options.prompt).input_ids
    else:
        model, prompt = tiny_model(), [3, 14, 15, 92, 65]

    graph = apply_passes(capture(model), load_recipe(options.recipe))
    with tempfile.TemporaryDirectory() as folder:
        path = options.output or Path(folder) / "model.pte"
        report = to_executorch(graph, path, max_length=128)
        print(f"{path.name}: {report.bytes / 1e6:.2f} MB, {report.delegates} delegates")
        found = continue_greedily(load_pte(path), prompt, 12)
    print(f"prompt {prompt}\ntokens {found}")
    if tokenizer is not None:
        print(options.prompt + tokenizer.decode(found))


if __name__ == "__main__":
    main()
