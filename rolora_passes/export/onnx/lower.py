"""Lowering a graph to ONNX: what computes every node is decided first, and then written in order."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import fx

from rolora_passes.decoding.kv_cache import require_context
from rolora_passes.decoding.ready import ready
from rolora_passes.decoding.state import require_state
from rolora_passes.errors import LoweringError
from rolora_passes.export.checking import Checked, rows
from rolora_passes.export.from_cpu import from_cpu
from rolora_passes.export.fuse_heads import fuse_heads
from rolora_passes.export.onnx.check import check_onnx
from rolora_passes.export.onnx.prepared import Prepared
from rolora_passes.export.onnx.runner import DATA, MODEL, OnnxProgram
from rolora_passes.export.onnx.weights import common_level
from rolora_passes.extras import require
from rolora_passes.files import writing_folder
from rolora_passes.graphs.graph import copy_graph
from rolora_passes.version import __version__

if TYPE_CHECKING:
    from rolora_passes.export.onnx.emitter import OnnxEmitter

Flavor = Literal["ort", "portable"]


@dataclass(frozen=True)
class OnnxReport:
    """What a lowering to ONNX wrote.

    Attributes:
        bytes: of the model and its data together.
        operators: ONNX nodes by operator.
        layers: key-value caches.
        notes: what is stored or computed otherwise than the graph says, with how often.
        checks: how the program compared with its graph.
    """

    path: Path
    flavor: str
    bytes: int
    operators: dict[str, int]
    layers: int
    notes: dict[str, int]
    seconds: float
    checks: list[Checked] = field(default_factory=list)

    def rows(self) -> list[str]:
        """Lines for people."""
        shown = [f"{n} {name.removeprefix('com.microsoft::')}" for name, n in self.operators.items() if n > 9]
        census = ", ".join(shown) + (", few others" if len(shown) < len(self.operators) else "")
        return [
            f"{self.path.name} ({self.flavor}), {self.bytes / 1e6:.1f} MB",
            f"{sum(self.operators.values())} nodes: {census}",
            *(f"{count} times: {note}" for note, count in self.notes.items()),
            *rows(self.checks),
        ]


def to_onnx(
    graph: fx.GraphModule,
    folder: str | os.PathLike[str],
    flavor: Flavor = "ort",
    *,
    max_length: int = 512,
    accuracy_level: int | None = None,
    last_token: bool = True,
    tokenizer: Any = None,
    check: bool = True,
) -> OnnxReport:
    """Lower a canonical graph to `folder`, which appears whole or not at all.

    A decoder gets a key-value cache: it takes `input_ids` [B, S], `attention_mask` [B, past + S] and
    `past_key_values.N.key` / `.value` [B, heads, past, head_dim], and returns `logits` and `present.N.key` /
    `.value`. Rows may be padded on either side. `onnxruntime_genai.Model(folder)` loads it. A graph that
    attends both ways has no cache.

    Args:
        flavor: "ort" has the fused kernels of ONNX Runtime; "portable" the standard's operators alone
            (opset 23), which run in any conforming runtime, and slower. (Of these ONNX Runtime makes its own
            int4 products, which round activations to 8 bits unless the session's entry
            `session.qdq_matmulnbits_accuracy_level` is "0"; `genai_config.json` says what the graph means.)
        max_length: tokens that prompt and answer may have together; what depends on positions alone is
            tabulated for so many.
        accuracy_level: of products with quantized weights, as ONNX Runtime numbers them. 4: activations in
            int8, by the kernel's own rounding in place of the graph's. 0: activations as the graph makes
            them, its rounding written out. None: 4 where the graph rounds to 8 bits, else 0.
        last_token: return the logits of each row's last token alone, [B, 1, V], which is what is sampled
            from; otherwise [B, S, V].
        tokenizer: saved beside the model, with its chat template, if given.
        check: run what was written in ONNX Runtime, a prompt, decoded tokens and padded rows, and leave it
            only if it gives the graph's logits; it takes seconds.

    Constant expressions are folded, and a graph in half precision is widened to float32, first. A graph on
    another device is copied to the CPU.

    Raises:
        MissingExtraError: onnx_ir is not installed; ONNX Runtime, to check.
        LoweringError: operators that have no lowering, widths or groups that no kernel has: all of them,
            with where they come from; operators that mix positions without a cache; a graph in float64; a
            model that does not compute what its graph does.
        VerificationError: folding changed the function.
        FileExistsError: `folder` is there and is not such a folder.
    """
    require_options(flavor, accuracy_level)
    require_context(max_length)
    _require_replaceable(Path(folder))
    with writing_folder(Path(folder)) as temporary:
        report = write_onnx(
            graph,
            temporary,
            flavor,
            max_length=max_length,
            accuracy_level=accuracy_level,
            last_token=last_token,
            check=check,
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return replace(report, path=Path(folder) / MODEL)


def require_options(flavor: str, accuracy_level: int | None) -> None:
    """Refuse options that `to_onnx` does not have.

    Raises:
        LoweringError: so it is.
    """
    if flavor not in get_args(Flavor):
        raise LoweringError(f"expected a flavor of {', '.join(get_args(Flavor))}, found {flavor!r}")
    if accuracy_level not in (None, 0, 4):
        raise LoweringError(f"expected accuracy_level 0, 4 or None, found {accuracy_level}")


def _require_replaceable(folder: Path) -> None:
    """Refuse to write over a folder that is something else.

    Raises:
        FileExistsError: it is there, and holds neither nothing nor a model.
    """
    if folder.exists() and not (folder / MODEL).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and holds no {MODEL}; choose another name")


@from_cpu
def write_onnx(
    graph: fx.GraphModule,
    folder: Path,
    flavor: Flavor,
    *,
    max_length: int,
    accuracy_level: int | None = None,
    last_token: bool = True,
    check: bool = True,
) -> OnnxReport:
    """`to_onnx` into a folder that is there already."""
    ir = require("onnx_ir", "onnx")
    if check:
        require("onnxruntime", "onnx")
    from rolora_passes.export.onnx.genai import session_entries, write_genai_config

    start = time.perf_counter()
    given = ready(graph)
    e = _written(_prepare(given, flavor, max_length, accuracy_level, last_token), folder, flavor)
    ir.save(_model(e, flavor), folder / MODEL)
    layers = sum(str(v.name).startswith("present") for v in e.inputs.outputs) // 2
    if layers:
        write_genai_config(e, folder, layers, share_buffer=flavor == "ort")
    census = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in e.tape.nodes)
    size = sum((folder / name).stat().st_size for name in (MODEL, DATA) if (folder / name).exists())
    checks = []
    if check:
        program, padded = OnnxProgram(folder, session_entries(e)), e.inputs.mask in e.inputs.inputs
        checks = [check_onnx(flavor, program, given, max_length, e.inputs.cached, padded)]
    seconds = round(time.perf_counter() - start, 3)
    return OnnxReport(
        folder / MODEL, flavor, size, dict(census.most_common()), layers, e.notes, seconds, checks
    )


def _prepare(
    graph: fx.GraphModule, flavor: Flavor, max_length: int, accuracy_level: int | None, last_token: bool
) -> Prepared:
    """The graph as the flavour's kernels want it, or a refusal of what they do not have.

    Raises:
        LoweringError: it is no causal decoder, or mixes positions by an operator without a cache.
    """
    module = copy_graph(graph)
    fuse_heads(module)
    if flavor == "portable":
        accuracy_level = common_level(module, accuracy_level)
    result = Prepared(module, max_length, accuracy_level, last_token)
    if flavor == "ort" and not result.cached:
        raise LoweringError(
            "expected a causal decoder, which the flavour 'ort' has kernels for, found attention both ways "
            f"or inputs {result.inputs}: take flavor='portable'"
        )
    return result


def _written(graph: Prepared, folder: Path, flavor: Flavor) -> OnnxEmitter:
    """All that the model of a graph has, its large tensors in the folder already."""
    from rolora_passes.export.onnx.emitter import OnnxEmitter
    from rolora_passes.export.onnx.matching import match_all, write_all
    from rolora_passes.export.onnx.ort import ORT
    from rolora_passes.export.onnx.portable import PORTABLE
    from rolora_passes.export.onnx.store import Store

    kernels = ORT if flavor == "ort" else PORTABLE
    matches = match_all(graph, kernels)
    if graph.cached:
        require_state(graph.module)
    e = OnnxEmitter(graph, kernels.inputs, Store(folder, DATA))
    write_all(e, matches)
    _return_logits(e)
    if not e.inputs.mask.uses():
        e.inputs.inputs.remove(e.inputs.mask)
        e.note("nothing reads a mask: the rows of a batch must be of one length")
    return e


def _return_logits(e: OnnxEmitter) -> None:
    """Have the model return what the graph does, by the name of logits."""
    import onnx_ir as ir

    value = e.read_output()
    value.name = "logits"
    shape = e.shape(e.reader.args[0])
    names = ["batch", "length"] if e.inputs.cached else [str(s) for s in shape[:-1]]
    sizes: list[int | str] = [names[0], 1, *names[2:]] if e.graph.last_token else list(names)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([*sizes, shape[-1]])
    e.inputs.outputs.insert(0, value)


def _model(e: OnnxEmitter, flavor: Flavor) -> Any:
    """An `onnx_ir.Model` of what was emitted."""
    import onnx_ir as ir

    used = {i for node in e.tape.nodes for i in node.inputs if i is not None}
    graph = ir.Graph(
        e.inputs.inputs,
        e.inputs.outputs,
        nodes=e.tape.nodes,
        initializers=[v for v in e.store.values if v in used],
        opset_imports={"": 21, "com.microsoft": 1} if flavor == "ort" else {"": 23},
        name="model",
    )
    version = 10 if flavor == "ort" else 11
    return ir.Model(graph, ir_version=version, producer_name="rolora-passes", producer_version=__version__)
