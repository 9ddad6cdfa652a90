"""Load a causal language model and its tokenizer from where users keep them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from rolora_passes.errors import CaptureError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(source: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A model and tokenizer from a folder, a hub name, or a `.gguf` file.

    Weights of a quantized GGUF are dequantized.

    Raises:
        CaptureError: nothing there; a damaged checkpoint, or one that lacks weights; not a causal language
            model.
    """
    place, options = _resolve(source)
    if not options:
        _require_whole(Path(place))
    from transformers import AutoModelForCausalLM

    with _explained(f"a causal language model from {source}"):
        known = {"dtype": dtype, "output_loading_info": True, **options}
        model, info = AutoModelForCausalLM.from_pretrained(place, **known)
    missing = sorted(info["missing_keys"])
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CaptureError(
            f"expected all weights of a {type(model).__name__} in {source}, found no {some}: "
            "it is incomplete, or was saved from another kind of model"
        )
    tokenizer = load_tokenizer(source)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are floating point now
    return model.eval(), tokenizer


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model's folder, hub name or `.gguf` file, without its weights.

    Raises:
        CaptureError: nothing there, or nothing that can be loaded.
    """
    place, options = _resolve(source)
    from transformers import AutoTokenizer

    with _explained(f"the tokenizer of {source}"):
        return AutoTokenizer.from_pretrained(place, **options)


def load_outline(source: str) -> PreTrainedModel:
    """The model of a folder, a hub name, or a `.gguf` file on the meta device: its modules, and no weights.

    Raises:
        CaptureError: nothing there; not the configuration of a causal language model.
    """
    place, options = _resolve(source)
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(f"a causal language model from {source}"), torch.device("meta"):
        config = AutoConfig.from_pretrained(place, **options)
        found: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return found


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


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what could not be loaded when transformers fails, however it does."""
    try:
        yield
    except (MemoryError, CaptureError):
        raise
    except Exception as error:
        raise CaptureError(f"cannot load {what}: {one_line(error)}") from error


def _require_whole(folder: Path) -> None:
    """Name the file that was cut short, if one was: transformers does not."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CaptureError(
                f"{path} is damaged or cut short ({path.stat().st_size} bytes): {error}; fetch it again"
            ) from error
