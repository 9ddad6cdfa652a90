"""Random graphs over the operators of the rule table and over operators no rule knows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

import torch
from torch import Tensor, fx

import rolora_passes.graphs.operators  # noqa: F401  (defines torch.ops.rolora)
from rolora_passes.graphs.graph import finish, set_tensor

aten, rolora = torch.ops.aten, torch.ops.rolora
BATCH, LENGTH, VOCABULARY = 5, 7, 11  # no static axis has these sizes
SIZES = (1, 2, 3, 4, 6, 8, 12)
LARGEST, MOST = 1e4, 6000

_library = torch.library.Library("fuzz", "DEF")
for _name, _function in {
    "first_doubled": lambda x: torch.cat((2 * x[..., :1], x[..., 1:]), -1),
    "neg": lambda x: x.roll(1, -1),  # a name that a rule knows, in another namespace
    "mul": lambda x: x * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device),
}.items():
    _library.define(f"{_name}(Tensor x) -> Tensor")
    _library.impl(_name, _function, "CompositeImplicitAutograd")


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


class Impossible(Exception):
    """The operator that was drawn does not fit any value at hand."""


class Builder:
    """Grows a graph one operator at a time, evaluating as it goes: what is not finite is not kept."""

    def __init__(self, choose: Random) -> None:
        self.choose = choose
        self.random = torch.Generator().manual_seed(choose.randrange(2**31))
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.graph = self.module.graph
        self.values: dict[fx.Node, Any] = {}
        self.pool: list[fx.Node] = []
        self.params: list[fx.Node] = []
        self.used: list[str] = []
        self.tokens = self._input("tokens", tokens())
        self.positions = self._input("positions", torch.arange(LENGTH).expand(BATCH, LENGTH))

    # Pieces.

    def _input(self, name: str, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        self.values[node] = value
        return node

    def size(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.values[node].shape)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        real = fx.node.map_arg((args, kwargs), lambda n: self.values[n])
        try:
            value = target(*real[0], **real[1])
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise Impossible(str(error)) from error
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if part.numel() > MOST or part.numel() == 0:
                raise Impossible("too large or empty")
            if part.is_floating_point() and not bool((part.abs() < LARGEST).all()):
                raise Impossible("not finite")
        node = self.graph.call_function(target, args, kwargs)
        self.values[node] = value
        return node

    def tensor(self, value: Tensor) -> fx.Node:
        name = f"layers.p{len(self.params)}.weight"
        set_tensor(self.module, name, value)
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self.values[node] = value
        return node

    def param(self, *shape: int) -> fx.Node:
        """A parameter: a new one, one that something reads already (tied), or an expression over one."""
        same = [p for p in self.params if self.size(p) == shape and self.values[p].is_floating_point()]
        turned = [p for p in self.params if len(shape) == 2 and self.size(p) == shape[::-1]]
        kind = self.choose.random()
        if same and kind < 0.25:
            found = self.choose.choice(same)
        elif turned and kind < 0.35:
            found = self.call(aten.t.default, self.choose.choice(turned))
        else:
            scale = max(1, shape[-1] if shape else 1) ** -0.5
            found = self.tensor(torch.randn(shape, generator=self.random, dtype=torch.float64) * scale)
            self.params.append(found)
        if shape and self.choose.random() < 0.1:
            found = self.call(aten.cumsum.default, found, 0)
        return found

    def any(self, wanted: Callable[[tuple[int, ...]], bool] = lambda shape: True) -> fx.Node:
        """A value that fits; recent ones more often."""
        fitting = [n for n in self.pool if wanted(self.size(n))]
        if not fitting:
            raise Impossible("no value fits")
        return self.choose.choice(fitting[-4:] if self.choose.random() < 0.7 else fitting)

    def dim(self, node: fx.Node, static: bool = False) -> int:
        """An axis, counted from either end; static: neither batch nor length is part of it."""
        shape = self.size(node)
        fitting = [d for d, s in enumerate(shape) if not static or s in SIZES or (s % 5 and s % 7)]
        if not fitting:
            raise Impossible("no static axis")
        return self.choose.choice(fitting) - self.choose.choice((0, len(shape)))

    def other(self, x: fx.Node) -> Any:
        """A second operand that broadcasts against x."""
        shape = self.size(x)
        same = [n for n in self.pool if self.size(n) == shape]
        kind = self.choose.randrange(8)
        if kind < 3 and same:
            return self.choose.choice(same)
        if kind == 3:
            return self.choose.choice((0.7, -1.3, 2))
        if kind == 4:
            return self.param()
        static = [s for s in shape if s in SIZES]
        rank = self.choose.randint(1, max(1, len(static)))
        tail = [s if s in SIZES and self.choose.random() < 0.8 else 1 for s in shape[-rank:]]
        return self.param(*tail)

    # Growing.

    def start(self) -> None:
        for _ in range(self.choose.randint(1, 2)):
            table = self.param(VOCABULARY, self.choose.choice(SIZES[1:]))
            self.pool.append(self.call(aten.embedding.default, table, self.tokens))

    def grow(self, name: str) -> None:
        try:
            found = OPERATORS[name](self)
        except (Impossible, IndexError):  # nothing to choose from
            return
        self.used.append(name)
        for node in found if isinstance(found, list) else [found]:
            if isinstance(self.values[node], Tensor) and self.values[node].is_floating_point():
                self.pool.append(node)

    def finish(self) -> fx.GraphModule:
        """Read every value that nothing reads yet, through a linear or as it is, and return their sum."""
        unread = [n for n in self.pool if not n.users] or self.pool[-1:]
        parts = [self._read(n) for n in unread[-5:]]
        self.graph.output(self.call(aten.cat.default, parts))
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        first = next(iter(self.graph.nodes))
        for node in [n for n in self.graph.nodes if n.op == "get_attr"] + inputs:
            if node is not first:
                first.prepend(node)
        for node in inputs:
            next(n for n in self.graph.nodes if n.op == "call_function").prepend(node)
        return finish(self.module)

    def _read(self, node: fx.Node) -> fx.Node:
        """A vector of what a value holds, with no sign or scale hidden."""
        shape = self.size(node)
        try:
            if shape and shape[-1] in SIZES:
                node = self.call(aten.linear.default, node, self.param(2, shape[-1]))
            node = self.call(aten.silu.default, node)
            if len(shape) > 1:
                node = self.call(aten.sum.dim_IntList, node, list(range(len(shape) - 1)))
        except Impossible:
            pass
        return self.call(aten.flatten.using_ints, node)


def random_graph(seed: int, length: int) -> tuple[fx.GraphModule, list[str]]:
    """A graph of about `length` operators drawn by `seed`, and the operators' names."""
    builder = Builder(Random(seed))
    builder.start()
    for _ in range(length):
        kind = builder.choose.choices((KEEPING, OTHERS, UNKNOWN), (20, 5, 1))[0]
        builder.grow(builder.choose.choice(kind))
    return builder.finish(), builder.used


def _static(shape: tuple[int, ...]) -> bool:
    return bool(shape) and shape[-1] in SIZES


def _linear(b: Builder) -> fx.Node:
    x = b.any(_static)
    width, out = b.size(x)[-1], b.choose.choice(SIZES[1:])
    bias = b.choose.choice(("none", "none", "own", "one"))
    if bias == "none":
        return b.call(aten.linear.default, x, b.param(out, width))
    return b.call(aten.linear.default, x, b.param(out, width), b.param(out if bias == "own" else 1))


def _matmul(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) >= 2 and s[-1] in SIZES)
    inner, kind = b.size(x)[-1], b.choose.randrange(4)
    if kind == 0:
        y = b.call(aten.transpose.int, b.any(lambda s: len(s) >= 2 and s[-1] == inner), -1, -2)
    elif kind == 1:
        y = b.any(lambda s: len(s) >= 2 and s[-2] == inner)
    elif kind == 2:
        batch = [s for s in b.size(x)[-3:-2] if s in SIZES]
        y = b.param(*batch, inner, b.choose.choice(SIZES[1:]))
    else:
        y = b.param(inner, b.choose.choice(SIZES[1:]))
    return b.call(aten.matmul.default, x, y)


def _bmm(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) == 3)
    width = b.size(x)[-1]
    y = b.call(aten.transpose.int, b.any(lambda s: len(s) == 3 and s[-1] == width), 1, 2)
    return b.call(aten.bmm.default, x, y)


def _mm(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) == 2 and s[-1] in SIZES)
    return b.call(aten.mm.default, x, b.param(b.size(x)[-1], b.choose.choice(SIZES[1:])))


def _binary(target: Any) -> Callable[[Builder], fx.Node]:
    def grow(b: Builder) -> fx.Node:
        x = b.any()
        y = b.other(x)
        swapped = isinstance(y, fx.Node) and b.choose.random() < 0.5
        return b.call(target, *((y, x) if swapped else (x, y)))

    return grow


def _unary(target: Any, *rest: Any, **kwargs: Any) -> Callable[[Builder], fx.Node]:
    return lambda b: b.call(target, b.any(), *rest, **kwargs)


def _along(target: Any, *rest: Any, static: bool = False) -> Callable[[Builder], fx.Node]:
    def grow(b: Builder) -> fx.Node:
        x = b.any(lambda s: len(s) > 0)
        return b.call(target, x, b.dim(x, static), *rest)

    return grow


def _rms_norm(b: Builder) -> fx.Node:
    x = b.any(_static)
    width = b.size(x)[-1]
    weight = b.param(width) if b.choose.random() < 0.15 else None
    return b.call(aten.rms_norm.default, x, [width], weight, 1e-3)


def _layer_norm(b: Builder) -> fx.Node:
    x = b.any(lambda s: _static(s) and s[-1] > 1)
    return b.call(aten.layer_norm.default, x, [b.size(x)[-1]], None, None, 1e-2)


def _embedding(b: Builder) -> fx.Node:
    numbers = b.tokens
    if b.choose.random() < 0.3:
        numbers = b.tensor(torch.randint(0, VOCABULARY, (b.choose.choice(SIZES),), generator=b.random))
        b.params.append(numbers)
    return b.call(aten.embedding.default, b.param(VOCABULARY, b.choose.choice(SIZES[1:])), numbers)


def _heads(b: Builder, width: int | None = None) -> fx.Node:
    """A value [B, S, H, D]."""
    ready = [n for n in b.pool if len(b.size(n)) == 4 and b.size(n)[:2] == (BATCH, LENGTH)]
    if ready and b.choose.random() < 0.3:
        found = b.choose.choice(ready)
        if width in (None, b.size(found)[-1]):
            return found
    x = b.any(lambda s: len(s) == 3 and s[:2] == (BATCH, LENGTH) and s[-1] in SIZES)
    heads, width = b.choose.choice((1, 2)), width or b.choose.choice((2, 4, 6))
    x = b.call(aten.linear.default, x, b.param(heads * width, b.size(x)[-1]))
    return b.call(aten.unflatten.int, x, -1, [heads, width])


def _attention(b: Builder) -> list[fx.Node]:
    query = _heads(b)
    key, value = _heads(b, b.size(query)[-1]), _heads(b)
    if b.choose.random() < 0.2:
        value = key
    if b.size(key)[2] != b.size(value)[2] or b.size(query)[2] % b.size(key)[2]:
        raise Impossible("heads")
    options = b.choose.choice(((), (True, 3), (True, None, 5.0)))
    out = b.call(rolora.attention.default, query, key, value, 0.5, *options)
    return [out, b.call(aten.flatten.using_ints, out, -2, -1)]


def _rotary(b: Builder) -> fx.Node:
    x = _heads(b)
    width = b.choose.choice([w for w in (2, 4, 6) if w <= b.size(x)[-1]])
    steps = b.call(aten.to.dtype, b.call(aten.unsqueeze.default, b.positions, 2), torch.float64)
    angles = b.call(aten.mul.Tensor, steps, b.param(width))
    tables = b.call(aten.cos.default, angles), b.call(aten.sin.default, angles)
    return b.call(rolora.rotary_embedding.default, x, *tables, b.choose.random() < 0.5)


def _unflatten(b: Builder) -> fx.Node:
    x = b.any()
    dim = b.dim(x, static=True)
    size = b.size(x)[dim]
    outer = b.choose.choice([d for d in range(1, size + 1) if size % d == 0])
    return b.call(aten.unflatten.int, x, dim, [outer, size // outer])


def _flatten(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) >= 2)
    start = b.choose.randrange(len(b.size(x)) - 1)
    return b.call(aten.flatten.using_ints, x, start, b.choose.choice((start + 1, -1)))


def _view(b: Builder) -> fx.Node:
    """The static axes dealt out anew."""
    x = b.any()
    lead = len([s for s in b.size(x) if s % 5 == 0 or s % 7 == 0])
    shape = b.size(x)
    if any(s % 5 == 0 or s % 7 == 0 for s in shape[lead:]):
        raise Impossible("batch or length inside")
    rest = prod(shape[lead:])
    first = b.choose.choice([d for d in range(1, rest + 1) if rest % d == 0])
    target = b.choose.choice((aten.reshape.default, aten.view.default))
    sizes = [first, rest // first] if lead == 0 else [-1, first, rest // first]
    return b.call(target, x, sizes)


def _expand(b: Builder) -> fx.Node:
    x = b.any()
    if b.choose.random() < 0.5 and 1 in b.size(x):
        return b.call(aten.expand.default, x, [b.choose.choice((2, 3)) if s == 1 else -1 for s in b.size(x)])
    return b.call(aten.expand.default, x, [b.choose.choice((2, 3)), *[-1] * len(b.size(x))])


def _unsqueeze(b: Builder) -> fx.Node:
    x = b.any()
    rank = len(b.size(x))
    return b.call(aten.unsqueeze.default, x, b.choose.randint(-rank - 1, rank))


def _transpose(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) > 1)
    first, second = b.dim(x), b.dim(x)
    if b.choose.random() < 0.1:
        return b.call(aten.transpose.int, x, dim0=first, dim1=second)
    return b.call(b.choose.choice((aten.transpose.int, aten.swapaxes.default)), x, first, second)


def _permute(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) > 1)
    dims = list(range(len(b.size(x))))
    b.choose.shuffle(dims)
    return b.call(aten.permute.default, x, dims)


def _slice(b: Builder) -> fx.Node:
    x = b.any()
    dim = b.dim(x, static=True)
    size = b.size(x)[dim]
    start = b.choose.choice((0, 0, b.choose.randrange(size)))
    end = b.choose.choice((size, size, 2**63 - 1, b.choose.randint(start + 1, size)))
    return b.call(aten.slice.Tensor, x, dim, start, end, b.choose.choice((1, 1, 1, 2)))


def _parts(b: Builder) -> list[fx.Node]:
    x = b.any()
    dim = b.dim(x, static=True)
    size = b.size(x)[dim]
    target, how = b.choose.choice(
        ((aten.chunk.default, b.choose.choice((1, 2, 3))), (aten.split.Tensor, b.choose.randint(1, size)))
    )
    if b.choose.random() < 0.3 and size > 1:
        target, how = aten.split_with_sizes.default, [1, size - 1]
    whole = b.call(target, x, how, dim)
    return [b.call(operator.getitem, whole, i) for i in range(min(2, len(b.values[whole])))]


def _select(b: Builder) -> fx.Node:
    x = b.any()
    dim = b.dim(x, static=True)
    return b.call(aten.select.int, x, dim, b.choose.randrange(b.size(x)[dim]))


def _numbers(b: Builder, size: int, *shape: int) -> fx.Node:
    node = b.tensor(torch.randint(0, size, shape, generator=b.random))
    b.params.append(node)
    return node


def _index(b: Builder) -> fx.Node:
    x = b.any()
    dim = b.dim(x, static=True) % len(b.size(x))
    numbers = _numbers(b, b.size(x)[dim], b.choose.choice(SIZES[1:4]))
    if b.choose.random() < 0.4:
        return b.call(aten.index_select.default, x, dim - b.choose.choice((0, len(b.size(x)))), numbers)
    return b.call(aten.index.Tensor, x, [*[None] * dim, numbers])


def _index_put(b: Builder) -> fx.Node:
    """Rows replaced; by a table of numbers, or by a mask over one or two axes."""
    x = b.call(
        aten.embedding.default, b.param(VOCABULARY, b.choose.choice((2, 4))), _numbers(b, VOCABULARY, 3, 2)
    )
    if b.choose.random() < 0.5:
        x = b.call(aten.silu.default, b.call(aten.permute.default, x, [2, 0, 1]))
    shape = b.size(x)
    if b.choose.random() < 0.5:
        numbers = _numbers(b, shape[0], 2)
        return b.call(aten.index_put.default, x, [numbers], b.param(2, *shape[1:]))
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    mask.view(-1)[: shape[1]] = True
    node = b.tensor(mask)
    b.params.append(node)
    return b.call(aten.index_put.default, x, [node], b.param(shape[1], *shape[2:]))


def _cat(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) > 0)
    y = b.any(lambda s: s == b.size(x))
    if b.choose.random() < 0.4:
        return b.call(aten.stack.default, [x, y], b.choose.randint(-1, len(b.size(x))))
    return b.call(aten.cat.default, [x, y], b.dim(x, static=True))


def _reduce(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) > 0)
    target = b.choose.choice((aten.sum.dim_IntList, aten.mean.dim))
    dims = b.choose.choice(([b.dim(x)], [b.dim(x)], [], None))
    return b.call(target, x, dims, b.choose.random() < 0.5)


def _repeat_interleave(b: Builder) -> fx.Node:
    x = b.any()
    return b.call(aten.repeat_interleave.self_int, x, 2, b.dim(x, static=True))


def _hadamard(b: Builder) -> fx.Node:
    x = b.any()
    dim = b.dim(x, static=True)
    return b.call(rolora.hadamard.default, x, 2 if b.size(x)[dim] % 2 == 0 else 1, dim)


def _kronecker(b: Builder) -> fx.Node:
    x = b.any()
    dim = b.dim(x, static=True)
    size = 2 if b.size(x)[dim] % 2 == 0 else 1
    factor = b.tensor(torch.randn(size, size, generator=b.random, dtype=torch.float64))
    b.params.append(factor)
    return b.call(rolora.kronecker.default, x, [factor], dim)


def _where(b: Builder) -> fx.Node:
    """A mask over part of the axes chooses between two values, a value and a number, or two numbers."""
    x = b.any(lambda s: len(s) > 0)
    tail = [s if s in SIZES and b.choose.random() < 0.7 else 1 for s in b.size(x)[-b.choose.randint(1, 2) :]]
    mask = b.tensor(torch.rand(tail, generator=b.random) < 0.5)
    b.params.append(mask)
    if b.choose.random() < 0.5:  # not a constant any more
        some = b.call(aten.ge.Scalar, b.call(aten.select.int, b.tokens, 1, 0), 0)
        some = b.call(aten.reshape.default, some, [-1] + [1] * len(tail))
        mask = b.call(aten.logical_and.default, mask, b.call(aten.select.int, some, 0, 0))
    kind = b.choose.randrange(5)
    if kind == 0:
        return b.call(aten.where.ScalarOther, mask, x, 0.3)
    if kind == 1:
        return b.call(aten.to.dtype, b.call(aten.where.Scalar, mask, 1.5, 0.3), torch.float64)
    if kind == 2:
        ones = [b.param(1), b.param(1)]
        return b.call(aten.where.self, mask, *ones)
    y = b.any(lambda s: s == b.size(x)) if kind == 3 else b.param(*tail)
    return b.call(aten.where.self, mask, x, y)


def _clamp(b: Builder) -> fx.Node:
    x = b.any(_static)
    return b.call(aten.clamp.Tensor, x, b.param(b.size(x)[-1]))


def _power(b: Builder) -> fx.Node:
    x = b.any(_static)
    if b.choose.random() < 0.5:
        return b.call(aten.pow.Scalar, 1.5, x)
    positive = b.call(aten.add.Tensor, b.call(aten.square.default, x), 0.5)
    return b.call(aten.pow.Tensor_Tensor, positive, b.param(b.size(x)[-1]))


def _integers(b: Builder) -> fx.Node:
    x = b.any(_static)
    numbers = _numbers(b, 4, b.size(x)[-1])
    return b.call(b.choose.choice((aten.add.Tensor, aten.mul.Tensor)), x, numbers)


def _sort(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) > 0)
    return b.call(operator.getitem, b.call(aten.sort.default, x, b.dim(x)), 0)


def _addmm(b: Builder) -> fx.Node:
    x = b.any(lambda s: len(s) == 2 and s[-1] in SIZES)
    out = b.choose.choice(SIZES[1:])
    return b.call(aten.addmm.default, b.param(out), x, b.param(b.size(x)[-1], out))


_ELEMENTWISE = [
    "silu",
    "gelu",
    "relu",
    "sigmoid",
    "tanh",
    "exp",
    "square",
    "abs",
    "cos",
    "sin",
    "erf",
    "softplus",
    "elu",
    "hardtanh",
    "mish",
]
OPERATORS: dict[str, Callable[[Builder], Any]] = {
    "linear": _linear, "matmul": _matmul, "bmm": _bmm, "mm": _mm,
    "add": _binary(aten.add.Tensor), "sub": _binary(aten.sub.Tensor), "mul": _binary(aten.mul.Tensor),
    "div": _binary(aten.div.Tensor), "neg": _unary(aten.neg.default), "clone": _unary(aten.clone.default),
    "to": _unary(aten.to.dtype, torch.float64), "scaled": _unary(aten.mul.Tensor, 0.5),
    "rms_norm": _rms_norm, "layer_norm": _layer_norm, "embedding": _embedding, "attention": _attention,
    "rotary": _rotary, "unflatten": _unflatten, "flatten": _flatten, "view": _view, "expand": _expand,
    "unsqueeze": _unsqueeze, "squeeze": _along(aten.squeeze.dim), "transpose": _transpose,
    "permute": _permute, "slice": _slice, "parts": _parts, "select": _select, "index": _index,
    "index_put": _index_put, "cat": _cat,
    "reduce": _reduce, "repeat_interleave": _repeat_interleave, "hadamard": _hadamard, "where": _where,
    "kronecker": _kronecker,
    "softmax": _along(aten.softmax.int), "clamp": _clamp, "power": _power, "integers": _integers,
    "elementwise": lambda b: b.call(getattr(aten, b.choose.choice(_ELEMENTWISE)).default, b.any()),
    "cumsum": _along(aten.cumsum.default), "sort": _sort, "addmm": _addmm,
    "flip": lambda b: (lambda x: b.call(aten.flip.default, x, [b.dim(x)]))(b.any(len)),
    "roll": lambda b: (lambda x: b.call(aten.roll.default, x, [1], [b.dim(x)]))(b.any(len)),
    "amax": _along(aten.amax.default),
    "logsumexp": lambda b: b.call(aten.logsumexp.default, b.any(_static), [-1]),
    "tril": lambda b: b.call(aten.tril.default, b.any(lambda s: len(s) > 1)),
    "fuzz.first_doubled": lambda b: b.call(torch.ops.fuzz.first_doubled.default, b.any(_static)),
    "fuzz.neg": lambda b: b.call(torch.ops.fuzz.neg.default, b.any(_static)),
    "fuzz.mul": lambda b: b.call(torch.ops.fuzz.mul.default, b.any(_static)),
}  # fmt: skip
# Drawn more often, or everything turns rigid soon.
KEEPING = [
    "linear",
    "linear",
    "linear",
    "linear",
    "linear",
    "linear",
    "rms_norm",
    "rms_norm",
    "embedding",
    "embedding",
    "attention",
    "attention",
    "add",
    "sub",
    "mul",
    "scaled",
    "neg",
    "clone",
    "to",
    "matmul",
    "matmul",
    "unflatten",
    "flatten",
    "view",
    "unsqueeze",
    "transpose",
    "permute",
    "slice",
    "cat",
    "index",
    "repeat_interleave",
    "reduce",
]
UNKNOWN = [
    "cumsum",
    "sort",
    "addmm",
    "flip",
    "roll",
    "amax",
    "logsumexp",
    "tril",
    "fuzz.first_doubled",
    "fuzz.neg",
    "fuzz.mul",
]
OTHERS = [name for name in OPERATORS if name not in {*KEEPING, *UNKNOWN}]
