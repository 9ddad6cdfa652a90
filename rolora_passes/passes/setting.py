"""Settings as papers write them, W4A4KV4, and the quantizers that they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rolora_passes.errors import PassError
from rolora_passes.passes.base import Pass
from rolora_passes.passes.registry import PassLike, make_pass

_FORM = re.compile(r"W(?P<weights>\d+)A(?P<activations>\d+)(KV(?P<cache>\d+))?(G(?P<group>\d+))?", re.I)


@dataclass(frozen=True)
class Setting:
    """Bits of weights, activations and cache; 16 is floating point. `group` of weights, None: per channel."""

    weights: int = 16
    activations: int = 16
    cache: int = 16
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> Setting:
        """`W4A4KV4`, `W4A8` (the cache in floating point), `W4A16G128` (groups of 128).

        Raises:
            PassError: not of that form, or a width that is not 2 to 8 (activations 3 to 8) or 16.
        """
        found = _FORM.fullmatch(text)
        known = {k: int(v) for k, v in found.groupdict().items() if v is not None} if found else {}
        if not found or any(
            known.get(k, 16) not in (*range(low, 9), 16)
            for k, low in (("weights", 2), ("activations", 3), ("cache", 2))
        ):
            raise PassError(
                f"expected a setting like W4A4KV4, W4A8 or W4A16G128 (2 to 8 bits, activations 3 to 8; "
                f"16 leaves floating point), found {text!r}"
            )
        return cls(**known)

    def __str__(self) -> str:
        cache = f"KV{self.cache}" if self.cache < 16 else ""
        return f"W{self.weights}A{self.activations}{cache}" + (f"G{self.group}" if self.group else "")


def quantizers(setting: Setting, method: str) -> list[Pass]:
    """The quantizers of a setting, as QuaRot's paper has them; the head and the embedding stay in float.

    Weights symmetric per channel with clip search (2 bits: asymmetric, in groups of 64, for there are too
    few levels for a whole channel); activations symmetric per token, clipped to 0.9 of their range at 4 bits;
    keys and values asymmetric per head, clipped to 0.95 at 4 bits.
    """
    two, steps = setting.weights == 2, list[PassLike]()
    if setting.weights < 16:
        grid = {"bits": setting.weights, "group_size": setting.group or (64 if two else None)}
        search = {"method": method, "clip_search": True, "head": None}
        steps += [{"quantize-weights": {**grid, "symmetric": not two, **search}}, "fold-constants"]
    if setting.activations < 16:
        clip = 0.9 if setting.activations == 4 else 1.0
        options = {"symmetric": True, "clip": clip, "head": None, "float_weights": True}
        steps.append({"quantize-activations": {"bits": setting.activations, **options}})
    if setting.cache < 16:
        clip = 0.95 if setting.cache == 4 else 1.0
        steps.append({"quantize-kv-cache": {"keys": setting.cache, "values": setting.cache, "clip": clip}})
    return [make_pass(step) for step in steps]
