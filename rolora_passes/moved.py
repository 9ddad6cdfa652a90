"""Modules, and names in them, that moved in 0.2: the old ones go on working for a release, with a warning."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "rolora_passes"
MOVED = {
    "add_lora": "passes.add_lora",
    "chats": "loading.chats",
    "commands": "cli",
    "data": "loading.data",
    "display": "cli.display",
    "export.add_kv_cache": "passes.add_kv_cache",
    "export.embeddings": "export.executorch.embeddings",
    "export.extras": "extras",
    "export.kv_cache": "decoding.kv_cache",
    "export.kv_storage": "decoding.kv_storage",
    "export.last_token": "export.executorch.last_token",
    "export.onnx_check": "export.onnx.check",
    "export.onnx_emitter": "export.onnx.emitter",
    "export.onnx_fake_quantize": "export.onnx.fake_quantize",
    "export.onnx_genai": "export.onnx.genai",
    "export.onnx_inputs": "export.onnx.inputs",
    "export.onnx_norms": "export.onnx.norms",
    "export.onnx_ops": "export.onnx.standard",
    "export.onnx_ort": "export.onnx.ort",
    "export.onnx_portable": "export.onnx.portable",
    "export.onnx_rotary": "export.onnx.rotary",
    "export.onnx_runner": "export.onnx.runner",
    "export.onnx_store": "export.onnx.store",
    "export.onnx_weights": "export.onnx.weights",
    "export.places": "graphs.operators.places",
    "export.position_rules": "graphs.operators.places",
    "export.positions": "decoding.positions",
    "export.ready": "decoding.ready",
    "export.rotary": "export.executorch.rotary",
    "export.runner": "export.executorch.runner",
    "export.shapes": "graphs.shapes",
    "export.state": "decoding.state",
    "export.xnnpack": "export.executorch.xnnpack.partition",
    "export.xnnpack_attention": "export.executorch.xnnpack.attention",
    "export.xnnpack_emitter": "export.executorch.xnnpack.emitter",
    "export.xnnpack_graph": "export.executorch.xnnpack.delegate",
    "export.xnnpack_hadamard": "export.executorch.xnnpack.hadamard",
    "export.xnnpack_linear": "export.executorch.xnnpack.linear",
    "export.xnnpack_ops": "export.executorch.xnnpack.ops",
    "export.xnnpack_signature": "export.executorch.xnnpack.signature",
    "fold_constants": "passes.fold_constants",
    "fuse_norm": "passes.fuse_norm",
    "graphs.adapters": "adapters.exchange",
    "graphs.affine": "numerics.affine",
    "graphs.base_changes": "adapters.base_changes",
    "graphs.basis_rules": "graphs.operators",
    "graphs.basis_variables": "graphs.bases.variables",
    "graphs.bookkeeping": "graphs.capture.bookkeeping",
    "graphs.canonical": "graphs.capture.canonical",
    "graphs.casts": "graphs.capture.casts",
    "graphs.clips": "quantize.clips",
    "graphs.diff": "inspection.diff",
    "graphs.files": "files",
    "graphs.functional": "graphs.capture.functional",
    "graphs.fused": "graphs.capture.fused",
    "graphs.gains": "learning.gains",
    "graphs.gptq": "numerics.gptq",
    "graphs.gptq_linears": "quantize.gptq_linears",
    "graphs.hadamard": "numerics.hadamard",
    "graphs.hadamard_constructions": "numerics.constructions",
    "graphs.inspect": "inspection.summary",
    "graphs.lora": "adapters.lora",
    "graphs.masks": "graphs.capture.masks",
    "graphs.norm_fusion": "graphs.bases.norm_fusion",
    "graphs.norms": "graphs.capture.norms",
    "graphs.observers": "quantize.observers",
    "graphs.ops": "graphs.operators",
    "graphs.peft_format": "adapters.peft_format",
    "graphs.peft_targets": "adapters.peft_targets",
    "graphs.precision": "graphs.capture.precision",
    "graphs.quantizers": "quantize.quantizers",
    "graphs.rotary": "graphs.capture.rotary",
    "graphs.rotations": "graphs.bases.rotations",
    "graphs.scalings": "graphs.bases.scalings",
    "graphs.spec": "graphs.facts",
    "graphs.split": "learning.layered",
    "graphs.stages": "quantize.stages",
    "graphs.structure": "inspection.structure",
    "graphs.transport": "graphs.lineage",
    "insert_hadamard": "passes.insert_hadamard",
    "insert_scaling": "passes.insert_scaling",
    "instructions": "loading.instructions",
    "learning.learn_rotation": "passes.learn_rotation",
    "learning.learn_scales": "passes.learn_scales",
    "learning.rilq": "passes.rilq",
    "learning.running": "recipes.learned",
    "learning.stiefel": "numerics.stiefel",
    "learning.training": "passes.training",
    "learning.tune_lora": "passes.tune_lora",
    "loftq": "passes.loftq",
    "manager": "passes.manager",
    "merge_lora": "passes.merge_lora",
    "models": "loading.models",
    "observe_activations": "passes.observe_activations",
    "quantize_activations": "passes.quantize_activations",
    "quantize_embedding": "passes.quantize_embedding",
    "quantize_kv_cache": "passes.quantize_kv_cache",
    "quantize_weights": "passes.quantize_weights",
    "registry": "passes.registry",
    "rotate": "passes.rotate",
    "sensitivity": "evaluation.sensitivity",
    "settings": "recipes.methods",
    "smooth_quant": "passes.smooth_quant",
    "tokens": "loading.tokens",
}

# Names that left a module, and where they are.
_NAMES = {
    "graphs.bases": {
        name: f"graphs.bases.inference:{name}"
        for name in ("infer_bases", "Bases", "BasisClass", "ParameterAxis", "describe")
    },
    "graphs.capture": {"_static_experts": "graphs.capture.attention:static_experts"},
    "graphs.evaluate": {"values_in": "graphs.running:values"},
    "graphs.graph": {
        "Expressions": "graphs.expressions:Expressions",
        "convert": "graphs.dtypes:convert",
        "dtype_of": "graphs.dtypes:dtype_of",
        "merge_equal": "graphs.expressions:merge_equal",
        "run": "graphs.running:run",
        "values": "graphs.running:values",
        "retyped": "graphs.dtypes:retyped",
    },
    "evaluation.scorers": {
        "ExecutorchScorer": "evaluation.scorers:ProgramScorer",
        "OnnxScorer": "evaluation.scorers:ProgramScorer",
    },
    "numerics.affine": {
        "Grid": "numerics.affine:Integers",
        "absmax": "numerics.codebooks:absmax",
        "codebook": "numerics.grids:codebook",
        "decode": "numerics.codebooks:decode",
        "encode": "numerics.codebooks:encode",
    },
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module of the package by the name that it had."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec that loads the module under its new name; None for all other modules."""
        known = name.startswith(f"{_PACKAGE}.") and name.removeprefix(f"{_PACKAGE}.") in MOVED
        return ModuleSpec(name, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, not a copy: patches and instance checks hold under both names."""
        new = f"{_PACKAGE}.{MOVED[spec.name.removeprefix(f'{_PACKAGE}.')]}"
        warnings.warn(f"{spec.name} is {new} now; this name goes in 0.3", FutureWarning, stacklevel=6)
        module = importlib.import_module(new)
        self._kept = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; its own spec is given back to it."""
        module.__spec__ = self._kept


def _moved_name(module: str, name: str) -> Any:
    """What a module's `__getattr__` gives: an attribute that is elsewhere now."""
    if name not in _NAMES[module]:
        raise AttributeError(f"module {_PACKAGE}.{module!r} has no attribute {name!r}")
    place, _, now = _NAMES[module][name].partition(":")
    text = f"{_PACKAGE}.{module}.{name} is {_PACKAGE}.{place}.{now} now; this name goes in 0.3"
    warnings.warn(text, FutureWarning, stacklevel=2)
    return getattr(importlib.import_module(f"{_PACKAGE}.{place}"), now)


def install() -> None:
    """Have old names found, after all others."""
    sys.meta_path.append(MovedModules())


def old_names(module: dict[str, Any]) -> None:
    """Have the names found that left a module, given its `globals()`."""
    name = module["__name__"].removeprefix(f"{_PACKAGE}.")
    module["__getattr__"] = functools.partial(_moved_name, name)
