"""Elements a second of the arithmetic under the passes: transforms, grids, packing, GPTQ.

    python benchmarks/arithmetic.py [--beside CHECKOUT] [--only WORDS] [--seconds 0.5]

`--beside` measures the package in a checkout of another commit too, in turns with this one. Figures are the
best of several calls, by CPU time: a core that others use as well counts for what it gave here.
`OMP_NUM_THREADS=1` gives those of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rolora_passes.graphs.operators.transforms import rotate
from rolora_passes.numerics import affine, gptq, hadamard

Case = tuple[str, float, Callable[[], object]]  # its name, its elements, and what is timed
ORDERS = (64, 128, 576, 1536, 2048, 4096, 8192, 14336)
MATRIX = 1 << 22  # elements of a matrix, about
BLOCK = 1 << 17  # of a block of one


def transforms(dtype: torch.dtype) -> Iterator[Case]:
    """A whole matrix and a block of one, along its last axis and its first."""
    for order in ORDERS:
        for elements, size in ((MATRIX, "matrix"), (BLOCK, "block")):
            for dim in (1, 0):
                shape = [max(1, elements // order)] * 2
                shape[dim] = order
                x = torch.randn(shape, dtype=dtype)
                name = f"transform {order} of axis {dim}, {size}, {dtype}"
                yield name, x.numel(), lambda x=x, n=order, d=dim: hadamard.transform(x, n, d)
    signs = torch.ones(2048)
    for dim in (1, 0):
        x = torch.randn(2048, 2048, dtype=dtype)
        name = f"rotate 2048 of axis {dim}, matrix, {dtype}"
        yield name, x.numel(), lambda x=x, d=dim: rotate(x, signs, d)


def grids(dtype: torch.dtype) -> Iterator[Case]:
    for rows, size in ((2048, "matrix"), (64, "block")):
        for symmetric in (True, False):
            x = torch.randn(rows, 2048, dtype=dtype)
            scale, zero = affine.choose_qparams(x, 32, 4, symmetric)
            end = f"{'' if symmetric else 'a'}symmetric, {size}, {dtype}"
            calls: dict[str, Callable[..., object]] = {
                "choose scales of 32": lambda x, s, z, q: affine.choose_qparams(x, 32, 4, q),
                "round in groups of 32": lambda x, s, z, q: affine.quantize(x, s, z, 4, q),
                "fake-quantize in groups of 32": lambda x, s, z, q: affine.fake_quantize(x, 4, 32, q),
            }
            for name, call in calls.items():
                yield (
                    f"{name}, {end}",
                    x.numel(),
                    lambda c=call, x=x, s=scale, z=zero, q=symmetric: c(x, s, z, q),
                )


def packing() -> Iterator[Case]:
    from rolora_passes.export.onnx import weights

    q = torch.randint(-8, 8, (2048, 2048), dtype=torch.int8)
    yield "pack nibbles, ONNX INT4", q.numel(), lambda: weights.pack_signed(q)
    for bits in (4, 8):
        known = weights.KernelWeight("w", q, torch.ones(2048, 64), None, bits)
        yield f"pack blocks of {bits} bits, ONNX", q.numel(), lambda known=known: weights.blocks(known, 32, 1)


def rounding(width: int = 2048) -> Iterator[Case]:
    for rows in (width // 4, width):
        weight, x = torch.randn(rows, width), torch.randn(width + 256, width)
        hessian: Tensor = x.T @ x
        for group in (32, None):
            name = f"gptq [{rows}, {width}], {'rows' if group is None else f'groups of {group}'}"
            grid = affine.Integers(4, group)
            yield name, weight.numel(), lambda w=weight, h=hessian, g=grid: gptq.gptq(w, h, g)


def cases() -> Iterator[Case]:
    for dtype in (torch.float64, torch.float32):
        yield from transforms(dtype)
        yield from grids(dtype)
    yield from packing()
    yield from rounding()


def rate(elements: float, call: Callable[[], object], seconds: float) -> float:
    """Elements a CPU-second of the fastest call, of those that fit, at least three."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return elements / min(times)


def measured(only: str, seconds: float, checkout: str | None) -> dict[str, float]:
    """What a process of its own finds, for the package here or in another checkout."""
    command = [sys.executable, __file__, "--json", "--only", only, "--seconds", str(seconds)]
    path = {"PYTHONPATH": checkout} if checkout else {}
    done = subprocess.run(command, env={**os.environ, **path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", metavar="CHECKOUT", help="of the commit to compare with")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.json:
        print(json.dumps({n: rate(e, c, options.seconds) for n, e, c in cases() if options.only in n}))
        return
    checkouts = [options.beside, None] if options.beside else [None]
    rounds = [[measured(options.only, options.seconds, c) for c in checkouts] for _ in range(2)]
    columns = [
        {name: max(r[name] for r in turns) for name in turns[0]} for turns in zip(*rounds, strict=True)
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; million elements a CPU-second")
    for name in columns[-1]:
        print(f"{name.replace('torch.', ''):<64}" + "".join(f"{c[name] / 1e6:>10.1f}" for c in columns))


if __name__ == "__main__":
    main()
