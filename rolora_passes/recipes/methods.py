"""The pipelines of the methods that papers compare, at settings such as W4A4KV4."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Pass
from rolora_passes.passes.fold_constants import FoldConstants
from rolora_passes.passes.fuse_norm import FuseNorm
from rolora_passes.passes.insert_hadamard import InsertHadamard
from rolora_passes.passes.insert_scaling import InsertScaling
from rolora_passes.passes.merge_lora import MergeLoRA
from rolora_passes.passes.observe_activations import ObserveActivations
from rolora_passes.passes.quantize_activations import QuantizeActivations
from rolora_passes.passes.quantize_weights import QuantizeWeights
from rolora_passes.passes.registry import make_pass
from rolora_passes.passes.rotate import Rotate
from rolora_passes.passes.setting import Setting, quantizers
from rolora_passes.passes.smooth_quant import SmoothQuant


def _rotated(setting: Setting) -> list[Pass]:
    """R1, R2 and R4, and R3 where it costs nothing in vain; folded once, in float64."""
    return [FuseNorm(), Rotate(), InsertHadamard(r3=setting.cache < 16, r4=True), FoldConstants()]


def _rounded(setting: Setting, method: str) -> list[Pass]:
    """Nothing but the quantizers."""
    return quantizers(setting, method)


def _smoothquant(setting: Setting, method: str) -> list[Pass]:
    """SmoothQuant (Xiao et al., 2023): channels scaled from activations into weights."""
    return [ObserveActivations(per="channel"), SmoothQuant(), *quantizers(setting, method)]


def _quarot(setting: Setting, method: str) -> list[Pass]:
    """QuaRot (Ashkboos et al., 2024): randomised Hadamards.

    Its heads' matrices are folded, as SpinQuant's R2, where QuaRot has one more Hadamard at run time.
    """
    return [*_rotated(setting), *quantizers(setting, method)]


def _spinquant(setting: Setting, method: str) -> list[Pass]:
    """SpinQuant (Liu et al., 2024): R1 and R2 learned as its scripts do.

    Weights are in float meanwhile where GPTQ will round them.
    """
    under = dataclasses.replace(setting, weights=16) if method == "gptq" else setting
    learn = {"under": str(under), "method": "cayley-sgd", "loss": "cross-entropy", "bfloat16": True}
    return _turning(setting, method, learn)


def _dartquant(setting: Setting, method: str) -> list[Pass]:
    """DartQuant (Shao et al., 2025): R1 and R2 each learned from samples of activations, by its Whip loss.

    Its scripts learn an R2 for every key-value head, and this one for every layer; their rate is 1e-3, this
    one's, measured at 576 channels, ten times that.
    """
    return _turning(
        setting, method, {"loss": "whip", "method": "qr-sgd", "schedule": "constant", "clip": None}
    )


def _kurtail(setting: Setting, method: str) -> list[Pass]:
    """KurTail (Akhondzadeh et al., 2025): R1 and R2 each learned from samples, by the kurtosis of tokens."""
    return _turning(setting, method, {"loss": "kurtosis", "method": "cayley-adam"})


def _turning(setting: Setting, method: str, learn: dict[str, Any]) -> list[Pass]:
    """R1 and R2 learned with these options, beside Hadamards at run time."""
    fuse, rotate, insert, fold = _rotated(setting)
    return [fuse, rotate, insert, make_pass({"learn-rotation": learn}), fold, *quantizers(setting, method)]


def _learned(setting: Setting, method: str, rotations: bool = True) -> list[Pass]:
    """Rotations, online factors, scales, clips and gains of norms learned by distillation.

    Scales are OSTQuant's, factors and clips FlatQuant's, scales of rounded weights EfficientQAT's, gains
    those of norm tweaking. Rotations learn under weights in float where GPTQ will round them. Scales trade
    what activations cost against what weights do, from where the two are balanced: where weights are in
    float and 8-bit activations cost nothing, they are left out. Clips of 4-bit activations are searched;
    and when weights are rounded, their own scales and gains of norms are learned too.
    """
    rounding = [_searching(step) for step in quantizers(setting, method)]
    weights = [step for step in rounding if _of_weights(step)]
    rest = [step for step in rounding if not _of_weights(step)]
    under = (rest if method == "gptq" else []) or rounding
    scaling = [InsertScaling(balance=True)] if under is rounding or setting.activations < 8 else []
    insert = InsertHadamard(r3=setting.cache < 16, factors=True)
    steps = [FuseNorm(), *scaling, Rotate(), insert]
    steps += [_learning("learn-rotation", under, method="cayley-sgd")] if rotations else []
    return [*steps, FoldConstants(), *weights, *([_learning("learn-scales", rest)] if weights else []), *rest]


def _scaled(setting: Setting, method: str) -> list[Pass]:
    """As learned, with rotations at random and scales where they are balanced."""
    return _learned(setting, method, rotations=False)


def _searching(step: Pass) -> Pass:
    clipped = isinstance(step, QuantizeActivations) and step.clip < 1
    return dataclasses.replace(step, clip=1.0, clip_search=True) if clipped else step  # type: ignore[call-arg]


def _of_weights(step: Pass) -> bool:
    return isinstance(step, (QuantizeWeights, FoldConstants))


def _learning(name: str, under: Iterable[Pass], **options: Any) -> Pass:
    specs = tuple({step.name: step.options()} for step in under if not isinstance(step, FoldConstants))
    return make_pass({name: {"under": specs, "bfloat16": True, "recompute": True, **options}})


def _lora(setting: Setting, method: str) -> list[Pass]:
    """LoRA (Hu et al., 2021): branches on queries and values, tuned and merged, without rotation."""
    return [*_branches(), FoldConstants(), *quantizers(setting, method)]


def _rolora(setting: Setting, method: str) -> list[Pass]:
    """RoLoRA (Huang et al., 2024): branches tuned after rotation, and merged."""
    return [*_turned(), *_branches(), FoldConstants(), *quantizers(setting, method)]


def _rolora_lbr(setting: Setting, method: str) -> list[Pass]:
    """What RoLoRA is compared with: branches tuned before rotation, and merged."""
    return [*_branches(), *_turned(), FoldConstants(), *quantizers(setting, method)]


def _branches() -> list[Pass]:
    """As RoLoRA's script has them. Nothing is rounded while training."""
    tune = make_pass({"tune-lora": {"validation": 0.1, "bfloat16": True}})
    return [AddLoRA(targets=("queries", "values")), tune, MergeLoRA()]


def _turned() -> list[Pass]:
    """RoLoRA rotates the residual stream and what down projections read (R1, R4)."""
    return [FuseNorm(), Rotate(heads=None), InsertHadamard(r3=False), FoldConstants()]


@dataclass(frozen=True)
class Method:
    """A pipeline at every setting, and how it rounds weights: "rtn" or "gptq" (Frantar et al., 2023)."""

    make: Callable[[Setting, str], list[Pass]]
    rounding: str

    @property
    def about(self) -> str:
        """A line on it."""
        first = (self.make.__doc__ or "").splitlines()[0].removesuffix(".")
        return f"{first}; weights rounded {'by GPTQ' if self.rounding == 'gptq' else 'to nearest'}."

    def passes(self, setting: str) -> list[Pass]:
        """The pipeline at a setting such as "W4A4KV4".

        Raises:
            PassError: it is no setting.
        """
        return self.make(Setting.parse(setting), self.rounding)


_BOTH = {
    "quarot": _quarot,
    "spinquant": _spinquant,
    "dartquant": _dartquant,
    "kurtail": _kurtail,
    "learned": _learned,
    "scaled": _scaled,
    "lora": _lora,
    "rolora": _rolora,
    "rolora-lbr": _rolora_lbr,
}
METHODS = {
    "rtn": Method(_rounded, "rtn"),
    "gptq": Method(_rounded, "gptq"),
    "smoothquant": Method(_smoothquant, "rtn"),
    **{
        name + suffix: Method(make, rounding)
        for name, make in _BOTH.items()
        for suffix, rounding in (("-rtn", "rtn"), ("", "gptq"))
    },
}
"""The methods by name; most with weights rounded by GPTQ, and as `NAME-rtn` to nearest."""
