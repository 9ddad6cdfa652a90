"""Load a causal language model and its tokenizer from where users keep them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rolora_passes.errors import CaptureError, RoloraError, one_line
from rolora_passes.extras import require
from rolora_passes.loading import gguf_tokens
from rolora_passes.loading.checkpoint import require_enough, require_loadable, require_read
from rolora_passes.loading.gguf_file import GgufFile
from rolora_passes.loading.stored import load_stored
from rolora_passes.loading.tokens import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(source: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A model and tokenizer from a folder, a hub name, or a `.gguf` file.

    Weights of a quantized GGUF are dequantized. Every tensor of a checkpoint, and every entry of a GGUF, is
    read or is known to have no effect. The model's `generation_config.eos_token_id` has all tokens that end
    a text or a turn: see `rolora_passes.loading.tokens.end_tokens`.

    Raises:
        CaptureError: nothing there; a damaged checkpoint, or one that lacks weights, or has some that the
            model does not read; quantized weights other than a GGUF's; not a causal language model.
    """
    place = _resolve(source)
    tokenizer = load_tokenizer(source)
    model = _load_gguf(place, dtype) if place.suffix == ".gguf" else _load_checkpoint(source, place, dtype)
    _keep_ends(model, tokenizer, place)
    return model.eval(), tokenizer


def load_outlined(
    source: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Any, dict[str, Tensor]]:
    """`load_model` that leaves the weights in their files, where it can.

    Returns: the model, its tokenizer, and its weights by name, mapped, in the files' types: give them to
        `capture` with the model, whose parameters have no values. No weights: the model has them itself, for
        it is of a GGUF file, of pickled tensors, or of tensors that transformers joins.
    """
    place = _resolve(source)
    folder = place if place.is_dir() else None if place.suffix == ".gguf" else _snapshot(source)
    stored = None
    if folder is not None:
        require_loadable(folder)
        with _explained(f"a causal language model from {source}"):
            require_enough(folder)
            stored = load_stored(folder, dtype)
    if folder is None or stored is None:
        return *load_model(source, dtype), {}
    require_read(folder, stored.model, stored.info)
    _untie(stored.model)
    tokenizer = load_tokenizer(source)
    _keep_ends(stored.model, tokenizer, place)
    return stored.model.eval(), tokenizer, stored.weights


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model's folder, hub name or `.gguf` file, without its weights.

    Raises:
        CaptureError: nothing there, or nothing that can be loaded.
    """
    place = _resolve(source)
    if place.is_dir():
        require_loadable(place)  # a damaged file is named before a tokenizer that it may have spoilt
    with _explained(f"the tokenizer of {_named(source)}"):
        if place.suffix == ".gguf":
            return gguf_tokens.load_tokenizer(place, GgufFile.at(place).entries)
        transformers = require("transformers", "transformers")
        return transformers.AutoTokenizer.from_pretrained(str(place) if place.is_dir() else source)


def load_outline(source: str) -> PreTrainedModel:
    """The model of a folder, a hub name, or a `.gguf` file on the meta device: its modules, and no weights.

    Raises:
        CaptureError: nothing there; not the configuration of a causal language model.
    """
    transformers = require("transformers", "transformers")
    place = _resolve(source)
    if place.is_dir():
        require_loadable(place)
    with _explained(f"a causal language model from {_named(source)}"):
        if place.suffix == ".gguf":
            config = GgufFile.at(place).configuration()[0]
        else:
            config = transformers.AutoConfig.from_pretrained(str(place) if place.is_dir() else source)
        with torch.device("meta"):
            found: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return found


def source_folder(source: str) -> Path | None:
    """The folder in which a model's files lie; None, if its source is a GGUF file."""
    place = _resolve(source)
    return place if place.is_dir() else _snapshot(source) if place.suffix != ".gguf" else None


def tokenizer_files(source: str) -> list[Path]:
    """The files of a model's own tokenizer, as it was published; none, if its source is a GGUF file."""
    folder = source_folder(source)
    return [path for name in _TOKENIZER if folder is not None and (path := folder / name).is_file()]


_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt"),
)


def _load_checkpoint(source: str, place: Path, dtype: torch.dtype) -> PreTrainedModel:
    transformers = require("transformers", "transformers")
    if place.is_dir():
        require_loadable(place)
    with _explained(f"a causal language model from {source}"):
        if place.is_dir():
            require_enough(place)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(place) if place.is_dir() else source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
        if (folder := place if place.is_dir() else _snapshot(source)) is not None:
            require_loadable(folder)
            require_read(folder, model, info)
    _untie(model)
    return model


def _untie(model: PreTrainedModel) -> None:
    """Say so where the files hold a head of its own, which is used."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not table.weight:
        model.config.tie_word_embeddings = False


def _keep_ends(model: PreTrainedModel, tokenizer: Any, place: Path) -> None:
    if model.generation_config is not None:
        ends = end_tokens(model, tokenizer, _gguf_ends(place))
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def _load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    file = GgufFile.at(path)
    with _explained(f"a causal language model from {path}"):
        return file.load(dtype)


def _gguf_ends(place: Path) -> list[int]:
    return gguf_tokens.end_tokens(GgufFile.at(place).entries) if place.suffix == ".gguf" else []


def _resolve(source: str) -> Path:
    """A `.gguf` file, a model's folder, or else a hub name."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CaptureError(f"expected a GGUF file at {path}, found nothing")
        return path
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not (path / "config.json").is_file() and len(found) == 1:
            return found[0]
        if not (path / "config.json").is_file():
            raise CaptureError(f"expected config.json or one .gguf in {path}, found {len(found)} .gguf files")
        return path
    if source.startswith((".", "/", "~")):
        raise CaptureError(f"expected a model folder or .gguf file at {path}, found nothing")
    return path


def _snapshot(source: str) -> Path | None:
    """The folder where the files of a hub name lie, once they have been fetched."""
    from transformers.utils import cached_file

    found = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found).parent


def _named(source: str) -> str:
    """A source as errors call it."""
    return source if Path(source).expanduser().exists() else f"{source} (no file or folder here: a hub name?)"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what could not be loaded when transformers fails, however it does; its progress bars stay away."""
    try:
        with _without_bars():
            yield
    except (MemoryError, RoloraError):
        raise
    except Exception as error:
        raise CaptureError(f"cannot load {what}: {one_line(error)}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    logging = require("transformers.utils.logging", "transformers")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
