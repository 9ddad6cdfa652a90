"""Building one XNNPACK delegate: values, constants and nodes in ExecuTorch's own serialised form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from torch import Tensor

from rolora_passes.export.executorch.xnnpack.held import Held
from rolora_passes.numerics.packing import pack_nibbles

Shape = tuple[int | None, ...]

# XNNPACK asks for sizes when a value is defined and propagates the true ones at every call.
_PLACEHOLDER_LENGTH = 1


class Delegate:
    """One XNNPACK subgraph under construction.

    Values are numbers. Every method that computes returns the number of its result, whose sizes are
    given by the caller (None: the sequence length, known when the delegate runs).
    """

    def __init__(self) -> None:
        self.shapes: list[Shape] = []
        self._values: list[Any] = []
        self._nodes: list[Any] = []
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._constants = [schema.ConstantDataOffset(0, 0)]
        self._data = NamedDataStore()
        self._known: dict[str, int] = {}

    def input(self, shape: Shape) -> int:
        """A value passed to the delegate; values are passed in the order of these calls."""
        return self._tensor(shape, external=True, flags=XNN_VALUE_FLAG_EXTERNAL_INPUT)

    def mark_outputs(self, values: Sequence[int]) -> None:
        """State what the delegate returns, in order, after all its inputs."""
        for value in values:
            if getattr(self._values[value].xvalue_union, "flags", 0):  # an input, or returned twice
                value = self.node("Copy", self.shapes[value], input_id=value)
            tensor = self._values[value].xvalue_union
            tensor.external_id = len(self._inputs) + len(self._outputs)
            tensor.flags = XNN_VALUE_FLAG_EXTERNAL_OUTPUT
            self._outputs.append(value)

    def node(self, kind: str, shape: Shape, minimum: float | None = None, **fields: Any) -> int:
        """Add a node of the schema's class XNN<kind> with a float32 result of this shape."""
        result = self._tensor(shape)
        self._append(kind, result, minimum, **fields)
        return result

    def quantize_rows(self, value: int) -> int:
        """Dynamic int8, asymmetric, one scale and zero point for each row of the last axis."""
        per_row = schema.PerTokenDynamicQuant(num_nonbatch_dims=1)
        result = self._tensor(self.shapes[value], schema.XNNDatatype.xnn_datatype_qdint8, quant=per_row)
        self._append("Convert", result, None, input_id=value)
        return result

    def reshape(self, value: int, shape: Shape) -> int:
        """At most one size None, which XNNPACK infers."""
        sizes = [0 if d is None else d for d in shape]
        return self.node("StaticReshape", shape, num_dims=len(sizes), new_shape=sizes, input_id=value)

    def permute(self, value: int, order: Sequence[int]) -> int:
        shape = tuple(self.shapes[value][d] for d in order)
        return self.node("StaticTranspose", shape, num_dims=len(shape), perm=list(order), input_id=value)

    def linear(self, value: int, weight: int, bias: int | None = None) -> int:
        """x [.., in], weight [out, in], bias [out] -> [.., out]."""
        return self.node(
            "FullyConnected",
            (*self.shapes[value][:-1], self.shapes[weight][0]),
            input1_id=value,
            filter_id=weight,
            bias_id=XNN_INVALID_VALUE_ID if bias is None else bias,
        )

    def matmul(self, left: int, right: int, shape: Shape) -> int:
        """Products of the last two axes, batch by batch; `shape` is the result's."""
        return self.node("BatchMatrixMultiply", shape, input1_id=left, input2_id=right)

    def constant(self, tensor: Tensor) -> int:
        """A float32 constant; equal constants are one value."""
        return self._constant(tensor.detach().float().contiguous(), tuple(tensor.shape))

    def channel_weight(self, weight: Tensor, scale: Tensor, bits: int) -> int:
        """int8 [out, in] with one float32 scale for each row: the kernels' qc8w, or qc4w if bits is 4."""
        datatypes = schema.XNNDatatype
        kind = datatypes.xnn_datatype_qcint4 if bits == 4 else datatypes.xnn_datatype_qcint8
        count = scale.numel()
        buffer = self._store(scale.detach().float().contiguous())
        quant = schema.PerChannelQuant([], channel_dim=0, scale_buffer_idx=buffer, num_scales=count)
        stored = _nibbles(weight) if bits == 4 else weight.contiguous()
        return self._constant(stored, tuple(weight.shape), kind, quant)

    def group_weight(self, weight: Tensor, scale: Tensor, group_size: int) -> int:
        """int8 [out, in] in [-8, 7], scales [out, in / group_size] kept as bfloat16: the kernels' qb4w."""
        buffer = self._store(scale.detach().to(torch.bfloat16).contiguous())
        quant = schema.PerChannelGroupQuant(
            [], channel_dim=0, group_size=group_size, scale_buffer_idx=buffer, num_scales=scale.numel()
        )
        datatype = schema.XNNDatatype.xnn_datatype_qbint4
        return self._constant(_nibbles(weight), tuple(weight.shape), datatype, quant)

    def finish(self) -> tuple[bytes, NamedDataStoreOutput]:
        """The delegate's blob, and its constants by name."""
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=self._inputs,
            output_ids=self._outputs,
            constant_data=self._constants,
        )
        return serialize_xnnpack_binary(graph, bytearray()), self._data.get_named_data_store_output()

    def _append(self, kind: str, result: int, minimum: float | None, **fields: Any) -> None:
        union = getattr(schema, f"XNN{kind}")(output_id=result, flags=0, **fields)
        limits = None if minimum is None else schema.OutputMinMax(minimum, "+inf")
        self._nodes.append(schema.XNode(union, debug_handle=len(self._nodes), output_min_max=limits))

    def _tensor(
        self,
        shape: Shape,
        datatype: Any = schema.XNNDatatype.xnn_datatype_fp32,
        buffer: int = 0,
        quant: Any = None,
        external: bool = False,
        flags: int = 0,
    ) -> int:
        number = len(self._values)
        dims = [_PLACEHOLDER_LENGTH if d is None else d for d in shape] or [1]
        tensor = schema.XNNTensorValue(
            datatype=datatype,
            num_dims=len(dims),
            dims=dims,
            constant_buffer_idx=buffer,
            external_id=len(self._inputs) if external else XNN_INVALID_VALUE_ID,
            flags=flags,
            id_out=number,
        )
        if external:
            self._inputs.append(number)
        union = tensor if quant is None else schema.XNNQuantizedTensorValue(tensor, quant)
        self._values.append(schema.XValue(union))
        self.shapes.append(shape)
        return number

    def _constant(
        self,
        stored: Tensor,
        shape: tuple[int, ...],
        datatype: Any = schema.XNNDatatype.xnn_datatype_fp32,
        quant: Any = None,
    ) -> int:
        buffer = self._store(stored)
        key = f"{self._constants[buffer].named_key} {shape} {datatype} {quant}"
        if key not in self._known:
            self._known[key] = self._tensor(shape, datatype, buffer, quant)
        return self._known[key]

    def _store(self, tensor: Tensor) -> int:
        """Keep a tensor's bytes under their hash, so that delegates share what is equal."""
        data = Held(tensor)
        key = data.sha256().hex()
        for index, entry in enumerate(self._constants):
            if entry.named_key == key:
                return index
        self._constants.append(schema.ConstantDataOffset(UINT64_MAX, len(data), key))
        self._data.add_named_data(key, data, CONSTANT_TENSOR_ALIGNMENT)
        return len(self._constants) - 1


def _nibbles(weight: Tensor) -> Tensor:
    """int8 [out, in] in [-8, 7] -> uint8 [out, ceil(in / 2)]: value + 8, even columns in the low nibbles."""
    return pack_nibbles(weight).bitwise_xor_(0x88)
