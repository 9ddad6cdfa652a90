"""GPTQ (Frantar et al., 2023): rounding a weight so that its outputs, not its entries, change least.

For W [out, in] and the Hessian H = Σ xᵀx of its inputs, columns are rounded one after another, and what
each loses is made good by those that are still to come:

    e = w_i - round(w_i),   w_j -= e · U_ij / U_ii  for j > i,   U the upper Cholesky factor of H⁻¹

Rows do not see each other: weights that read one value can be stacked and rounded together. The arithmetic
of the grid is `affine`'s, so that dequantizing the integers gives what the loop subtracted, in float32 to
the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rolora_passes.errors import PassError
from rolora_passes.numerics import affine
from rolora_passes.numerics.exact import exact

_BLOCK = 128  # columns that are kept up to date while they are rounded; the rest, once a block


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] on its grid: `affine.dequantize(integers, scale, zero)`.

    Attributes:
        integers: int8 [out, in].
        scale, zero: float32 and int8 [out, groups]; zero is 0 everywhere where the grid is symmetric.
    """

    integers: Tensor
    scale: Tensor
    zero: Tensor


def gptq(
    weight: Tensor, hessian: Tensor, grid: affine.Integers, damping: float = 0.01, act_order: bool = False
) -> Quantized:
    """Round a weight to a grid with the least change of its outputs on the inputs that made the Hessian.

    A channel that saw nothing (a zero on the diagonal) cannot be made good by others, nor is it missed:
    its weights become zero. Scales of channels come from the whole row, as it was; scales of groups from
    the group as the rounding of everything before it has left it.

    Args:
        weight: [out, in], float32 or float64; computed in that type.
        hessian: [in, in], up to a factor: the result does not depend on it.
        damping: of the mean of the diagonal, added to the diagonal.
        act_order: round the columns that see the largest inputs first. Groups stay groups of neighbours:
            they are ordered by their largest column, and columns within them.

    Raises:
        PassError: shapes disagree, or the Hessian is not finite or, damped, not positive definite.
    """
    _check_shapes(weight, hessian, grid)
    group = grid.group_size or weight.shape[1]
    diagonal = hessian.diagonal()
    order = _order(diagonal, group) if act_order else torch.arange(weight.shape[1], device=weight.device)
    columns = weight.detach().t().clone(memory_format=torch.contiguous_format)  # a column is a row here
    columns[diagonal == 0] = 0
    columns = columns[order]
    updates = _updates(hessian.detach(), order, damping).to(columns)
    scales, zeros = _round_columns(columns, updates, grid)
    back = order.argsort()
    # Groups were met in the order of their first columns.
    of_group = (order[::group] // group).argsort()
    scale, zero = scales[:, of_group].contiguous(), zeros[:, of_group].contiguous()
    rounded = columns[back].t()
    # What is on the grid already comes back as the integers it was made of.
    integers = affine.quantize(rounded.contiguous(), scale, zero, grid.bits, grid.symmetric)
    return Quantized(integers, scale, zero)


def _check_shapes(weight: Tensor, hessian: Tensor, grid: affine.Integers) -> None:
    found = f"a weight {list(weight.shape)} and a Hessian {list(hessian.shape)}"
    if weight.dim() != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise PassError(
            f"gptq: expected a weight [out, in] and a Hessian [in, in], found {found}: "
            "gather the Hessian at the value that the weight multiplies"
        )
    if grid.group_size and weight.shape[1] % grid.group_size:
        raise PassError(
            f"gptq: groups of {grid.group_size} do not divide an input of {weight.shape[1]}: "
            "use a group size that does, or None (one scale per channel)"
        )


def _order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by descending diagonal within each group, groups by their largest."""
    values, within = diagonal.unflatten(0, (-1, group)).sort(dim=1, descending=True, stable=True)
    groups = values[:, 0].argsort(descending=True, stable=True)
    columns: Tensor = within + torch.arange(0, diagonal.numel(), group, device=diagonal.device)[:, None]
    return columns[groups].flatten()


def _updates(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """U_ij / U_ii for the upper U with UᵀU = H⁻¹, float64: what column j pays for the error of column i.

    H = RRᵀ with an upper R (a Cholesky factorization from the last row up) has U = R⁻¹, so H, which may
    be all but singular, is never inverted.
    """
    last_first = order.flip(0)
    upside_down = exact(hessian[last_first[:, None], last_first])
    diagonal = upside_down.diagonal()
    if not torch.isfinite(upside_down).all():
        raise PassError(
            "gptq: expected a finite Hessian, found NaN or infinite entries: a value overflows on the "
            "calibration tokens; run the graph in a wider type (rolora_passes.graphs.convert)"
        )
    seen = diagonal != 0
    if not seen.any():
        raise PassError(
            "gptq: expected a Hessian of inputs, found zeros: nothing reached this input; calibrate on more "
            "tokens, or leave it out of the targets"
        )
    mean = diagonal[seen].mean()
    diagonal[~seen] = mean  # nothing depends on what stands here, if it is not zero
    diagonal += damping * mean
    least = diagonal.numel() * torch.finfo(torch.float64).eps * diagonal.max()
    factor, failed = torch.linalg.cholesky_ex(upside_down)
    if failed or factor.diagonal().square().min() <= least:
        raise PassError(
            f"gptq: expected a positive definite Hessian, found one that is not, with damping {damping}: "
            "raise the damping or calibrate on more tokens"
        )
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    upper: Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
    return upper.div_(upper.diagonal().clone().unsqueeze(1))


def _round_columns(columns: Tensor, updates: Tensor, grid: affine.Integers) -> tuple[Tensor, Tensor]:
    """Round [in, out] in place, from the first to the last; returns scale and zero [out, groups]."""
    width, rows = columns.shape
    group = grid.group_size or width
    # A block of whole groups: a group's columns have had every update when its scale is chosen.
    block = group * max(1, _BLOCK // group) if grid.group_size else _BLOCK
    scales = columns.new_empty(width // group, rows, dtype=torch.float32)
    zeros = columns.new_empty(width // group, rows, dtype=torch.int8)
    errors = columns.new_empty(block, rows)
    for start in range(0, width, block):
        stop = min(start + block, width)
        for i in range(start, stop):
            number = i // group
            scale, zero = scales[number], zeros[number]
            if i % group == 0:
                chosen = grid.choose(columns[i : i + group].t())
                scale.copy_(chosen[0].squeeze(1))
                zero.copy_(chosen[1].squeeze(1))
            column, error = columns[i], errors[i - start]
            rounded = affine.round_trip(column, scale, zero, grid.bits, grid.symmetric)
            torch.sub(column, rounded, out=error)
            column.copy_(rounded)
            columns[i + 1 : stop].addr_(updates[i, i + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(updates[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    return scales.t(), zeros.t()
