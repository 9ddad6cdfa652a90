"""LearnScales: train the scales of rounded weights, and gains of norms, under the quantizers to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from rolora_passes.errors import PassError
from rolora_passes.graphs.devices import device_of
from rolora_passes.graphs.graph import get_tensor, set_tensor, site_names
from rolora_passes.learning.gains import insert_gains, keep_gains
from rolora_passes.numerics.stiefel import Variables
from rolora_passes.passes.base import Calibration, Kind, Report
from rolora_passes.passes.training import Training
from rolora_passes.quantize.quantizers import held, open_scales, stored_scales


@dataclass(frozen=True)
class LearnScales(Training):
    """Train the scale of every output channel, or group, of stored weights; their integers stay.

    Before:                                  After:
        n = rms_norm(x)                          n = mul(rms_norm(x), g)
        y = linear(n, dequantize(q, s))          y = linear(n, dequantize(q, s)), s other numbers

    GPTQ rounds one weight after another for what it reads. Here all scales move together, for what the whole
    graph gives, by distillation from the graph that it was before anything was rounded (as the last phase of
    EfficientQAT, Chen et al., 2024). So do the gains g of norms (norm tweaking, Li et al., 2024), which start
    at one: scales reach the rows of a weight, gains its columns. Scales cost nothing at run time, gains a
    multiplication per channel where the runtime's norm has none of its own. It stands after fold-constants
    has stored the weights, and before activations are quantized, in one list with what rounded the weights.

    Options, beside those of every pass that trains:
        lr: Adam's learning rate of the logarithms of scales and gains.
        gains: whether to give gains to norms whose own were fused. Adapters that are attached later are
            carried past them.

    Raises:
        PassError: no stored scales; what every pass that trains raises.
    """

    kind: ClassVar[Kind] = "trained"
    requires: ClassVar[tuple[str, ...]] = ("canonical", "weights quantized")
    forbids: ClassVar[tuple[str, ...]] = ("activations quantized", "cache quantized")

    under: str | tuple[Any, ...] = "W16A8"
    steps: int = 30
    lr: float = 1e-3
    gains: bool = True

    def optimizers(self, variables: Variables) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(variables.parameters(), self.lr, betas=(0.9, 0.95))]

    def calibrate(self, graph: fx.GraphModule, calibration: Calibration) -> Report:
        self._require(graph)
        sites = stored_scales(graph)
        if not sites:
            raise PassError(
                f"{self.name}: expected weights that are stored on their grids, found none: run "
                "fold-constants after quantize-weights"
            )
        gains = insert_gains(graph) if self.gains else {}
        sites |= gains
        student = self._under(graph, calibration.tokens)
        open_scales(student, sites)
        variables = Variables({}, {name: get_tensor(student, name) for name in sites}, "cayley-adam")
        teacher = None if self.loss == "cross-entropy" else self._reference(calibration)
        notes = self._train(graph, student, teacher, variables, calibration)
        for name, value in zip(variables.names, variables(), strict=True):
            set_tensor(graph, name, held(value.detach().exp()).to(device_of(graph)))
        keep_gains(graph, gains)
        names = site_names(graph)
        changed = [
            f"{names[node]}: {'gain of the input' if name in gains else 'scales'}"
            for name, nodes in sites.items()
            for node in nodes
        ]
        return Report(changed=changed, notes=notes)
