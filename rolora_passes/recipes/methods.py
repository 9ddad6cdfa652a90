"""The pipelines of the methods that papers compare, at settings such as W4A4KV4."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from rolora_passes.errors import PassError
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


def _spinquant(setting: Setting, method: str) -> list[Pass]:
    """Rotations learned as SpinQuant's scripts do, with weights in float where GPTQ will round them."""
    under = dataclasses.replace(setting, weights=16) if method == "gptq" else setting
    learn = {"under": str(under), "method": "cayley-sgd", "loss": "cross-entropy", "bfloat16": True}
    fuse, rotate, insert, fold = _rotated(setting)
    return [fuse, rotate, insert, make_pass({"learn-rotation": learn}), fold, *quantizers(setting, method)]


def _learned(setting: Setting, method: str, rotations: bool = True) -> list[Pass]:
    """Rotations, the factors of online transforms and scales, learned together by distillation; or without
    that, rotations at random and scales where they are balanced.

    Rotations learn under weights in float where GPTQ will round them. Scales trade what activations cost
    against what weights do, from where the two are balanced: where weights are in float and 8-bit activations
    cost nothing, they are left out. Clips of 4-bit activations are searched; and when weights are rounded,
    their own scales and gains of norms are learned too.
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


def _searching(step: Pass) -> Pass:
    clipped = isinstance(step, QuantizeActivations) and step.clip < 1
    return dataclasses.replace(step, clip=1.0, clip_search=True) if clipped else step  # type: ignore[call-arg]


def _of_weights(step: Pass) -> bool:
    return isinstance(step, (QuantizeWeights, FoldConstants))


def _learning(name: str, under: Iterable[Pass], **options: Any) -> Pass:
    specs = tuple({step.name: step.options()} for step in under if not isinstance(step, FoldConstants))
    return make_pass({name: {"under": specs, "bfloat16": True, **options}})


def _lora(setting: Setting, method: str, order: str) -> list[Pass]:
    """LoRA on queries and values as RoLoRA's script has it, trained before or after rotation, or without.

    RoLoRA rotates the residual stream and what down projections read (R1, R4). Nothing is rounded while
    training.
    """
    tune = make_pass({"tune-lora": {"validation": 0.1, "bfloat16": True}})
    train = [AddLoRA(targets=("queries", "values")), tune, MergeLoRA()]
    turn = [FuseNorm(), Rotate(heads=None), InsertHadamard(r3=False), FoldConstants()]
    steps = {"after": [*turn, *train], "before": [*train, *turn], "without": train}[order]
    return [*steps, FoldConstants(), *quantizers(setting, method)]


METHODS: dict[str, Callable[[Setting], Iterable[Pass]]] = {
    "rtn": lambda s: quantizers(s, "rtn"),
    "gptq": lambda s: quantizers(s, "gptq"),
    "smoothquant": lambda s: [ObserveActivations(per="channel"), SmoothQuant(), *quantizers(s, "rtn")],
    "quarot-rtn": lambda s: [*_rotated(s), *quantizers(s, "rtn")],
    "quarot": lambda s: [*_rotated(s), *quantizers(s, "gptq")],
    "spinquant-rtn": lambda s: _spinquant(s, "rtn"),
    "spinquant": lambda s: _spinquant(s, "gptq"),
    "learned-rtn": lambda s: _learned(s, "rtn"),
    "learned": lambda s: _learned(s, "gptq"),
    "scaled-rtn": lambda s: _learned(s, "rtn", rotations=False),
    "scaled": lambda s: _learned(s, "gptq", rotations=False),
    "lora-rtn": lambda s: _lora(s, "rtn", "without"),
    "lora": lambda s: _lora(s, "gptq", "without"),
    "rolora-rtn": lambda s: _lora(s, "rtn", "after"),
    "rolora": lambda s: _lora(s, "gptq", "after"),
    "rolora-lbr-rtn": lambda s: _lora(s, "rtn", "before"),
    "rolora-lbr": lambda s: _lora(s, "gptq", "before"),
}
"""What each method does before the quantizers, and how it rounds weights.

rtn: nothing, to nearest. gptq (Frantar et al., 2023). smoothquant (Xiao et al., 2023): scaling, to nearest.
quarot (Ashkboos et al., 2024): randomised Hadamards, GPTQ; its heads' matrices are folded, as SpinQuant's
R2, where QuaRot has one more Hadamard at run time. quarot-rtn: the same, rounded to nearest. spinquant
(Liu et al., 2024): R1 and R2 learned. learned: also scales (OSTQuant), online factors and clips (FlatQuant),
scales of rounded weights (EfficientQAT) and gains of norms (norm tweaking). scaled: the same, rotations at
random. lora (Hu et al., 2021): branches tuned and merged. rolora (Huang et al., 2024): the same after
rotation; rolora-lbr: before it.
"""


def method_passes(name: str) -> list[Pass]:
    """The pipeline of `method:setting`, such as `quarot:W4A4KV4`.

    Raises:
        PassError: no such method, or not a setting.
    """
    method, _, setting = name.partition(":")
    if method not in METHODS:
        raise PassError(f"expected one of {', '.join(METHODS)} before the colon, found {name!r}")
    return list(METHODS[method](Setting.parse(setting)))
