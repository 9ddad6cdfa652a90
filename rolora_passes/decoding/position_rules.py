"""When an operator works position by position: one rule an operator, for `state`.

A rule is given the places of positions in what the operator reads, and says where they run in its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from rolora_passes.decoding.places import Mixes, Place, Places
from rolora_passes.graphs.graph import argument, op_name
from rolora_passes.graphs.shapes import BATCH, SEQUENCE


def _away_from(place: Place | None, dims: Sequence[int], what: str) -> None:
    if place is not None and place.dim in dims:
        raise Mixes(f"{what} along the sequence")


def _plain(place: Place | None) -> None:
    if place is not None and place.counts:
        raise Mixes("it counts positions by itself, not from the positions that it is given")


def pointwise(i: Places, node: fx.Node) -> Place | None:
    """Operands broadcast; those by position have it in one place."""
    rank, found = i.rank(node), set[Place]()
    for item in node.all_input_nodes:
        if not isinstance(i.values.get(item), Tensor):
            raise Mixes("it computes with the number of tokens of a call")
        place = i.place(item)
        _plain(place)
        if place is not None:
            found.add(Place(place.dim + rank - i.rank(item), place.outer, place.inner))
    if len(found) > 1:
        raise Mixes("its operands have positions along different axes")
    return next(iter(found), None)


def _first(i: Places, node: fx.Node) -> Place | None:
    """Another form of one operand; shape and place are its own."""
    return i.place(node.args[0])


def _along(name: str, what: str) -> Callable[[Places, fx.Node], Place | None]:
    """Works along axes that an argument names, and keeps the shape, or puts another size there."""

    def rule(i: Places, node: fx.Node) -> Place | None:
        _same_place(i, node)
        place = i.place(node.args[0])
        _plain(place)
        _away_from(place, i.dim(node, name), what)
        return place

    return rule


def _same_place(i: Places, node: fx.Node) -> None:
    """What else an operator reads by position (an index, a source) is where its subject is."""
    places = {p for n in node.all_input_nodes if (p := i.place(n)) is not None}
    if len(places) > 1 or (places and i.place(node.args[0]) is None):
        raise Mixes("its operands have positions along different axes")


def _reduction(i: Places, node: fx.Node) -> Place | None:
    if node.target._overloadname == "other":  # type: ignore[union-attr]  # of two operands: min, max
        return pointwise(i, node)
    place, dims = i.place(node.args[0]), i.dim(node, "dim")
    _plain(place)
    _away_from(place, dims, "it reduces")
    if place is None or argument(node, "keepdim", False):
        return place
    return Place(place.dim - sum(d < place.dim for d in dims), place.outer, place.inner)


def _reshape(i: Places, node: fx.Node) -> Place | None:
    """The elements behind a position, and the rows before it, stay as many."""
    place = i.place(node.args[0])
    if place is None:
        return None
    old, new = i.shape(node.args[0]), i.shape(node)
    behind = place.inner * math.prod(old[place.dim + 1 :])
    before = place.outer * math.prod(old[: place.dim])
    for dim, size in enumerate(new):
        inner, rest = divmod(behind, math.prod(new[dim + 1 :]))
        outer, left = divmod(before, math.prod(new[:dim]))
        if inner and outer and not rest and not left and size == outer * SEQUENCE * inner:
            return Place(dim, outer, inner, place.counts)
    raise Mixes("it reshapes the sequence")


def _expand(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is None:
        return _filled(i, node)
    return Place(place.dim + i.rank(node) - i.rank(node.args[0]), place.outer, place.inner, place.counts)


def _filled(i: Places, node: fx.Node) -> Place | None:
    """One number, or one slice, everywhere: the same at all positions."""
    for dim, size in enumerate(i.shape(node)):
        if size in (SEQUENCE, BATCH * SEQUENCE):
            return Place(dim, size // SEQUENCE, 1)
        if size % SEQUENCE == 0:
            raise Mixes("its shape says not how positions run")
    return None


def _count(i: Places, node: fx.Node) -> Place | None:
    """arange over rows (tokens of a batch), which picks each row itself; of anything else it is a count."""
    place = _filled(i, node)
    steps = [a for a in node.args if isinstance(a, int | float)]
    if place is not None and any(steps):
        raise Mixes("it counts positions by itself, not from the positions that it is given")
    return None if place is None else Place(place.dim, place.outer, 1, counts=True)


def _permuted(i: Places, node: fx.Node) -> Place | None:
    place, rank = i.place(node.args[0]), i.rank(node)
    order = list(range(rank))
    if op_name(node) == "permute":
        order = [d % rank for d in argument(node, "dims")]
    elif op_name(node) == "t":
        order.reverse()
    else:
        a, b = (int(node.args[n]) % rank for n in (1, 2))  # type: ignore[arg-type]
        order[a], order[b] = b, a
    return None if place is None else Place(order.index(place.dim), place.outer, place.inner, place.counts)


def _slice(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is not None and i.shape(node)[place.dim] != i.shape(node.args[0])[place.dim]:
        raise Mixes("it takes a part of the sequence")
    return place


def _select(i: Places, node: fx.Node) -> Place | None:
    place, (dim,) = i.place(node.args[0]), i.dim(node, "dim")
    _away_from(place, [dim], "it takes one element")
    return (
        None
        if place is None
        else Place(place.dim - (dim < place.dim), place.outer, place.inner, place.counts)
    )


def _pad(i: Places, node: fx.Node) -> Place | None:
    place, widths = i.place(node.args[0]), list(argument(node, "pad"))
    rank = i.rank(node.args[0])
    _plain(place)
    padded = [rank - 1 - k // 2 for k, width in enumerate(widths) if width != 0]
    _away_from(place, padded, "it pads")
    return place


def _cat(i: Places, node: fx.Node) -> Place | None:
    parts = [n for n in node.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    places = {i.place(part) for part in parts}
    place = next((p for p in places if p is not None), None)
    if place is None:
        return _filled(i, node)
    if len(places) > 1:
        raise Mixes("it joins values that run along the sequence to others")
    rank = i.rank(parts[0])
    _plain(place)
    if op_name(node) == "stack":
        dim = int(argument(node, "dim")) % (rank + 1)
        return Place(place.dim + (dim <= place.dim), place.outer, place.inner)
    _away_from(place, [int(argument(node, "dim")) % rank], "it joins")
    return place


def _repeat(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    if place is None:
        return _filled(i, node)
    if op_name(node) == "repeat_interleave":
        times = argument(node, "repeats")
        if not isinstance(times, int) or argument(node, "dim") is None:
            raise Mixes("it repeats each position as often as it computes")
        along = [place.dim] == i.dim(node, "dim")
        return Place(place.dim, place.outer, place.inner * times if along else place.inner, place.counts)
    moved = i.rank(node) - i.rank(node.args[0])
    if i.shape(node)[place.dim + moved] != i.shape(node.args[0])[place.dim]:
        raise Mixes("it repeats along the sequence")
    return Place(place.dim + moved, place.outer, place.inner, place.counts)


def _linear(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    _plain(place)
    _away_from(place, [i.rank(node.args[0]) - 1], "it multiplies by a matrix")
    if any(i.place(n) for n in node.all_input_nodes if n is not node.args[0]):
        raise Mixes("its weight runs along the sequence")
    return place


def _matmul(i: Places, node: fx.Node) -> Place | None:
    """A position may be a batch of either operand, a row of the first, or a column of the second."""
    left, right = node.args[-2:] if op_name(node) == "addmm" else node.args[:2]
    places = []
    for side, (item, contracted) in enumerate(((left, -1), (right, -2))):
        place, rank = i.place(item), i.rank(item)
        _plain(place)
        if rank < 2 and place is not None:
            raise Mixes("it multiplies along the sequence")
        _away_from(place, [rank + contracted], "it multiplies")
        if place is not None:
            free = rank + contracted + (1 if side else -1)
            places.append(
                (Place(place.dim + i.rank(node) - rank, place.outer, place.inner), place.dim == free)
            )
    if len(places) == 2 and (places[0][0] != places[1][0] or places[0][1] or places[1][1]):
        raise Mixes("it multiplies positions by positions, as attention does")
    return places[0][0] if places else None


def _indexed(i: Places, node: fx.Node) -> Place | None:
    """Rows of a table by position; or rows of a value by an index that counts them."""
    x, given = node.args[0], node.args[1]
    picked = [(d, n) for d, n in enumerate(given) if n is not None]  # type: ignore[arg-type]
    if len(picked) != 1:
        raise Mixes("it looks up by several indices")
    dim, index = picked[0]
    return _look_up(i, x, index, dim)


def _index_select(i: Places, node: fx.Node) -> Place | None:
    (dim,) = i.dim(node, "dim")
    return _look_up(i, node.args[0], argument(node, "index"), dim)


def _look_up(i: Places, x: Any, index: fx.Node, dim: int) -> Place | None:
    place, by = i.place(x), i.place(index)
    if place is None:
        _plain(by)
        return None if by is None else Place(by.dim + dim, by.outer, by.inner)
    if by is None:
        _away_from(place, [dim], "it picks positions")
        return Place(place.dim + (i.rank(index) - 1 if dim < place.dim else 0), place.outer, place.inner)
    if by.counts and place.dim == dim and place.inner == 1 and place.outer == by.outer:
        return Place(by.dim + dim, by.outer, by.inner)
    raise Mixes("it picks positions by an index")


def _gather(i: Places, node: fx.Node) -> Place | None:
    """Of what is the same at all positions, each element of an index takes its own."""
    index = i.place(argument(node, "index"))
    if i.place(node.args[0]) is None:
        _plain(index)
        return index
    return _along("dim", "it gathers")(i, node)


def _embedding(i: Places, node: fx.Node) -> Place | None:
    if i.place(node.args[0]) is not None:
        raise Mixes("its table runs along the sequence")
    by = i.place(node.args[1])
    _plain(by)
    return by


def _norm(i: Places, node: fx.Node) -> Place | None:
    place, rank = i.place(node.args[0]), i.rank(node.args[0])
    count = len(argument(node, "normalized_shape"))
    _plain(place)
    _away_from(place, range(rank - count, rank), "it normalises")
    return place


def _per_token(i: Places, node: fx.Node) -> Place | None:
    place = i.place(node.args[0])
    _away_from(place, [i.rank(node.args[0]) - 1], "it rounds in groups")
    return place


def _rotary(i: Places, node: fx.Node) -> Place | None:
    x, *tables = (i.place(argument(node, name)) for name in ("x", "cos", "sin"))
    if x != Place(1, 1, 1) or any(t not in (x, None) for t in tables):
        raise Mixes("its angles run along another axis than its heads")
    return x


def _attention(i: Places, node: fx.Node) -> Place | None:
    if any(i.place(argument(node, name)) != Place(1, 1, 1) for name in ("query", "key", "value")):
        raise Mixes("it attends to something else than the tokens of the sequence")
    return Place(1, 1, 1)


def _convolution(i: Places, node: fx.Node) -> Place | None:
    """Over flattened tokens, or with a kernel of one position."""
    place, rank = i.place(node.args[0]), i.rank(node.args[0])
    _plain(place)
    spatial = rank - i.rank(node.args[1]) + 2
    if place is None or place.dim < spatial - 1:
        return place
    still = {"stride": 1, "padding": 0, "dilation": 1}
    size = i.shape(node.args[1])[place.dim - rank]
    same = all(set(argument(node, name)) <= {value} for name, value in still.items() if name != "dilation")
    if place.dim >= spatial and size == 1 and same:
        return place
    raise Mixes("a convolution along the sequence, which needs the last inputs as its state")


def _parts(i: Places, node: fx.Node) -> Place | None:
    """split, chunk, unbind: one place for all parts."""
    place = i.place(node.args[0])
    (dim,) = i.dim(node, "dim")
    _away_from(place, [dim], "it splits")
    if place is None or op_name(node) != "unbind":
        return place
    return Place(place.dim - (dim < place.dim), place.outer, place.inner, place.counts)


_POINTWISE = (
    "add", "sub", "rsub", "mul", "div", "pow", "neg", "exp", "exp2", "log", "log2", "log1p", "sqrt",
    "rsqrt", "reciprocal", "square", "abs", "sign", "cos", "sin", "tanh", "sigmoid", "relu", "relu6",
    "silu", "gelu", "elu", "celu", "selu", "softplus", "mish", "hardtanh", "hardswish", "hardsigmoid",
    "leaky_relu", "log_sigmoid", "prelu", "clamp", "clamp_min", "clamp_max", "clip", "minimum", "maximum",
    "where", "masked_fill", "eq", "ne", "lt", "gt", "le", "ge", "__and__", "__or__", "bitwise_and",
    "bitwise_or", "bitwise_not", "logical_and", "logical_or", "logical_not", "floor", "ceil", "round",
    "trunc", "remainder", "fmod", "floor_divide", "erf", "expm1", "lerp", "addcmul", "addcdiv", "threshold",
    "fake_quantize_static", "observed", "isnan", "isinf", "nan_to_num", "true_divide", "xlogy",
    "logical_xor", "bitwise_xor", "atan", "sinh", "cosh", "tan",
)  # fmt: skip
_KEEPING = (
    "to", "_to_copy", "type_as", "clone", "alias", "detach", "contiguous", "positive", "float",
    "lift_fresh_copy", "getitem",
)  # fmt: skip
_FILLS = (
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "empty", "empty_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "scalar_tensor",
)  # fmt: skip
_REDUCTIONS = (
    "sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "logsumexp",
    "var", "std", "norm", "count_nonzero",
)  # fmt: skip

RULES: dict[str, Callable[[Places, fx.Node], Place | None]] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_KEEPING, _first),
    **dict.fromkeys(_FILLS, _filled),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "_reshape_copy"),
        _reshape,
    ),
    **dict.fromkeys(("transpose", "permute", "t", "swapaxes"), _permuted),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax"), _along("dim", "a softmax")),
    **dict.fromkeys(("cumsum", "cumprod"), _along("dim", "a running sum or product")),
    **dict.fromkeys(("topk", "sort"), _along("dim", "it sorts")),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _along("dim", "it scatters")),
    "argsort": _along("dim", "it sorts"),
    "gather": _gather,
    "flip": _along("dims", "it reverses"),
    "roll": _along("dims", "it shifts"),
    "hadamard": _along("dim", "a transform"),
    "kronecker": _along("dim", "a transform"),
    "rotate": _along("dim", "a transform"),
    "glu": _along("dim", "it splits"),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _parts),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "repeat_interleave", "tile"), _repeat),
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("cat", "concat", "stack"), _cat),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolution),
    **dict.fromkeys(("rms_norm", "layer_norm"), _norm),
    "arange": _count, "select": _select, "linear": _linear, "index": _indexed, "index_select": _index_select,
    "embedding": _embedding, "fake_quantize": _per_token, "rotary_embedding": _rotary,
    "attention": _attention,
    "one_hot": _first,
}  # fmt: skip
