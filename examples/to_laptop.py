"""From a model to an ONNX folder, and tokens from it in onnxruntime-genai; an encoder, in plain ONNX.

pip install rolora-passes[onnx]
python examples/to_laptop.py                                 tiny random models, in seconds
python examples/to_laptop.py --model PATH --prompt "Once"    a model folder or .gguf file
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import onnxruntime_genai as genai
import torch
from to_phone import tiny_model
from transformers import BertConfig, BertForMaskedLM

from rolora_passes import apply_passes
from rolora_passes.export import to_onnx
from rolora_passes.graphs import capture, run
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe


def generate(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def encoder(folder: Path) -> None:
    """BERT with int8 weights, in operators that any conforming runtime has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    graph = capture(BertForMaskedLM(BertConfig(vocab_size=128, **sizes)).eval())
    weights = {"quantize-weights": {"bits": 8, "group_size": None}}
    graph = apply_passes(graph, [weights, "fold-constants"])
    to_onnx(graph, folder, "portable")
    tokens = torch.randint(0, 128, (2, 9))
    options = onnxruntime.SessionOptions()
    # ONNX Runtime would round activations to 8 bits wherever it finds quantized weights.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    feed = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
    found = torch.from_numpy(session.run(None, feed)[0])
    error = float((found - run(graph, tokens)).abs().max())
    print(f"encoder: logits {list(found.shape)}, {error:.0e} from the graph's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or .gguf file")
    parser.add_argument("--prompt", default="The capital of France is", help="with --model")
    parser.add_argument("--recipe", default="rotated-8da4w", help="default: %(default)s")
    options = parser.parse_args()
    tokenizer = None
    if options.model:
        model, tokenizer = load_model(options.model)
        prompt = tokenizer(options.prompt).input_ids
    else:
        model, prompt = tiny_model(), [3, 14, 15, 92, 65]

    graph = apply_passes(capture(model), load_recipe(options.recipe))
    with tempfile.TemporaryDirectory() as folder:
        report = to_onnx(graph, Path(folder) / "decoder", max_length=128, tokenizer=tokenizer)
        print(f"model.onnx: {report.bytes / 1e6:.2f} MB, {sum(report.operators.values())} nodes")
        found = generate(Path(folder) / "decoder", prompt, 12)
        print(f"prompt {prompt}\ntokens {found}")
        if tokenizer is not None:
            print(options.prompt + tokenizer.decode(found))
        encoder(Path(folder) / "encoder")


if __name__ == "__main__":
    main()
