"""Rotation matrices of a graph: names, checks, and the files that carry them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from rolora_passes.errors import PassError
from rolora_passes.files import writing
from rolora_passes.graphs.graph import add_parameter
from rolora_passes.graphs.info import Rotation, info, set_info
from rolora_passes.graphs.operators.transforms import rotate

if TYPE_CHECKING:
    from rolora_passes.graphs.bases.inference import BasisClass


_FORMS = {"online": re.compile(r"\.R[34](\.\d+)?$"), "scale": re.compile(r"\.scale$")}


def rotation_key(cls: BasisClass) -> str:
    """SpinQuant's key where it has one: `R1`, `model.layers.{i}.self_attn.R2`; else the class's name."""
    if cls.kind == "residual":
        return "R1" if cls.index == 0 else f"R1.{cls.index}"
    return f"model.layers.{cls.index}.self_attn.R2" if cls.kind == "head" else cls.name


def add_rotation(
    graph: fx.GraphModule,
    key: str,
    matrix: Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    method: str,
    **about: Any,
) -> fx.Node:
    """Add a matrix, signs [n] or dense [n, n], as a parameter, with its entry in the manifest.

    The parameter is float64 where it is to be folded; what stays in the graph is of the graph's type. The
    manifest travels with every artefact: it is what another pass or an adapter checks against.
    """
    node = add_parameter(graph, f"rotations.{key.replace('.', '_')}", matrix.to(dtype))
    keep_rotation(graph, key, Rotation(method, str(node.target), matrix, about))
    return node


def keep_rotation(graph: fx.GraphModule, key: str, rotation: Rotation) -> None:
    """Put a rotation, or scale, on a graph's record, whose tensors lie on the CPU."""
    rotation = dataclasses.replace(rotation, matrix=rotation.matrix.cpu())
    set_info(graph, rotations={**info(graph).rotations, key: rotation})


def only(kind: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a file is meant for one pass.

    Args:
        kind: "online": R3, R4.0, …, which insert-hadamard leaves in the graph; "scale": what insert-scaling
            folds; "class": all others, R1, R2, …, which rotate folds.
    """
    return {key: value for key, value in given.items() if _kind(key) == kind}


def _kind(key: str) -> str:
    return next((kind for kind, form in _FORMS.items() if form.search(key)), "class")


def check_orthogonal(matrix: Tensor, size: int, key: str) -> Tensor:
    """A given rotation in float64: signs [n] as they are, a dense [n, n] orthogonal to rounding.

    Files hold float32; one Newton-Schulz step, R(3 - RᵀR)/2, takes out that rounding (the error is
    squared), so that the function is kept to float64's precision.

    Raises:
        PassError: wrong shape, not finite, or further than 1e-3 from orthogonal.
    """
    if not isinstance(matrix, Tensor):
        raise PassError(f"rotate: expected {key} to be a tensor, found {type(matrix).__name__}")
    shape = list(matrix.shape)
    if shape not in ([size], [size, size]):
        raise PassError(f"rotate: expected {key} to be {size} x {size} (or {size} signs), found {shape}")
    exact = matrix.detach().to("cpu", torch.float64)
    if exact.dim() == 1:
        if not bool((exact.abs() == 1).all()):
            raise PassError(f"rotate: expected {key} to hold signs (+1 or -1), found other values")
        return exact
    gram = exact.T @ exact
    error = float((gram - torch.eye(size, dtype=torch.float64)).abs().max())
    if not error < 1e-3:
        raise PassError(
            f"rotate: expected {key} to be orthogonal, found |RᵀR - 1| up to {error:.1e}; "
            "was it stored in less than 16 bits, or trained without the constraint?"
        )
    for _ in range(2):
        exact = exact @ (1.5 * torch.eye(size, dtype=torch.float64) - 0.5 * (exact.T @ exact))
    return exact


def save_rotations(graph: fx.GraphModule, folder: str | Path) -> list[Path]:
    """Write a graph's rotations and scales: `R.bin` (SpinQuant's keys, dense float32) and `rotations.json`.

    The manifest holds constructions, seeds, signs and the parameters each matrix went into, so a
    randomised Hadamard loads again exactly and keeps its fast transform.
    """
    folder = Path(folder)
    rotations = info(graph).rotations
    tensors = {key: rotation.matrix for key, rotation in rotations.items()}
    manifest = {key: rotation.entry() for key, rotation in rotations.items()}
    for key, tensor in tensors.items():
        if tensor.dim() == 1 and _kind(key) != "scale":
            manifest[key]["signs"] = "".join("+" if s > 0 else "-" for s in tensor.tolist())
    with writing(folder / "R.bin") as path, path.open("wb") as file:
        plain = {k: t if _kind(k) == "scale" else dense(t) for k, t in tensors.items()}
        torch.save({key: tensor.float() for key, tensor in plain.items()}, file)
    with writing(folder / "rotations.json") as path:
        path.write_text(json.dumps(manifest, indent=1), "utf-8")
    return [folder / "R.bin", folder / "rotations.json"]


def dense(tensor: Tensor) -> Tensor:
    """A rotation as a matrix [n, n], float64 where it is held as signs [n]."""
    if tensor.dim() > 1:
        return tensor
    return rotate(torch.eye(len(tensor), dtype=torch.float64), tensor.cpu())


def load_rotations(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rotations by key from a mapping, a SpinQuant `R.bin`, or a `rotations.json`.

    Raises:
        PassError: no such file, or not a file of rotations.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise PassError(f"rotate: no rotations at {path}; expected R.bin or rotations.json")
    if path.suffix == ".json":
        return _from_manifest(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PassError(
            f"rotate: {path} is damaged, or not a file of tensors that torch.save wrote"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()
    ):
        raise PassError(f"rotate: expected {path} to hold tensors by name (R1, …), found something else")
    return found


def _from_manifest(path: Path) -> dict[str, Tensor]:
    try:
        manifest = json.loads(path.read_text("utf-8"))
        entries = [dict(entry) for entry in manifest.values()]
    except (ValueError, AttributeError, TypeError) as error:
        raise PassError(f"rotate: {path} is damaged, or not a manifest that save_rotations wrote") from error
    dense = load_rotations(path.with_name("R.bin")) if any("signs" not in e for e in entries) else {}
    found = {}
    for key, entry in zip(manifest, entries, strict=True):
        signs = entry.get("signs")
        if signs is None and key not in dense:
            raise PassError(f"rotate: {path} names {key}, which is not in {path.with_name('R.bin')}")
        if signs is not None and not (isinstance(signs, str) and set(signs) <= {"+", "-"}):
            raise PassError(f"rotate: expected the signs of {key} in {path} as + and -, found {signs!r:.40}")
        ones = [1.0 if sign == "+" else -1.0 for sign in signs or ""]
        found[key] = dense[key] if signs is None else torch.tensor(ones, dtype=torch.float64)
    return found
