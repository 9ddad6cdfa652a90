"""Capturing a model whose weights lie in files, where its graph reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rolora_passes.graphs.capture.precision import widened
from rolora_passes.graphs.graph import aten, first_compute, get_tensor, set_tensor
from rolora_passes.ondisk import is_on_disk, kept, on_disk, rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Elements that are cast once, and not each time that they are read: gains, biases.
_FEW = 1 << 16
_BLOCK = 1 << 18  # elements of a matrix that are cast at a time: they stay in a core's cache


def stored_for(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """What a model's parameters hold, by the parameter's `id`, in a type that its own holds.

    Weights of a wider type than the model's are rounded here, once, and not by whoever reads them.
    """
    held, found = dict(model.named_parameters()), dict[int, Tensor]()
    for name, value in weights.items():
        own = held[name].dtype
        found[id(held[name])] = value
        if torch.promote_types(value.dtype, own) != own:
            found[id(held[name])] = kept(value.to(own))
            rest(value)
    return found


def put_stored(graph: fx.GraphModule, stored: Mapping[int, Tensor]) -> None:
    """Put stored weights in the place of a graph's parameters, with a cast behind those of a narrower type.

    Args:
        stored: by the parameter's `id`.
    """
    first = first_compute(graph)  # casts stand before it in the order of what they cast
    for node in graph.graph.find_nodes(op="get_attr"):
        hollow = get_tensor(graph, str(node.target))
        if id(hollow) not in stored:
            continue
        value = stored[id(hollow)]
        if value.dtype != hollow.dtype and value.numel() <= _FEW:
            value = value.to(hollow.dtype)
        parameter = torch.nn.Parameter(value, requires_grad=False)
        set_tensor(graph, str(node.target), on_disk(parameter) if is_on_disk(value) else parameter)
        if value.dtype != hollow.dtype:
            with graph.graph.inserting_before(first):
                cast = graph.graph.call_function(aten.to.dtype, (node, hollow.dtype))
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    graph.recompile()


class Reading(TorchFunctionMode):
    """Within it, every operator that is given a hollow parameter has its stored values, in its type.

    They are read for that call, and kept no longer; matrices of linears and tables in parts.

    Args:
        stored: by the parameter's `id`.
        wide: give every operator its values and types of half precision in float32.
    """

    def __init__(self, stored: Mapping[int, Tensor], wide: bool = False) -> None:
        super().__init__()
        self.stored, self.wide = stored, wide

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in ("__get__", "__set__"):  # x.dtype, x.shape: nothing is computed
            return func(*args, **kwargs)
        used = [v for v in _tensors((args, kwargs)) if id(v) in self.stored]
        if func is F.linear and not kwargs and id(args[1]) in self.stored:
            return self._linear(*args)
        if func is F.embedding and id(args[1]) in self.stored:
            rows, numbers = args[0].unique(return_inverse=True)
            part = self._in_type(self.stored[id(args[1])][rows], args[1])
            rest(self.stored[id(args[1])])
            return part[numbers]
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._value)
        result = func(*args, **kwargs)
        for value in used:
            rest(self.stored[id(value)])
        return result

    def _value(self, value: Any) -> Any:
        if id(value) in self.stored:
            return self._in_type(self.stored[id(value)], value)
        return widened(value) if self.wide else value

    def _in_type(self, values: Tensor, hollow: Tensor) -> Tensor:
        return values.to(widened(hollow.dtype) if self.wide else hollow.dtype)

    def _linear(self, x: Tensor, hollow: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, x, bias = self.stored[id(hollow)], self._value(x), self._value(bias)
        result = x.new_empty(*x.shape[:-1], len(weight))
        step = max(1, _BLOCK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            shift = None if bias is None else bias[rows]
            result[..., rows] = F.linear(x, self._in_type(weight[rows], hollow), shift)
            rest(weight, weight[rows])
        rest(weight)  # a block reads pages of its neighbours
        return result


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda v: found.append(v) if isinstance(v, Tensor) else None)
    return found
