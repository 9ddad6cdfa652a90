"""The model card of a checkpoint: what it is of, what was done, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rolora_passes.version import __version__

if TYPE_CHECKING:
    from rolora_passes.export.checkpoint.origin import Origin
    from rolora_passes.export.checkpoint.transform import Transformed


def model_card(origin: Origin, done: Transformed) -> str:
    """README.md in Markdown, with the front matter that the hub reads.

    It names no licence: the model's own holds.
    """
    local = Path(origin.source).expanduser().exists()
    name = Path(origin.source).name if local else origin.source
    front = {"library_name": "transformers", "tags": ["rolora-passes"]}
    front |= {} if local else {"base_model": name}
    dtype = str(done.dtype).removeprefix("torch.")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}, transformed\n",
        f"Weights of {name} ({type(origin.outline).__name__}) in {dtype}, transformed by rolora-passes "
        f"{__version__}. Any program that loads the original loads this. The original's licence holds.\n",
        "## What was done\n",
        _passes(done),
        *_notes(done),
        "## How to load it\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n',
    ]
    return "\n".join(parts)


def _passes(done: Transformed) -> str:
    rows = []
    for record in done.history:
        options = ", ".join(
            f"{k}: {v}" for k, v in record.options.items() if isinstance(v, (int, float, str))
        )
        sites = f"{len(record.report.changed)} sites"
        rows.append(f"- `{record.name}`{f' ({options})' if options else ''}: {sites}, {record.kind}")
    return "\n".join(rows or ["Nothing: the weights are the original's."]) + "\n"


def _notes(done: Transformed) -> list[str]:
    notes = []
    if any(record.kind == "lossy" for record in done.history):
        notes.append("Quantized weights are stored as the values that they stand for, not as integers.\n")
    if done.untied:
        notes.append("The head has a table of its own (`tie_word_embeddings` is false).\n")
    for kind, count in done.left_out.items():
        notes.append(f"Left out: {count} {kind.replace('-', ' ')}, which a checkpoint does not hold.\n")
    dtype = str(done.dtype).removeprefix("torch.")
    if done.rounding is not None:
        notes.append(
            "transformers loads these files and gives the logits of the transformed graph. Storing the "
            f"weights in {dtype} moves them by {done.rounding:.1e} of the largest.\n"
        )
    return notes
