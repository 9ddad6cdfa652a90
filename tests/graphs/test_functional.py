"""Writes in place: right where nothing else sees the memory, refused by name where something does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rolora_passes import apply_passes
from rolora_passes.errors import CaptureError, GraphFormatError
from rolora_passes.graphs.capture import from_exported
from rolora_passes.graphs.running import run


def exported(body: Callable[[Tensor], Tensor]) -> tuple[torch.export.ExportedProgram, nn.Module]:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(body(self.table(tokens) * 3))
            return logits

    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    model, tokens = Small().eval(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        return torch.export.export(model, (tokens,), dynamic_shapes=(dims,)), model


def private(x: Tensor) -> Tensor:
    x = x.relu_().mul_(2)
    best, places = x.topk(4)
    best /= best.sum(-1, keepdim=True)
    return torch.zeros_like(x).scatter(-1, places, best).transpose(-1, -2).add_(1).transpose(-1, -2)


def through(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def body(x: Tensor) -> Tensor:
        view(x).relu_()
        return x

    return body


def earlier_view(x: Tensor) -> Tensor:
    wide = x.unsqueeze(-1)
    x.relu_()
    return wide.squeeze(-1) + x


def assigned(x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    result[..., :4] = 2 * x[..., :4]
    result[..., 4:] = x[..., 4:]
    return result


SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "permute": through(lambda x: x.permute(1, 0, 2)), "detach": through(Tensor.detach),
    "flatten": through(lambda x: x.flatten(0, 1)), "unflatten": through(lambda x: x.unflatten(-1, (2, 4))),
    "reshape": through(lambda x: x.reshape(-1, 8)), "narrow": through(lambda x: x.narrow(-1, 0, 4)),
    "chunk": through(lambda x: x.chunk(2, -1)[0]), "unbind": through(lambda x: x.unbind(-1)[1]),
    "diagonal": through(lambda x: x.diagonal(0, 1, 2)), "select": through(lambda x: x.select(-1, 0)),
    "earlier view": earlier_view, "assigned": assigned,
}  # fmt: skip


def test_what_nothing_else_sees_is_right() -> None:
    program, model = exported(private)
    tokens = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(run(from_exported(program), tokens), model(tokens))


@pytest.mark.parametrize("name", SHARED)
def test_what_another_name_sees_is_refused(name: str) -> None:
    program, _ = exported(SHARED[name])
    with pytest.raises(CaptureError, match=r"in place: `\w+` .* writes into `\w+`, and `\w+` reads"):
        from_exported(program)


def test_a_parameter_is_not_written() -> None:
    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(13, 8, max_norm=1.0)

        def forward(self, tokens: Tensor) -> Tensor:
            found: Tensor = self.table(tokens)
            return found

    program = torch.export.export(Renormed(), (torch.arange(12).reshape(2, 6),))
    with pytest.raises(CaptureError, match="embedding_renorm_"):
        from_exported(program)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda x: x + torch.rand_like(x), "draws random numbers"),
        (lambda x: x + torch.empty_like(x), "nothing has written"),
        (lambda x: nn.functional.dropout(x, 0.5, training=True), "draws random numbers"),
    ],
)
def test_what_is_not_a_function_of_the_tokens_is_refused(body: Callable[[Tensor], Tensor], what: str) -> None:
    program, _ = exported(body)
    with pytest.raises((CaptureError, GraphFormatError), match=what + "|does not compute|found a relative"):
        apply_passes(program, [])
