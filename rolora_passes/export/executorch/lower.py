"""Lowering a graph to an ExecuTorch program (`.pte`) that the stock runner drives."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from rolora_passes.decoding.kv_cache import add_kv_cache
from rolora_passes.decoding.ready import ready
from rolora_passes.decoding.state import require_state
from rolora_passes.errors import LoweringError
from rolora_passes.export.checking import Checked, Reference, check_decoder, rows
from rolora_passes.export.clock import Clock
from rolora_passes.export.executorch.embeddings import fuse_embeddings
from rolora_passes.export.executorch.rotary import expand_rotary
from rolora_passes.export.executorch.runner import load_pte
from rolora_passes.export.executorch.variants import require_variants
from rolora_passes.export.from_cpu import from_cpu
from rolora_passes.export.fuse_heads import fuse_heads
from rolora_passes.extras import require
from rolora_passes.files import writing
from rolora_passes.graphs.buffers import written
from rolora_passes.graphs.graph import KEPT, copy_graph, get_tensor, is_op, linears
from rolora_passes.graphs.info import info
from rolora_passes.graphs.inputs import require_decoder
from rolora_passes.graphs.shapes import Shape, infer_static

CANONICAL: dict[str, Shape] = {"tokens": (1, None), "positions": (1, None)}
CACHED: dict[str, Shape] = {"tokens": (1, None), "input_pos": (1,)}
# How the names of the methods begin that the runner reads its metadata from.
_RUNNERS = ("get_", "use_", "enable_")
_WIDENED = "{} linears with rounded weights stored in float32: no kernel reads them as the recipe rounds them"


@dataclass(frozen=True)
class LoweringReport:
    """What a lowering wrote, and what it left outside the delegates."""

    path: Path
    bytes: int
    delegates: int
    """Of all methods."""
    operators: dict[str, int]
    """Instructions of forward that are not delegate calls, by operator."""
    cache_bytes: int
    """What the caches of keys and values take in memory, for each method that is loaded."""
    seconds: dict[str, float]
    """CPU seconds by step."""
    widened: int = 0
    """Linears of forward whose rounded weights are stored in float32: no kernel reads them as they are."""
    checks: list[Checked] = field(default_factory=list)
    """How every method compared with its graph."""

    def rows(self) -> list[str]:
        """Lines for people."""
        outside = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        return [
            f"{self.path.name}, {self.bytes / 1e6:.1f} MB",
            f"{self.delegates} XNNPACK delegates",
            f"{sum(self.operators.values())} instructions outside: {outside}",
            *([_WIDENED.format(self.widened)] if self.widened else []),
            *rows(self.checks),
        ]


@from_cpu
def to_executorch(
    graph: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    max_length: int = 512,
    last_token: bool = True,
    fast_prefill: bool = False,
    methods: Mapping[str, fx.GraphModule] | None = None,
    check: bool = True,
) -> LoweringReport:
    """Lower a canonical graph to `path` and say what became of it.

    Constant expressions are folded, and a graph in half precision is widened to float32, first. A graph on
    another device is copied to the CPU.

    Args:
        graph: `forward(tokens, positions) -> logits`, or what `add_kv_cache` made of it; weights plain,
            or as `rolora::dequantize` of integers.
        path: the `.pte`; written only when everything has succeeded.
        max_length: tokens the caches hold. Taken from the graph if it has caches already.
        last_token: return the logits of the last token alone, [1, 1, V], as the runner needs; otherwise
            of all tokens, [1, S, V].
        fast_prefill: let calls that start at position 0 attend in XNNPACK, over their own keys and values: a
            third more prefill speed, for a second delegate in every layer and longer lowering.
        methods: other graphs, beside `forward`, by name: one base with one adapter or another. What they
            share is in the file once; each has its own caches, and the heads' projections are not joined.
        check: run what was written, and leave it only if every method gives its graph's logits.

    Raises:
        MissingExtraError: ExecuTorch is not installed.
        LoweringError: a graph that no kernel or cache can hold, a method's name that is no identifier or
            is taken, or a program that does not compute what its graph does.
        VerificationError: folding changed the function.
    """
    _require_executorch()
    require_methods(methods or {})
    graphs, clock = {"forward": graph, **(methods or {})}, Clock(time.process_time)
    made = {
        name: _method(each, max_length, last_token, fast_prefill, len(graphs) == 1, clock)
        for name, each in graphs.items()
    }
    length, call = _require_one_length(made), min(method.call for method in made.values())
    metadata = _metadata(made["forward"].caches, info(graph).config, length, call)
    program = _program({name: method.lowered for name, method in made.items()}, call, metadata, clock)
    held = max(sum(method.caches.values()) for method in made.values())
    count = sum(method.delegates for method in made.values())
    graphs = {name: method.ready for name, method in made.items()}
    with writing(Path(path)) as temporary:
        with clock.step("write"), temporary.open("wb") as file:
            program.write_to_file(file)
        operators, size = _operators(program), temporary.stat().st_size
        del program, made  # what the runtime loads takes their place
        with clock.step("check"):
            checks = [_check(temporary, name, each, length) for name, each in graphs.items() if check]
    widened = _widened(graphs["forward"])
    return LoweringReport(Path(path), size, count, operators, held, clock.seconds, widened, checks)


def _widened(graph: fx.GraphModule) -> int:
    from rolora_passes.export.executorch.xnnpack.linear import kernel_form

    rounded = [n for n in linears(graph) if is_op(n.args[1], *KEPT)]

    def tensor(node: fx.Node) -> Tensor:
        return get_tensor(graph, str(node.target))

    return sum(kernel_form(n.args[1], is_op(n.args[0], "fake_quantize"), tensor) is None for n in rounded)


@dataclass(frozen=True)
class _Method:
    """One of a program's graphs.

    Attributes:
        ready: as `ready` made it, to check the program against.
        lowered: with caches and delegates.
        length, call: how many tokens the caches hold, and a call may have.
        caches: their bytes, by name.
    """

    ready: fx.GraphModule
    lowered: fx.GraphModule
    delegates: int
    length: int
    call: int
    caches: dict[str, int]


def _method(
    graph: fx.GraphModule, max_length: int, last_token: bool, fast_prefill: bool, fused: bool, clock: Clock
) -> _Method:
    from rolora_passes.export.executorch.xnnpack.partition import delegate_to_xnnpack

    with clock.step("prepare"):
        given = _ready(graph)
        require_variants(given)
        prepared = _prepare(given, max_length, last_token, fused)
    with clock.step("delegate"):
        lowered, delegates = delegate_to_xnnpack(prepared, CACHED, fast_prefill)
    caches = {name: get_tensor(prepared, name).nbytes for name in written(prepared.graph)}
    length, call = cast("tuple[int, int]", info(prepared).cached)
    return _Method(given, lowered, delegates, length, call, caches)


def _require_one_length(methods: Mapping[str, _Method]) -> int:
    """The tokens that all caches hold; methods that differ in it are refused."""
    found = {name: method.length for name, method in methods.items()}
    if len({*found.values()}) > 1:
        raise LoweringError(f"expected methods whose caches hold equally many tokens, found {found}")
    return min(found.values())


def _ready(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy for the kernels' arithmetic, of which a cache can be made, or has been."""
    if info(graph).cached is not None:
        return ready(graph)
    require_decoder(graph, "ExecuTorch's runner")
    result = ready(graph)
    require_state(result)
    return result


def _check(pte: Path, method: str, graph: fx.GraphModule, length: int) -> Checked:
    forward = load_pte(pte, method)
    return check_decoder(method, lambda t, start: forward(t, torch.tensor([start])), Reference(graph, length))


def require_methods(names: Iterable[str]) -> None:
    """Refuse names that methods beside `forward` cannot have.

    Raises:
        LoweringError: no identifier, or one that the runner's own methods have.
    """
    for name in names:
        if not name.isidentifier() or name == "forward" or name.startswith(_RUNNERS):
            raise LoweringError(
                "expected names of methods that are identifiers, not forward, and do not begin with "
                f"{' or '.join(_RUNNERS)}, found {name!r}"
            )


def _prepare(graph: fx.GraphModule, max_length: int, last_token: bool, fused: bool) -> fx.GraphModule:
    """A copy with caches, in the operators and the grouping that suit the kernels."""
    from rolora_passes.export.executorch.last_token import keep_last_token

    cached, result = info(graph).cached is not None, copy_graph(graph)
    if fused:
        fuse_heads(result)
    shapes = infer_static(result, CACHED if cached else CANONICAL)
    expand_rotary(result, {node: shape[-1] for node, (shape, _) in shapes.items() if shape and shape[-1]})
    fuse_embeddings(result)
    result = result if cached else add_kv_cache(result, max_length)
    if last_token:
        keep_last_token(result)
    return result


def _require_executorch() -> None:
    """Import ExecuTorch and the libraries that define the operators a program calls."""
    for module in (
        "executorch.exir",
        "executorch.extension.llm.custom_ops.custom_ops",
        "executorch.kernels.quantized",
    ):
        require(module, "executorch")


def _program(
    graphs: Mapping[str, fx.GraphModule], length: int, metadata: dict[str, Any], clock: Clock
) -> Any:
    """The serialised program of graphs, by method, whose delegates are made."""
    from executorch import exir
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    example = (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    dynamic = ({1: torch.export.Dim("length", min=1, max=length)}, None)
    with clock.step("export"), torch.no_grad():
        exported = {
            name: torch.export.export(graph, example, dynamic_shapes=dynamic, strict=False)
            for name, graph in graphs.items()
        }
    with clock.step("edge"):
        config = exir.EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = exir.to_edge(exported, compile_config=config, constant_methods=metadata)
    with clock.step("program"):
        backend = exir.ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
        return edge.to_executorch(backend)


def _metadata(caches: Iterable[str], config: Mapping[str, Any], length: int, call: int) -> dict[str, Any]:
    """The constant methods the runner reads; a prompt of more than `call` tokens it gives in pieces."""
    layers = sum(re.fullmatch(r"cache_*\.key_\d+", name) is not None for name in caches)
    ends = config.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    found = {
        "get_max_seq_len": call,
        "get_max_context_len": length,
        "get_bos_id": config.get("bos_token_id"),
        "get_eos_ids": ends,
        "get_vocab_size": config.get("vocab_size"),
        "get_n_layers": layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    return {name: value for name, value in found.items() if value not in (None, [])}


def _operators(program: Any) -> dict[str, int]:
    """Instructions outside delegates, by operator."""
    plan = next(p for p in program.executorch_program.execution_plan if p.name == "forward")
    found: Counter[str] = Counter()
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if type(call).__name__ == "KernelCall":
            operator = plan.operators[call.op_index]
            found[f"{operator.name}.{operator.overload}".rstrip(".")] += 1
    return dict(found.most_common())
