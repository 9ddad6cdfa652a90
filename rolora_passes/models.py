"""Load a causal language model and its tokenizer from where users keep them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rolora_passes.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(source: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A model and tokenizer from a folder, a hub name, or a `.gguf` file.

    Weights of a quantized GGUF are dequantized.

    Raises:
        CaptureError: nothing there, a damaged checkpoint, or not a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, options = _resolve(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise CaptureError(f"cannot load a causal language model from {source}: {_first_line(error)}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are floating point now
    return model.eval(), tokenizer


def _resolve(source: str) -> tuple[str, dict[str, str]]:
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CaptureError(f"expected a GGUF file at {path}, found nothing")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not (path / "config.json").is_file() and len(found) == 1:
            return str(path), {"gguf_file": found[0].name}
        if not (path / "config.json").is_file():
            raise CaptureError(f"expected config.json or one .gguf in {path}, found {len(found)} .gguf files")
        return str(path), {}
    if source.startswith((".", "/", "~")):
        raise CaptureError(f"expected a model folder or .gguf file at {path}, found nothing")
    return source, {}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
