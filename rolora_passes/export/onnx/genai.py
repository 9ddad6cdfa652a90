"""The file by which onnxruntime-genai knows a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rolora_passes.export.onnx.emitter import OnnxEmitter
from rolora_passes.graphs.graph import argument, is_op
from rolora_passes.graphs.info import info

LEVEL_ENTRY = "session.qdq_matmulnbits_accuracy_level"


def write_genai_config(e: OnnxEmitter, folder: Path, layers: int, share_buffer: bool) -> None:
    """Write `genai_config.json`, unless layers differ in their heads, which it has no words for."""
    shapes = {
        (e.shape(argument(n, "query"))[2], e.shape(argument(n, "key"))[2:])
        for n in e.graph.module.graph.nodes
        if is_op(n, "attention")
    }
    if len(shapes) > 1:
        e.note("no genai_config.json: layers differ in their heads, which it cannot say")
        return
    ((heads, (kv_heads, width)),) = shapes
    config = info(e.graph.module).config
    names = [value.name for value in e.inputs.inputs if not str(value.name).startswith("past")]
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session_entries(e)},
        "filename": "model.onnx",
        "head_size": width,
        "inputs": {
            **{name: name for name in names},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
    }
    if config.get("hidden_size") is not None:
        decoder["hidden_size"] = config["hidden_size"]
    ends = config.get("eos_token_id")
    pad = config.get("pad_token_id")
    model: dict[str, Any] = {
        "type": "decoder",
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None else ends[0] if isinstance(ends, list) and ends else ends,
        "vocab_size": config.get("vocab_size"),
        "context_length": e.graph.max_length,
        "decoder": decoder,
    }
    search = {"max_length": e.graph.max_length, "do_sample": False, "past_present_share_buffer": share_buffer}
    known = {key: value for key, value in model.items() if value is not None}
    (folder / "genai_config.json").write_text(
        json.dumps({"model": known, "search": search}, indent=1), "utf-8"
    )


def session_entries(e: OnnxEmitter) -> dict[str, str]:
    """How ONNX Runtime is to multiply where it makes its own kernels of dequantized weights."""
    return {LEVEL_ENTRY: str(max(e.levels))} if e.levels else {}
