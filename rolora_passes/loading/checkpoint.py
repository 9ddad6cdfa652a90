"""Checkpoints of which every tensor is read, or has no effect, or is named in a refusal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rolora_passes.errors import CaptureError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What transformers drops without a word: buffers that old versions saved and new ones compute.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_PARTS = re.compile(r"model-\d+-of-\d+\.safetensors")  # of a checkpoint in several files


def require_loadable(folder: Path) -> None:
    """Refuse, before anything is loaded, what is damaged, quantized, incomplete, or an adapter.

    Raises:
        CaptureError: says which file, and what to do.
    """
    for path in sorted(folder.glob("*.safetensors")):
        _open(path)
    if (folder / "adapter_config.json").is_file():
        raise CaptureError(
            f"expected a model alone in {folder}, found an adapter beside it (adapter_config.json): "
            "move it to "
            "another folder, and give that to add-lora"
        )
    config = _json(folder / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if isinstance(method := part.get("quantization_config"), dict):
            raise CaptureError(
                f"expected floating-point weights in {folder}, found weights quantized with "
                f"{method.get('quant_method', 'an unnamed method')} (quantization_config in config.json): "
                "give the model that they were quantized from"
            )
    files = tensor_files(folder)
    if missing := [path.name for path in files if not path.is_file()]:
        raise CaptureError(
            f"expected the files of the index in {folder}, found no {some(missing)}: fetch them"
        )
    if files:
        _require_once(folder, files)


def require_enough(folder: Path) -> None:
    """Refuse files of a far smaller model than config.json describes, before memory is taken.

    A configuration that is not of these weights may describe a model that is larger than any memory.

    Raises:
        CaptureError: says what is missing, or transformers knows no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    files = tensor_files(folder)
    if not files:
        return  # transformers says which files it looks for
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    found = {name: shape for path in files for name, shape in _shapes(path).items()}
    count = sum(map(math.prod, found.values()))
    prefix = model.base_model_prefix  # which files that were saved without a head lack
    found |= {f"{prefix}.{name}": shape for name, shape in found.items()}
    held = dict(model.named_parameters())  # tied ones once
    _require_shapes([(n, found[n], v.shape) for n, v in held.items() if n in found], folder, model)
    if sum(value.numel() for value in held.values()) > 2 * count:  # a smaller lack is named later
        _require_none_missing({name for name in held if name not in found}, folder, model)


def require_read(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse a checkpoint, after it was loaded, if a tensor was not read, or a parameter not found.

    Args:
        folder: of the checkpoint.
        info: transformers' loading info.

    Raises:
        CaptureError: names up to three tensors.
    """
    where, kind = f"in {folder}", type(model).__name__
    _require_none_missing(info["missing_keys"], folder, model)
    _require_shapes(info["mismatched_keys"], folder, model)
    files = tensor_files(folder)
    names = {name: path for path in files for name in _kinds(path)}
    unread = {str(name) for name in info["unexpected_keys"]} | _dropped(model, names)
    if unread := {name for name in unread if not _without_effect(name, names.get(name), model)}:
        raise CaptureError(
            f"a {kind} as config.json describes it does not read {some(sorted(unread))} {where}: "
            "the model that these files hold computes something else. If config.json lacks an "
            "option (such as "
            "attention_bias), add it; if the tensors are of no use, remove them from the files"
        )
    _require_floats(files, model)


def _require_none_missing(names: Iterable[str], folder: Path, model: PreTrainedModel) -> None:
    if missing := sorted(names):
        raise CaptureError(
            f"expected all weights of a {type(model).__name__} in {folder}, found no {some(missing)}: it "
            "is incomplete, or was saved from another kind of model"
        )


def _require_shapes(
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]], folder: Path, model: PreTrainedModel
) -> None:
    """Compare (name, shape in the files, shape in the model)."""
    if wrong := sorted((n, list(a), list(b)) for n, a, b in shapes if list(a) != list(b)):
        name, found, expected = wrong[0]
        raise CaptureError(
            f"expected {name} as {expected}, which config.json says of a {type(model).__name__}, found "
            f"{found} in {folder}{f' ({len(wrong)} tensors have another shape)' if len(wrong) > 1 else ''}: "
            "config.json is not that of these weights"
        )


def some(names: Iterable[str]) -> str:
    """Up to three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tensor_files(folder: Path) -> list[Path]:
    """The files of weights that transformers reads, in the order in which it looks for them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            listed = _json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise CaptureError(f"expected a weight_map of tensors to files in {index}, found none")
            paths = sorted(map(Path, set(listed.values())))
            if outside := [str(path) for path in paths if path.is_absolute() or ".." in path.parts]:
                raise CaptureError(
                    f"expected files of {folder} in {index}, found {some(outside)}: mend the index"
                )
            return [folder / path for path in paths]
    return []


def _require_once(folder: Path, files: list[Path]) -> None:
    """Refuse a tensor that two files hold, for nothing says which is meant, and parts that nothing reads."""
    parts = folder.glob("model-*.safetensors") if files[0].suffix == ".safetensors" else ()
    others = [path for path in sorted(parts) if path not in files and _PARTS.fullmatch(path.name)]
    holders: dict[str, Path] = {}
    for path in [*files, *others]:
        names = _kinds(path)
        if twice := sorted(names.keys() & holders.keys()):
            raise CaptureError(
                f"expected every tensor once in {folder}, found {some(twice)} in {holders[twice[0]].name} "
                f"and again in {path.name}: remove the file, or the tensors, that are not the model's"
            )
        if names and path in others:
            raise CaptureError(
                f"{path} holds {some(names)}, and nothing reads that file: "
                f"{', '.join(f.name for f in files[:3])} are what the index lists, or come first. Remove it, "
                "or mend the index"
            )
        holders |= dict.fromkeys(names, path)


def _dropped(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Names in the files that the model lacks and that transformers does not report."""
    held = set(model.state_dict())
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [re.compile(pattern) for pattern in (*own, *_COMPUTED)]
    return {n for n in names if n not in held and any(p.search(n) for p in patterns)}


def _without_effect(name: str, path: Path | None, model: PreTrainedModel) -> bool:
    """Whether a tensor changes nothing: the model computes it, or it is of a part that the class leaves out.

    A class lists what its checkpoints have beyond it (a vision tower, layers for drafts of tokens). That is
    believed of modules that the model lacks, not of a tensor of a module that it has.
    """
    if path is not None and any(re.search(pattern, name) for pattern in _COMPUTED):
        return _is_computed(name, _read(path, name), model)
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    modules = {module for module, _ in model.named_modules()}
    return name.rpartition(".")[0] not in modules and any(re.search(pattern, name) for pattern in own)


def _is_computed(name: str, value: Tensor, model: PreTrainedModel) -> bool:
    leaf = name.rpartition(".")[2]
    if leaf == "position_ids":
        return value.flatten().tolist() == list(range(value.numel()))
    held = [b for n, b in model.named_buffers() if n.endswith(leaf) and b.shape == value.shape]
    # Saved in half precision they are the same frequencies, rounded.
    return any(
        torch.allclose(b.float(), value.float(), rtol=1e-2 if value.itemsize < 4 else 1e-5) for b in held
    )


def _require_floats(files: list[Path], model: PreTrainedModel) -> None:
    """Refuse integers where the model has floating-point weights: those of a quantizer nobody mentions."""
    held = {name: value.is_floating_point() for name, value in model.state_dict().items()}
    for path in files:
        for name, kind in _kinds(path).items():
            computed = any(re.search(pattern, name) for pattern in _COMPUTED)
            if held.get(name, not computed) and re.match(r"[IU]\d|BOOL|torch\.(u?int|bool)", kind):
                raise CaptureError(
                    f"expected floating-point values of {name} in {path}, found {kind}: are the "
                    "weights quantized? "
                    "Give the model that they were quantized from"
                )


def _kinds(path: Path) -> dict[str, str]:
    """The tensors of a file and their types, without reading them."""
    if path.suffix != ".safetensors":
        return {name: str(value.dtype) for name, value in _unpickled(path).items()}
    with _open(path) as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def stored_types(folder: Path) -> dict[str, torch.dtype]:
    """The floating-point types in which a checkpoint's files hold its tensors, by their names there."""
    found = {name: kind for path in tensor_files(folder) for name, kind in _kinds(path).items()}
    return {name: _TYPES[kind] for name, kind in found.items() if kind in _TYPES}


_TYPES = {
    name: dtype
    for kind, dtype in (
        ("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)
    )
    for name in (kind, str(dtype))
}  # fmt: skip


def _shapes(path: Path) -> dict[str, list[int]]:
    if path.suffix != ".safetensors":
        return {name: list(value.shape) for name, value in _unpickled(path).items()}
    with _open(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: nothing is read yet."""
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read(path: Path, name: str) -> Tensor:
    if path.suffix != ".safetensors":
        return _unpickled(path)[name]
    with _open(path) as file:
        found: Tensor = file.get_tensor(name)
    return found


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin`; nothing but tensors is unpickled."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # as many as there are ways to be no such file
        why = one_line(error)
        if type(error).__name__ == "UnpicklingError":  # its own words are how to read the file all the same
            why = "it is damaged, or holds more than tensors, which could run code"
        raise CaptureError(
            f"{path} is not a file of tensors: {why}; fetch it again, or give the model as .safetensors"
        ) from error
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _open(path: Path) -> Any:
    """Open a file, or name the one that was cut short: transformers does not."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CaptureError(
            f"{path} is damaged or cut short ({path.stat().st_size} bytes): {error}; fetch it again"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CaptureError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise CaptureError(f"expected an object in {path}, found {type(found).__name__}")
    return found
