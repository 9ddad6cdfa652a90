"""Passes by name. The table is strings, so that listing passes imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from rolora_passes.errors import PassError
from rolora_passes.passes import Pass

PASSES = {
    "fuse-norm": "rolora_passes.fuse_norm:FuseNorm",
    "rotate": "rolora_passes.rotate:Rotate",
    "insert-hadamard": "rolora_passes.insert_hadamard:InsertHadamard",
    "add-lora": "rolora_passes.add_lora:AddLoRA",
    "merge-lora": "rolora_passes.merge_lora:MergeLoRA",
    "quantize-weights": "rolora_passes.quantize_weights:QuantizeWeights",
    "quantize-activations": "rolora_passes.quantize_activations:QuantizeActivations",
    "quantize-embedding": "rolora_passes.quantize_embedding:QuantizeEmbedding",
    "fold-constants": "rolora_passes.fold_constants:FoldConstants",
    "add-kv-cache": "rolora_passes.export.add_kv_cache:AddKVCache",
}


def pass_class(name: str) -> type[Pass]:
    """The class of a pass, ours or one another package registers under the entry point `rolora_passes`.

    Raises:
        PassError: no such pass; the message lists the ones there are.
    """
    known = {**{e.name: e.value for e in entry_points(group="rolora_passes")}, **PASSES}
    if name not in known:
        raise PassError(f"expected the name of a pass, found {name!r}; there are {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    return found


def make_pass(spec: Pass | str | Mapping[str, Any]) -> Pass:
    """A pass from itself, its name, or {name: options}.

    Raises:
        PassError: not one of these, an unknown name, or an option the pass does not have.
    """
    if isinstance(spec, Pass):
        return spec
    if isinstance(spec, str):
        return pass_class(spec)()
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise PassError(f"expected a pass, a name, or one {{name: options}}, found {spec!r}")
    ((name, options),) = spec.items()
    try:
        return pass_class(name)(**(options or {}))
    except TypeError as error:
        raise PassError(f"{name}: {error}; see `rolora passes {name}`") from error
