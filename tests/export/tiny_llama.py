"""Small decoders in canonical form, built from their operators alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import rolora_passes.graphs.operators  # noqa: F401  (defines torch.ops.rolora)
from rolora_passes.graphs.info import set_info
from rolora_passes.numerics import affine
from rolora_passes.numerics.hadamard import few_factors

aten, rolora = torch.ops.aten, torch.ops.rolora


@dataclass(frozen=True)
class Sizes:
    """A LLaMA-like decoder; `weights` and `table` are bits, 32 for plain floating point."""

    layers: int = 2
    hidden: int = 64
    mlp: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocabulary: int = 99
    weights: int = 32
    table: int = 32
    group: int = 32
    rotary_dim: int | None = None
    interleaved: bool = False
    hadamard: bool = False
    factors: bool = False  # of Hadamards: as orthogonal matrices that are parameters
    window: int | None = None
    softcap: float | None = None
    layer_norm: bool = False
    learned_positions: int = 0


class Weight(nn.Module):
    """A matrix [out, in], plain or stored quantized."""

    def __init__(self, rows: int, columns: int, bits: int, group: int) -> None:
        super().__init__()
        weight = torch.randn(rows, columns) / columns**0.5
        self.bits, self.group = bits, group
        if bits == 32:
            self.weight = nn.Parameter(weight)
            return
        scale, zero = affine.choose_qparams(weight, group if bits == 4 else None, bits, bfloat16=bits == 4)
        self.register_buffer("stored", affine.quantize(weight, scale, zero, bits, True))
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        if self.bits == 32:
            return self.weight
        return rolora.dequantize.default(self.stored, self.scale, None, self.bits)


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.table = Weight(s.vocabulary, s.hidden, s.table, s.group)
        self.head = Weight(s.vocabulary, s.hidden, s.weights, s.group)
        if s.learned_positions:
            self.places = nn.Parameter(torch.randn(s.learned_positions, s.hidden))
        self.rotary = s.rotary_dim or s.head_dim
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, self.rotary, 2) / self.rotary))
        for width in (s.head_dim, s.mlp) if s.factors else ():
            for place, factor in enumerate(few_factors(width)):
                random = torch.linalg.qr(torch.randn(len(factor), len(factor)))[0]
                self.register_buffer(f"turn_{width}_{place}", random)
        self.layers = nn.ModuleList(nn.ModuleDict(self._layer()) for _ in range(s.layers))

    def _layer(self) -> dict[str, nn.Module]:
        s = self.sizes
        shapes = {
            "q": (s.heads * s.head_dim, s.hidden),
            "k": (s.kv_heads * s.head_dim, s.hidden),
            "v": (s.kv_heads * s.head_dim, s.hidden),
            "o": (s.hidden, s.heads * s.head_dim),
            "gate": (s.mlp, s.hidden),
            "up": (s.mlp, s.hidden),
            "down": (s.hidden, s.mlp),
        }
        return {name: Weight(*shape, s.weights, s.group) for name, shape in shapes.items()}

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        return aten.linear.default(x, weight())

    def quantize(self, x: Tensor) -> Tensor:
        return x if self.sizes.weights == 32 else rolora.fake_quantize.default(x, 8)

    def turn(self, x: Tensor, width: int) -> Tensor:
        if not self.sizes.factors:
            return rolora.hadamard.default(x, width, -1, 1)
        factors = [getattr(self, f"turn_{width}_{i}") for i in range(len(few_factors(width)))]
        return rolora.kronecker.default(x, factors)

    def norm(self, x: Tensor) -> Tensor:
        if self.sizes.layer_norm:
            return aten.layer_norm.default(x, [self.sizes.hidden], None, None, 1e-5)
        return aten.rms_norm.default(x, [self.sizes.hidden], None, 1e-5)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        s = self.sizes
        x = aten.embedding.default(self.table(), tokens)
        if s.learned_positions:
            x = aten.add.Tensor(x, aten.embedding.default(self.places, positions))
        place = aten.unsqueeze.default(aten.to.dtype(positions, torch.float32), -1)
        angle = aten.mul.Tensor(place, self.frequency)
        twice = aten.repeat_interleave.self_int(angle, 2, -1)
        angle = twice if s.interleaved else aten.cat.default([angle, angle], -1)
        cos, sin = aten.cos.default(angle), aten.sin.default(angle)
        for layer in self.layers:
            x = aten.add.Tensor(x, self.attend(layer, self.quantize(self.norm(x)), cos, sin))
            x = aten.add.Tensor(x, self.mix(layer, self.quantize(self.norm(x))))
        return self.linear(self.quantize(self.norm(x)), self.head)

    def attend(self, layer: nn.ModuleDict, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.sizes
        counts = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        q, k, v = (
            aten.unflatten.int(self.linear(x, layer[name]), -1, [count, s.head_dim])
            for name, count in counts.items()
        )
        q, k = (rolora.rotary_embedding.default(t, cos, sin, s.interleaved) for t in (q, k))
        if s.hadamard:
            q, k = (self.turn(t, s.head_dim) for t in (q, k))
        out = rolora.attention.default(q, k, v, s.head_dim**-0.5, True, s.window, s.softcap)
        return self.linear(self.quantize(aten.flatten.using_ints(out, -2, -1)), layer["o"])

    def mix(self, layer: nn.ModuleDict, x: Tensor) -> Tensor:
        gate, up = (self.linear(x, layer[name]) for name in ("gate", "up"))
        x = aten.mul.Tensor(aten.silu.default(gate), up)
        if self.sizes.hadamard:
            x = self.turn(x, self.sizes.mlp)
        return self.linear(self.quantize(x), layer["down"])


class _Tracer(fx.Tracer):
    """Records operators only, parameters and buffers as get_attr nodes."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def tiny_llama(**sizes: object) -> fx.GraphModule:
    """forward(tokens int64 [B, S], positions int64 [B, S]) -> logits [B, S, V]"""
    torch.manual_seed(0)
    model = Decoder(Sizes(**sizes))  # type: ignore[arg-type]
    graph = fx.GraphModule(model, _Tracer().trace(model))
    set_info(graph, config={"bos_token_id": 1, "eos_token_id": [2, 3], "vocab_size": 99})
    return graph
