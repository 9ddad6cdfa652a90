"""How far int4 activations x int4 weights move a model, with and without rotation.

python examples/quantize_and_compare.py                 a tiny random model with outliers planted
python examples/quantize_and_compare.py --model PATH    a model folder or .gguf file, on the text below
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rolora_passes import apply_passes
from rolora_passes.graphs import capture, run
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe

TEXT = (
    "The sea was calm that morning, and the boats had gone out early. By noon a wind had come up from the "
    "west, the kind that the old people said would bring rain before night, and one after another the sails "
    "turned for home. Nobody on the quay spoke much. They counted, and when the last one had come round the "
    "mole they went back to what they had been doing."
)


def tiny_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    plant_outlier(model, channel=5, size=10.0)
    return model


@torch.no_grad()
def plant_outlier(model: PreTrainedModel, channel: int, size: float) -> None:
    """Enlarge one channel of the residual stream and of every MLP, as training does.

    What writes a channel is made larger and what reads it smaller. The channel sets the scale of every token
    that a linear reads, which leaves few of the 16 levels to the others.
    """
    model.model.embed_tokens.weight[:, channel] *= size
    model.lm_head.weight[:, channel] /= size
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for writer in (attention.o_proj, mlp.down_proj, mlp.up_proj):
            writer.weight[channel] *= size
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight[:, channel] /= size
        mlp.down_proj.weight[:, channel] /= size


def divergence(found: Tensor, expected: Tensor) -> float:
    """KL(expected || found) of the next-token distributions, in nats, averaged over positions."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or .gguf file")
    options = parser.parse_args()
    if options.model:
        model, tokenizer = load_model(options.model)
        tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    else:
        model, tokens = tiny_model(), torch.randint(0, 128, (4, 64))

    graph = capture(model)
    expected = run(graph, tokens)
    print("recipe            KL to the float graph")
    for recipe in ("float", "rtn:W4A4", "quarot-rtn:W4A4"):
        quantized = apply_passes(graph, load_recipe(recipe))
        print(f"{recipe:16}  {divergence(run(quantized, tokens), expected):.2e} nats")


if __name__ == "__main__":
    main()
