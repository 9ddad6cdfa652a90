"""What a model asks of its attention masks, read off the functions that say which positions see which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rolora_passes.errors import CaptureError

_REACH = 64  # positions looked at beyond whatever range a mask has
_LONGEST = 1 << 17


@dataclasses.dataclass(frozen=True)
class Mask:
    """What each position sees; stands where the mask tensor would.

    Attributes:
        causal: positions up to its own alone.
        window: those less than so many positions away; None for all.
        other: None, or what the mask is if these do not say it.
    """

    causal: bool
    window: int | None
    other: str | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _read_by_the_model()

    def __getitem__(self, place: Any) -> Any:
        raise _read_by_the_model()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") and hasattr(Tensor, name):
            raise _read_by_the_model()
        raise AttributeError(name)


def _read_by_the_model() -> CaptureError:
    return CaptureError(
        "the model computes with its attention mask itself (an added bias, ALiBi, attention of its own); "
        "expected one that hands a causal or sliding-window mask to transformers' attention"
    )


class Masks:
    """transformers' mask interface, which reads masks in a first run and gives the same ones in a second.

    The second is traced: there the functions read values that are not known.
    """

    def __init__(self) -> None:
        self._found: list[Mask] = []
        self._next: int | None = None

    def replay(self) -> None:
        """The run that is traced begins."""
        self._next = 0

    def __call__(
        self, *args: Any, mask_function: Callable[..., Any], local_size: int | None = None, **options: Any
    ) -> Mask:
        """What `mask_function(batch, head, query, key)` allows, in place of its values."""
        if self._next is None:
            longest = getattr(options.get("config"), "max_position_embeddings", None) or 0
            reach = _REACH + max(local_size or 0, min(longest, _LONGEST))
            self._found.append(_read(mask_function, reach, local_size))
            return self._found[-1]
        self._next += 1
        return self._found[self._next - 1]


def _read(mask_function: Callable[..., Any], reach: int, local_size: int | None) -> Mask:
    """The mask that agrees with the function on some rows of 2 * `reach` positions."""
    zero, key = torch.tensor(0), torch.arange(2 * reach)
    local = "" if local_size is None else f" with a local range of {local_size} (chunked attention?)"
    other = f"a mask{local} that is neither causal nor a sliding window"

    def row(query: int) -> Tensor:
        seen: Tensor = mask_function(zero, zero, torch.tensor(query), key)
        return seen.expand(key.shape)

    try:
        seen = row(reach).nonzero().flatten()
        first, last = int(seen[0]), int(seen[-1])
        found = Mask(last == reach, reach - first + 1 if first > 0 else None)
        rows = (0, 1, reach // 2, reach - 1, reach, reach + 1, 2 * reach - 1)
        same = all(row(query).equal(_expected(found, query, key)) for query in rows)
    except Exception as error:  # of a function that is not known here: it may look at the text itself
        return Mask(True, None, f"{other}, and depends on more than positions: {error}")
    return found if same else Mask(found.causal, None, other)


def _expected(mask: Mask, query: int, key: Tensor) -> Tensor:
    seen = key <= query if mask.causal else torch.ones_like(key, dtype=torch.bool)
    return seen if mask.window is None else seen & ((key - query).abs() < mask.window)
