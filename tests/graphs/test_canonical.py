"""Every spelling of a composite becomes its one node."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from helpers import count
from torch import Tensor, fx, nn

from rolora_passes.errors import CaptureError
from rolora_passes.graphs.capture import from_exported
from rolora_passes.graphs.graph import is_op, parameters
from rolora_passes.graphs.running import run
from rolora_passes.graphs.text import graph_text

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")
WIDTH, EPS = 8, 1e-5
Function = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """An embedding, some function of it, and a head."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, WIDTH)
        self.gain, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.places = nn.Buffer(torch.arange(16)[None])
        self.odd = nn.Buffer(torch.arange(1, 33, 2)[None])
        self.function = function
        self.positions: list[Tensor] = []
        self.double()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.positions.append(positions)
        found: Tensor = self.head(self.function(self, self.table(tokens)))
        return found


def canonical(function: Function) -> fx.GraphModule:
    """The canonical graph of a function, checked to compute what the function does."""
    model, auto = Model(function), torch.export.Dim.AUTO
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto})
    with torch.no_grad():
        positions = torch.arange(6).expand(2, 6)  # the same tensor twice would be one input
        graph = from_exported(torch.export.export(model, (tokens, positions), dynamic_shapes=shapes))
        some = torch.randint(0, 11, (3, 5))
        expected = model(some, torch.arange(5).expand(3, 5))
    torch.testing.assert_close(run(graph, some), expected, rtol=1e-12, atol=1e-12)
    return graph


def squares(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


RMS: dict[str, Function] = {
    "x * rsqrt": lambda m, x: x * torch.rsqrt(squares(x) + EPS),
    "rsqrt * x": lambda m, x: torch.rsqrt(squares(x) + EPS) * x,
    "x / sqrt": lambda m, x: x / torch.sqrt(squares(x) + EPS),
    "x * reciprocal(sqrt)": lambda m, x: x * torch.reciprocal(torch.sqrt(squares(x) + EPS)),
    "x * pow(-0.5)": lambda m, x: x * torch.pow(squares(x) + EPS, -0.5),
    "x / pow(0.5)": lambda m, x: x / torch.pow(squares(x) + EPS, 0.5),
    "x * x": lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS),
    "square": lambda m, x: x * torch.rsqrt(x.square().mean(-1, True) + EPS),
    "the operator": lambda m, x: nn.functional.rms_norm(x, [WIDTH], None, EPS),
    "through float64": lambda m, x: (x.double() * torch.rsqrt(squares(x.double()) + EPS)).to(x.dtype),
}
NOT_RMS: dict[str, Function] = {
    "a sum, not a mean": lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "of another value": lambda m, x: x * torch.rsqrt(squares(x + 1) + EPS),
    "over another axis": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS),
    "cubes": lambda m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS),
    "sqrt divided by x": lambda m, x: torch.sqrt(squares(x) + EPS) / (x + 10),
    "times sqrt": lambda m, x: x * torch.sqrt(squares(x) + EPS),
}


@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm(spelling: str) -> None:
    graph = canonical(lambda m, x: RMS[spelling](m, x) * m.gain)
    (norm,) = [n for n in graph.graph.nodes if is_op(n, "rms_norm")]
    assert norm.args[1:] == ([WIDTH], None, EPS)
    assert not count(graph, "rsqrt", "mean", "pow", "div")
    (gain,) = norm.users
    assert is_op(gain, "mul") and {a.op for a in gain.args} == {"get_attr", "call_function"}


@pytest.mark.parametrize("spelling", NOT_RMS)
def test_what_is_not_an_rms_norm_is_left(spelling: str) -> None:
    assert not count(canonical(NOT_RMS[spelling]), "rms_norm", "layer_norm")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: nn.functional.layer_norm(x, [WIDTH], m.gain, m.bias, EPS),
        lambda m, x: centred(x) * torch.rsqrt(squares(centred(x)) + EPS) * m.gain + m.bias,
    ],
)
def test_layer_norm(function: Function) -> None:
    graph = canonical(function)
    (norm,) = [n for n in graph.graph.nodes if is_op(n, "layer_norm")]
    assert norm.args[1:4] == ([WIDTH], None, None) and norm.args[4] == EPS
    assert count(graph, "mul") == count(graph, "add") == 1 and not count(graph, "rms_norm", "mean")


def gate(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    a, b, c = parts
    return a * torch.sigmoid(b) + c


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: gate(m.fused(x).chunk(3, -1)),
        lambda m, x: gate(m.fused(x).split(WIDTH, -1)),
        lambda m, x: gate(m.fused(x).split([WIDTH, WIDTH, WIDTH], 2)),
        lambda m, x: gate([m.fused(x)[..., i * WIDTH : (i + 1) * WIDTH] for i in range(3)]),
        lambda m, x: gate(m.fused(x).unflatten(-1, (3, WIDTH)).unbind(-2)),
        lambda m, x: gate(m.fused(x).view(*x.shape[:2], 3, 2, WIDTH // 2).unbind(2)).flatten(-2),
    ],
)
def test_a_fused_projection_becomes_one_linear_a_part(function: Function) -> None:
    graph = canonical(function)
    assert count(graph, "linear") == 4
    for node in graph.graph.nodes:
        assert not is_op(node, "chunk", "split", "split_with_sizes", "unbind", "getitem")
        assert not is_op(node, "slice") or node.args[0].op == "get_attr"


def test_a_projection_that_is_also_read_whole_stays() -> None:
    graph = canonical(lambda m, x: gate(m.fused(x).chunk(3, -1)) + m.fused(x).sum(-1, keepdim=True))
    assert count(graph, "linear") == 2


def test_matrix_products_by_parameters_become_linears() -> None:
    graph = canonical(lambda m, x: torch.addmm(m.bias, x.view(-1, WIDTH), m.turned).view(x.shape) @ m.turned)
    assert count(graph, "linear") == 3 and not count(graph, "addmm", "mm", "matmul", "view")


def tables(m: Model, width: int) -> tuple[Tensor, Tensor]:
    steps = m.positions[-1][:, :, None].double() * torch.arange(1, width // 2 + 1)
    angles = torch.cat((steps, steps), -1)
    return angles.cos(), angles.sin()


def halves(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotary(partner: Callable[[Tensor], Tensor], width: int = 4) -> Function:
    def function(m: Model, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        cos, sin = (t.unsqueeze(1) for t in tables(m, width))
        turned, rest = heads[..., :width], heads[..., width:]
        out = turned * cos + partner(turned) * sin
        return torch.cat((out, rest), -1).transpose(1, 2).flatten(-2)

    return function


@pytest.mark.parametrize(
    ("partner", "width", "interleaved"),
    [(halves, 4, False), (neighbours, 4, True), (halves, 2, False), (neighbours, 2, True)],
)
def test_rotary_embedding(partner: Callable[[Tensor], Tensor], width: int, interleaved: bool) -> None:
    graph = canonical(rotary(partner, width))
    (node,) = [n for n in graph.graph.nodes if is_op(n, "rotary_embedding")]
    assert width == 2 or node.args[3] is interleaved  # two channels are halves and neighbours
    assert not count(graph, "transpose", "neg", "stack", "slice")


def test_a_turn_the_other_way_is_not_rotary_embedding() -> None:
    assert not count(canonical(rotary(lambda x: -halves(x))), "rotary_embedding")


def test_copies_casts_and_transpositions_cancel() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x.clone().contiguous().to(x.dtype), 0.5, training=False)
        turned = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return (torch.nn.functional.silu(turned) * 2).transpose(1, 2).flatten(-2).detach()

    text = re.sub(r"_\d+\b", "", graph_text(canonical(function)))
    assert text.split("input positions\n")[1] == (
        "embedding = embedding(table.weight, tokens)\n"
        "unflatten = unflatten(embedding, -1, [2, 4])\n"
        "silu = silu(unflatten)\n"
        "mul = mul(silu, 2)\n"
        "flatten = flatten(mul, -2)\n"
        "linear = linear(flatten, head.weight)\n"
        "return linear\n"
    )


def test_what_is_written_in_place_becomes_functional() -> None:
    graph = canonical(lambda m, x: (x * 2).add_(m.bias).mul_(m.gain))
    assert count(graph, "add") == 1 and count(graph, "mul") == 2


def places(m: Model, x: Tensor) -> Tensor:
    return m.places[:, : x.shape[1]]


def test_positions_from_a_buffer_are_counted() -> None:
    graph = canonical(lambda m, x: x * places(m, x)[..., None])
    (node,) = [n for n in graph.graph.nodes if is_op(n, "arange")]
    assert is_op(node.args[0], "sym_size") and not count(graph, "slice")
    assert "places" not in parameters(graph)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.places[:, 1 : x.shape[1] + 1, None],  # from another start
        lambda m, x: x * m.odd[:, : x.shape[1], None],  # other numbers
    ],
)
def test_other_numbers_from_a_buffer_stay(function: Function) -> None:
    graph = canonical(function)
    assert count(graph, "slice", "mul") == 2


def ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2])


MASKS: dict[str, tuple[Function, bool]] = {
    "a product with ones": (lambda m, x: x * ones(x)[..., None].to(x.dtype), True),
    "nothing filled": (lambda m, x: x.masked_fill(~ones(x)[..., None].bool(), -1.0), True),
    "in place": (lambda m, x: (x + 1).masked_fill_((1 - ones(x))[..., None].bool(), 0), True),
    "everything filled": (lambda m, x: x.masked_fill(ones(x)[..., None].bool(), -1.0), False),
    "a product with zeros": (lambda m, x: x * torch.zeros_like(x), False),
    "a product with twos": (lambda m, x: x * (ones(x)[..., None].to(x.dtype) * 2), False),
    "a wider result": (lambda m, x: x[:, :, :1] * torch.ones_like(x), False),
    "some filled": (lambda m, x: x.masked_fill(x > 0.5, -1.0), False),
}


@pytest.mark.parametrize(("function", "gone"), MASKS.values(), ids=MASKS.keys())
def test_masks_of_ones_go(function: Function, gone: bool) -> None:
    assert (not count(canonical(function), "mul", "masked_fill", "ones", "ones_like")) == gone


def test_other_forwards_are_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids * 2

    program = torch.export.export(Wrong(), (torch.zeros(2, 3, dtype=torch.int64),))
    with pytest.raises(CaptureError, match=r"forward\(tokens, positions\), .*, found inputs \['ids'\]"):
        from_exported(program)

    class Two(nn.Module):
        def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            return tokens * 2, positions * 2

    numbers = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(CaptureError, match="returns logits alone"):
        from_exported(torch.export.export(Two(), (numbers, numbers)))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: nn.functional.rms_norm(x, [WIDTH]),
        lambda m, x: nn.functional.rms_norm(x, [WIDTH], m.gain),
        lambda m, x: nn.functional.rms_norm(x, [WIDTH], m.gain, None),
        lambda m, x: nn.functional.layer_norm(x, [WIDTH], m.gain),
        lambda m, x: nn.functional.rms_norm(x.unflatten(-1, (2, 4)), [2, 4], m.gain.view(2, 4)).flatten(-2),
        lambda m, x: nn.functional.layer_norm(x.unflatten(-1, (2, 4)), [2, 4]).flatten(-2),
    ],
)
def test_norms_with_arguments_left_out(function: Function) -> None:
    (norm,) = [n for n in canonical(function).graph.nodes if is_op(n, "rms_norm", "layer_norm")]
    assert all(value is None for value in norm.args[2:-1])
    assert norm.args[-1] == (torch.finfo(torch.float64).eps if is_op(norm, "rms_norm") else 1e-5)


def upcast(m: Model, x: Tensor) -> Tensor:
    return x * torch.rsqrt(squares(x.float()) + EPS)  # in float32, as its second factor is


HALVES: dict[str, Function] = {
    "cast before the gain": lambda m, x: upcast(m, x).to(x.dtype) * m.gain,
    "cast after the gain": lambda m, x: (upcast(m, x) * m.gain).to(x.dtype),
    "the gain in float32": lambda m, x: (m.gain.float() * upcast(m, x)).type_as(x),
    "1 + w in float32": lambda m, x: (upcast(m, x.float()) * (1 + m.gain.float())).to(x.dtype),
    "the variance rounded": lambda m, x: x * torch.rsqrt(squares(x.float()) + EPS).to(x.dtype) * m.gain,
}


@pytest.mark.parametrize("spelling", HALVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_around_a_norm_go(spelling: str, dtype: torch.dtype) -> None:
    model, auto = Model(HALVES[spelling]).to(dtype), torch.export.Dim.AUTO
    tokens, places = torch.zeros(2, 6, dtype=torch.int64), torch.arange(6).expand(2, 6)
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto})
    with torch.no_grad():
        graph = from_exported(torch.export.export(model, (tokens, places), dynamic_shapes=shapes))
        some = torch.randint(0, 11, (3, 5))
        torch.testing.assert_close(
            run(graph, some), model(some, places[:1, :5].expand(3, 5)), rtol=0.05, atol=0.05
        )
    (norm,) = [n for n in graph.graph.nodes if is_op(n, "rms_norm")]
    (gain,) = norm.users
    (reader,) = gain.users
    assert is_op(norm.args[0], "embedding") and is_op(gain, "mul") and is_op(reader, "linear")


def test_a_norm_that_is_read_in_float32_stays_in_it() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        return nn.functional.linear(upcast(m, x), m.turned.float()).to(x.dtype)

    model = Model(function).to(torch.bfloat16)
    tokens, places = torch.zeros(2, 6, dtype=torch.int64), torch.arange(6).expand(2, 6)
    with torch.no_grad():
        graph = from_exported(torch.export.export(model, (tokens, places)))
    assert {str(v.dtype) for name, v in parameters(graph).items() if name == "turned"} == {"torch.float32"}
    assert torch.equal(run(graph, tokens), model(tokens, places))
