"""A LoRA adapter as PEFT keeps it, read: `adapter_config.json` and `adapter_model.safetensors`.

Anybody may have written it. Every entry of the configuration is read, is known to change nothing of what is
computed, or is refused by its name; so is every tensor. PEFT itself is not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora_passes.adapters.peft_targets import Targets
from rolora_passes.adapters.peft_tensors import MERGE, PARTS, WEIGHTS, read_tensors, sort_tensors
from rolora_passes.errors import PassError, one_line
from rolora_passes.graphs.axis_maps import LowRank

CONFIG, ABOUT = "adapter_config.json", "rolora.json"
# Who made it and from what; how it was trained; the storage order of GPT-2's weights, which the graph knows;
# and details of what is refused or off by entries below.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision",
    "task_type", "lora_dropout", "runtime_config", "fan_in_fan_out", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "target_modules",
    "init_lora_weights", "loftq_config", "bias", "modules_to_save", "trainable_token_indices",
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
# What an adapter may say that a branch y += s·B A x is not.
_REFUSED = {
    "use_dora": "DoRA scales weights by their norms",
    "target_parameters": "it adapts parameters that no linear holds, such as experts in one tensor",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it acts from some tokens on (aLoRA)",
    "use_bdlora": "its matrices are in blocks (BD-LoRA)",
    "use_qalora": "it pools what it reads (QA-LoRA)",
    "arrow_config": "it routes between adapters (Arrow)",
    "kasa_config": "it truncates the base's weights (KaSA)",
    "monteclora_config": "it samples its matrices (MonteCLoRA)",
    "velora_config": "it compresses what training stores (VeLoRA)",
    "megatron_config": "it is of Megatron's parallel linears",
    "ensure_weight_tying": "it ties what it adds to an embedding and a head",
}
# Starts that leave the base as it is, and those that take from it what the branch then holds.
_PLAIN = {"gaussian", "eva", "orthogonal", "mica"}
_STARTS = {"pissa", "olora", "loftq"}
_CONVERT = (
    "have PEFT convert it to plain LoRA (model.save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=…)), or " + MERGE
)


@dataclass(frozen=True)
class Adapter:
    """What an adapter says of a base, by the names of the base's modules and parameters.

    Attributes:
        modules: branches: A [rank, in], B [out, rank], the scale, and B's bias if there is one; by site where
            they are in a graph's own basis.
        start: "pissa", "olora" or "loftq", which took from the base's weights when it was made, and must
            again; None: it took nothing.
        iterations: of LoftQ's start, in 4 bits.
        replaced: parameters that it has in place of the base's: `modules_to_save`, biases, resized
            embeddings.
        rows: of embeddings: indices int64 [n] and what stands there instead [n, d].
        rows_of_input: whether they are of the input embedding, as a list without names means: a head that is
            tied to it has them too.
        basis: the hash of the graph's bases; None: those of the model.
        base: the hash of the base's weights; None: not known (PEFT keeps a name).
    """

    modules: Mapping[str, LowRank]
    start: str | None = None
    iterations: int = 1
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows_of_input: bool = False
    basis: str | None = None
    base: str | None = None


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote.

    Raises:
        PassError: no adapter there, a damaged one, or one with an entry or a tensor that has no meaning here.
    """
    folder = Path(folder)
    config = _Config(folder)
    config.require_known()
    parts, replaced, rows = sort_tensors(folder, read_tensors(folder))
    modules = {module: _branch(config, module, found) for module, found in parts.items()}
    Targets(config.values, config.refuse).require(modules, replaced)
    start, iterations = config.start()
    about = _About(folder)
    return Adapter(
        modules,
        start,
        iterations,
        replaced,
        rows=config.rows(rows),
        rows_of_input=isinstance(config.values.get("trainable_token_indices"), list),
        basis=about.text("basis"),
        base=about.text("weights"),
    )


class _Entries:
    """A JSON object that anybody may have written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values: Any = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise PassError(f"{path} is damaged: {one_line(error)}") from error
        if not isinstance(self.values, dict):
            raise PassError(f"expected an object in {path}, found {type(self.values).__name__}")

    def refuse(self, key: str, expected: str, found: Any) -> PassError:
        text = repr(found)
        return PassError(f"{self.path}: expected {key} to be {expected}, found {text[:80]}")


class _Config(_Entries):
    """`adapter_config.json`."""

    def __init__(self, folder: Path) -> None:
        if not (folder / CONFIG).is_file():
            raise PassError(f"expected an adapter in {folder}, found no {CONFIG}")
        super().__init__(folder / CONFIG)

    def require_known(self) -> None:
        """That every entry is read, is known to have no effect, or says nothing."""
        if (kind := self.values.get("peft_type")) != "LORA":
            raise PassError(f"{self.path}: expected peft_type LORA, found {kind!r:.80}; {MERGE}")
        for key, value in self.values.items():
            if key in _READ | _WITHOUT_EFFECT or value in (None, False, "", [], {}):
                continue
            if key == "ensure_weight_tying" and not self._embeds():
                continue
            meaning = _REFUSED.get(key, "an entry that this version does not know, so its effect neither")
            raise PassError(f"{self.path}: found {key[:80]!r}, {meaning}; {MERGE}")
        if (bias := self.values.get("bias", "none")) not in ("none", "all", "lora_only"):
            raise self.refuse("bias", "none, all or lora_only", bias)

    def _embeds(self) -> bool:
        return bool(self.values.get("modules_to_save") or self.values.get("trainable_token_indices"))

    def of_module(self, module: str) -> tuple[int, float]:
        """The rank and the scale of a module's branch."""
        rank = self._by_pattern("rank_pattern", module, self.values.get("r"))
        alpha = self._by_pattern("alpha_pattern", module, self.values.get("lora_alpha"))
        if type(rank) is not int or rank < 1:
            raise self.refuse(f"the rank of {module}", "a whole number, 1 or more", rank)
        if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
            raise self.refuse(f"lora_alpha of {module}", "a finite number", alpha)
        return rank, alpha / (rank**0.5 if self.flag("use_rslora") else rank)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value not in (None, False, True):
            raise self.refuse(key, "true or false", value)
        return bool(value)

    def _by_pattern(self, key: str, module: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that fits the module's name, or its last parts."""
        patterns = self.values.get(key) or {}
        if not isinstance(patterns, dict):
            raise self.refuse(key, "an object", patterns)
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise self.refuse(key, "regular expressions", f"{pattern}: {error}") from error
        return default

    def start(self) -> tuple[str | None, int]:
        """What must be taken from the base, and LoftQ's iterations."""
        given = self.values.get("init_lora_weights", True)
        init = given.lower() if isinstance(given, str) else given
        if init is None or isinstance(init, bool) or (isinstance(init, str) and init in _PLAIN):
            return None, 1
        if not isinstance(init, str):
            raise self.refuse("init_lora_weights", "true, false or a name", given)
        if init not in _STARTS:
            raise PassError(
                f"{self.path}: expected init_lora_weights true, or one of "
                f"{', '.join(sorted(_PLAIN | _STARTS))}, "
                f"found {given!r:.80}: what it took from the base's weights cannot be computed again, for "
                f"that was random or needs its data; {_CONVERT}"
            )
        if init != "loftq":
            return init, 1
        known = self.values.get("loftq_config")
        known = known if isinstance(known, dict) else {}
        bits, iterations = known.get("loftq_bits", 4), known.get("loftq_iter", 1)
        if bits != 4 or type(iterations) is not int or not 1 <= iterations <= 100:
            expected = "of 4 bits, which every version of PEFT rounds alike, and 1 to 100 iterations"
            raise self.refuse("loftq_config (init_lora_weights loftq)", expected, known)
        return "loftq", iterations

    def rows(self, found: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows of embeddings with their indices, by the names of the embeddings' weights."""
        key = "trainable_token_indices"
        given = self.values.get(key) or {}
        if isinstance(given, list) and given and found:
            first, *others = found.values()  # of the input embedding, and of a head that is tied to it
            if all(torch.equal(first, other) for other in others):
                given = dict.fromkeys(found, given)
        result = {}
        for module, rows in found.items():
            fits = (
                [k for k in given if module == k or module.endswith(f".{k}")]
                if isinstance(given, dict)
                else []
            )
            indices = given[fits[0]] if fits else None
            if not isinstance(indices, list) or len({*map(repr, indices)}) != len(rows) or rows.dim() != 2:
                raise self.refuse(key, f"the indices of the {len(rows)} rows of {module}", indices)
            if any(type(i) is not int or not 0 <= i < 2**31 for i in indices):
                raise self.refuse(key, "indices of tokens", indices)
            result[f"{module}.weight"] = torch.tensor(indices), rows
        if len(result) != len(given):
            raise self.refuse(key, f"of embeddings whose rows are in {WEIGHTS}", self.values[key])
        return result


class _About(_Entries):
    """`rolora.json`, which only ours have: for which base, and in which basis."""

    def __init__(self, folder: Path) -> None:
        self.path, self.values = folder / ABOUT, {}
        if self.path.is_file():
            super().__init__(self.path)
        if "base" in self.values:
            raise PassError(
                f"{self.path} is of an older version, which knew a base by its name alone: save the adapter "
                f"again; or, if it is in the model's own basis and is this model's, delete {ABOUT}"
            )

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.refuse(key, "a hash", value)


def _branch(config: _Config, module: str, parts: dict[str, Tensor]) -> LowRank:
    a, b, outer = (parts.get(part) for part in PARTS)
    found = {p: list(t.shape) for p, t in parts.items()}
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise PassError(
            f"{config.path.parent}: expected A [rank, in] and B [out, rank] of {module}, found {found}"
        )
    rank, scale = config.of_module(module)
    if rank != a.shape[0]:
        raise PassError(f"{config.path.parent}: expected rank {rank} of {module}, found {a.shape[0]}")
    if config.flag("lora_bias") != (outer is not None) or (outer is not None and outer.shape != b.shape[:1]):
        expected = "a bias [out] of B" if config.flag("lora_bias") else "no bias of B (lora_bias is false)"
        raise PassError(f"{config.path.parent}: expected {expected} of {module}, found {found}")
    return LowRank(a, b, scale, None, outer)
