"""Which model a graph was captured from, by a sample of its weights: names of folders do not count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from rolora_passes.graphs.graph import get_tensor, parameters
from rolora_passes.graphs.info import info, set_info
from rolora_passes.ondisk import rest

_SAMPLE = 64


def remember_weights(
    graph: fx.GraphModule, state: Mapping[str, Tensor], stored: Mapping[int, Tensor] | None = None
) -> None:
    """Keep a hash of every weight of a graph that was captured just now, and what else a tied weight
    is called in the model's state: `weights` and `tied` of its record.

    Args:
        stored: what parameters hold, by `id`, that have no values themselves.
    """
    found = {n: v for n, v in parameters(graph).items() if isinstance(v, torch.nn.Parameter)}
    names = {id(value): name for name, value in found.items()}
    called = {n.removeprefix("model."): names[id(v)] for n, v in state.items() if id(v) in names}
    set_info(
        graph,
        weights={name: fingerprint((stored or {}).get(id(v), v)) for name, v in found.items()},
        tied={other: name for other, name in called.items() if other != name},
    )


def base_hash(graph: fx.GraphModule) -> str | None:
    """A name for the model's weights, whatever passes did since; None if the graph does not know them.

    It is equal for a checkpoint that was loaded in float32 and in bfloat16.
    """
    known = info(graph).weights
    return hashlib.sha256(json.dumps(sorted(known.items())).encode()).hexdigest()[:16] if known else None


def is_original(graph: fx.GraphModule, name: str, copy: str | None = None) -> bool:
    """Whether a parameter, or what was made of it, still has the values that were captured."""
    known = info(graph).weights.get(name)
    return known is not None and known == fingerprint(get_tensor(graph, copy or name))


class Untouched:
    """What a graph's tensors hold now, to tell later whether anybody wrote into them.

    Told by torch's own count of writes, which `tensor.data` passes by, and by a sample of the values.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._kept = {n: (v, _writes(v), _sampled(v).clone()) for n, v in parameters(graph).items()}

    def written(self) -> list[str]:
        """The names of tensors that hold something else now."""
        return [
            name
            for name, (value, writes, values) in self._kept.items()
            if _writes(value) != writes or not _same(_sampled(value), values)
        ]


def _writes(value: Tensor) -> int:
    return 0 if value.is_inference() else int(value._version)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether values are equal; NaN is equal to NaN here."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _sampled(value: Tensor) -> Tensor:
    """Up to 64 of a tensor's values, evenly spaced."""
    if not value.numel() or value.is_meta:
        return torch.empty(0)
    count = min(_SAMPLE, value.numel())
    places = torch.arange(count, device=value.device) * (value.numel() - 1) // max(1, count - 1)
    found = value.detach().reshape(-1)[places]
    rest(value)
    return found


def fingerprint(value: Tensor) -> str:
    """A hash of a tensor's shape and of up to 64 of its values, evenly spaced and rounded to bfloat16."""
    digest = hashlib.sha256(json.dumps(list(value.shape)).encode())
    if value.numel() and not value.is_meta:
        digest.update(_sampled(value).to(torch.bfloat16).cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
