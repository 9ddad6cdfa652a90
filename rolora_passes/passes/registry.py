"""Passes by name. The table is strings, so that listing passes imports none of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rolora_passes.errors import PassError
from rolora_passes.passes.base import Pass

PassLike = Pass | str | Mapping[str, Any]

PASSES = {
    "fuse-norm": "rolora_passes.passes.fuse_norm:FuseNorm",
    "insert-scaling": "rolora_passes.passes.insert_scaling:InsertScaling",
    "rotate": "rolora_passes.passes.rotate:Rotate",
    "insert-hadamard": "rolora_passes.passes.insert_hadamard:InsertHadamard",
    "learn-rotation": "rolora_passes.passes.learn_rotation:LearnRotation",
    "learn-scales": "rolora_passes.passes.learn_scales:LearnScales",
    "add-lora": "rolora_passes.passes.add_lora:AddLoRA",
    "tune-lora": "rolora_passes.passes.tune_lora:TuneLoRA",
    "rilq": "rolora_passes.passes.rilq:RILQ",
    "loftq": "rolora_passes.passes.loftq:LoftQ",
    "merge-lora": "rolora_passes.passes.merge_lora:MergeLoRA",
    "observe-activations": "rolora_passes.passes.observe_activations:ObserveActivations",
    "smooth-quant": "rolora_passes.passes.smooth_quant:SmoothQuant",
    "quantize-weights": "rolora_passes.passes.quantize_weights:QuantizeWeights",
    "quantize-activations": "rolora_passes.passes.quantize_activations:QuantizeActivations",
    "quantize-kv-cache": "rolora_passes.passes.quantize_kv_cache:QuantizeKVCache",
    "quantize-embedding": "rolora_passes.passes.quantize_embedding:QuantizeEmbedding",
    "fold-constants": "rolora_passes.passes.fold_constants:FoldConstants",
    "add-kv-cache": "rolora_passes.passes.add_kv_cache:AddKVCache",
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
        call = f"; write {spec.__name__}()" if isinstance(spec, type) and issubclass(spec, Pass) else ""
        raise PassError(f"expected a pass, a name, or one {{name: options}}, found {spec!r}{call}")
    ((name, options),) = spec.items()
    cls = pass_class(name)
    _check_options(cls, {} if options is None else options)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()})


def _check_options(cls: type[Pass], options: Any) -> None:
    """That options, as a file gives them, exist and are of the declared types."""
    name = cls.pass_name()
    known = [f.name for f in dataclasses.fields(cls)]
    if not isinstance(options, Mapping):
        raise PassError(f"{name}: expected {{option: value}}, found {options!r}; options are {known}")
    hints = get_type_hints(cls)
    for key, value in options.items():
        if key not in known:
            raise PassError(f"{name} has no option {key!r}; there are {', '.join(known) or 'none'}")
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            found = f"found {value!r}; see `rolora passes {name}`"
            raise PassError(f"{name}: expected {key} to be {wanted}, {found}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as written; a list may stand for a tuple, an int for a float."""
    origin = get_origin(hint)
    if hint is Any or origin is Literal:  # the pass itself says which words it takes
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    accepted = {float: (int, float), tuple: (list, tuple)}.get(origin or hint, origin or hint)
    return isinstance(value, accepted)
