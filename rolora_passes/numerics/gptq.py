"""GPTQ (Frantar et al., 2023): rounding a weight so that its outputs, not its entries, change least.

For W [out, in] and the Hessian H = Σ xᵀx of its inputs, columns are rounded one after another, and what
each loses is made good by those that are still to come:

    e = w_i - round(w_i),   w_j -= e · U_ij / U_ii  for j > i,   U the upper Cholesky factor of H⁻¹

That is the loop within a block of columns. What all columns before a block B lost, E = W - Ŵ, it is told at
once and without an inverse of H, by the upper R with H = RRᵀ, whose inverse U is:

    W_B += E · R_<B · R_BB⁻¹

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

_BLOCK = 128  # columns that are kept up to date while they are rounded


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
    order = _order(diagonal, group) if act_order else torch.arange(len(diagonal), device=weight.device)
    columns = weight.detach().t().clone(memory_format=torch.contiguous_format)  # a column is a row here
    columns[diagonal == 0] = 0
    columns = columns[order]
    integers, scales, zeros = _round_columns(columns, _factor(hessian.detach(), order, damping), grid)
    # Groups were met in the order of their first columns.
    of_group = (order[::group] // group).argsort()
    scale, zero = scales[:, of_group].contiguous(), zeros[:, of_group].contiguous()
    return Quantized(integers[:, order.argsort()], scale, zero)


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


def _factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper R with RRᵀ = H, damped, float64: a Cholesky factorization from the last row up."""
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
    upper: Tensor = factor.flip(0, 1)
    return upper


def _round_columns(columns: Tensor, factor: Tensor, grid: affine.Integers) -> tuple[Tensor, Tensor, Tensor]:
    """Round [in, out], from the first to the last, and leave there what each lost.

    Returns: integers [out, in], scale and zero [out, groups].
    """
    width, rows = columns.shape
    group = grid.group_size or width
    # A block of whole groups: a group's columns have had every update when its scale is chosen.
    block = group * max(1, _BLOCK // group) if grid.group_size else _BLOCK
    integers = columns.new_empty(rows, width, dtype=torch.int8)
    scales = columns.new_empty(rows, width // group, dtype=torch.float32)
    zeros = columns.new_empty(rows, width // group, dtype=torch.int8)
    for start in range(0, width, block):
        here = slice(start, min(start + block, width))
        corner = factor[here, here]
        identity = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        part = columns[here].clone()
        if start:
            carried = (factor[:start, here] @ inverse).to(columns)
            part.addmm_(carried.t(), columns[:start])
        if grid.group_size is None and not start:
            scales[:], zeros[:] = grid.choose(columns.t())
        groups = slice(None) if grid.group_size is None else slice(start // group, here.stop // group)
        known = scales[:, groups], zeros[:, groups]
        updates = (inverse / inverse.diagonal().unsqueeze(1)).to(columns)
        _round_block(part, updates, grid, *known)
        # What is on the grid already comes back as the integers it was made of.
        integers[:, here] = affine.quantize(part.t(), *known, grid.bits, grid.symmetric)
        columns[here] -= part
    return integers, scales, zeros


def _round_block(
    columns: Tensor, updates: Tensor, grid: affine.Integers, scales: Tensor, zeros: Tensor
) -> None:
    """Round [n, out] in place, and choose the scales and zero points [out, groups] of groups."""
    for i, column in enumerate(columns):
        number, first = divmod(i, grid.group_size or len(columns))
        if grid.group_size and not first:
            scale, zero = grid.choose(columns[i : i + grid.group_size].t())
            scales[:, number], zeros[:, number] = scale[:, 0], zero[:, 0]
        scale, zero = scales[:, number].contiguous(), zeros[:, number].contiguous()
        rounded = affine.round_trip(column, scale, zero, grid.bits, grid.symmetric)
        columns[i + 1 :].addr_(updates[i, i + 1 :], column - rounded, alpha=-1)
        column.copy_(rounded)
