"""Lowering a graph to ONNX: one walk over its nodes, with the operators of one of two flavours."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch import fx

from rolora_passes.decoding.kv_cache import require_context
from rolora_passes.decoding.positions import position_only, tabulate
from rolora_passes.decoding.ready import ready
from rolora_passes.decoding.state import require_state
from rolora_passes.errors import LoweringError
from rolora_passes.export.checking import Checked, rows
from rolora_passes.export.fuse_heads import fuse_heads
from rolora_passes.extras import require
from rolora_passes.files import writing_folder
from rolora_passes.graphs.graph import KEPT, argument, copy_graph, is_op, op_name
from rolora_passes.version import __version__

if TYPE_CHECKING:
    from rolora_passes.export.onnx.emitter import Emitter

Flavor = Literal["ort", "portable"]
MODEL, DATA = "model.onnx", "model.onnx.data"
INPUTS = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids"}
"""What a graph's inputs are called."""


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

    Constant expressions are folded, and a graph in half precision is widened to float32, first.

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
    require_replaceable(Path(folder))
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


def require_replaceable(folder: Path) -> None:
    """Refuse to write over a folder that is something else.

    Raises:
        FileExistsError: it is there, and holds neither nothing nor a model.
    """
    if folder.exists() and not (folder / MODEL).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and holds no {MODEL}; choose another name")


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
    from rolora_passes.export.onnx.emitter import Emitter, Settings
    from rolora_passes.export.onnx.genai import session_entries, write_genai_config
    from rolora_passes.export.onnx.ort import ORT
    from rolora_passes.export.onnx.portable import PORTABLE
    from rolora_passes.export.onnx.store import Store
    from rolora_passes.export.onnx.weights import common_level

    start = time.perf_counter()
    given = ready(graph)
    prepared = copy_graph(given)
    fuse_heads(prepared)
    table = ORT if flavor == "ort" else PORTABLE
    if flavor == "portable":
        accuracy_level = common_level(prepared, accuracy_level)
    e = Emitter(prepared, table, Store(folder, DATA), Settings(max_length, accuracy_level))
    _lower(e, flavor, last_token)
    ir.save(_model(e, flavor), folder / MODEL)
    layers = sum(str(v.name).startswith("present") for v in e.inputs.outputs) // 2
    if layers:
        write_genai_config(prepared, e, folder, layers, max_length, share_buffer=flavor == "ort")
    census = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in e.tape.nodes)
    size = sum((folder / name).stat().st_size for name in (MODEL, DATA) if (folder / name).exists())
    checks = []
    if check:
        from rolora_passes.export.onnx.check import check_onnx
        from rolora_passes.export.onnx.runner import OnnxProgram

        program, padded = OnnxProgram(folder, session_entries(e)), e.inputs.mask in e.inputs.inputs
        checks = [check_onnx(flavor, program, given, max_length, e.inputs.cached, padded)]
    seconds = round(time.perf_counter() - start, 3)
    return OnnxReport(
        folder / MODEL, flavor, size, dict(census.most_common()), layers, e.notes, seconds, checks
    )


def _model(e: Emitter, flavor: Flavor) -> Any:
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


# Lowered where they are read, if they are: what kernels take over must leave nothing behind.
_ON_DEMAND = (
    "dequantize", "decode", "fake_quantize", "rotary_embedding", "unflatten", "slice", "flatten", "sym_size",
)  # fmt: skip


def _lower(e: Emitter, flavor: Flavor, last_token: bool) -> None:
    """Lower all of a graph, and say what the model takes and returns."""
    from rolora_passes.export.onnx.inputs import CompactInputs, MaskedInputs

    graph = e.graph.graph
    names = [str(n.target) for n in graph.find_nodes(op="placeholder")]
    cached = _has_cache(e.graph, names)
    if flavor == "ort" and not cached:
        raise LoweringError(
            "expected a causal decoder, which the flavour 'ort' has kernels for, found attention both ways "
            f"or inputs {names}: take flavor='portable'"
        )
    e.inputs = (CompactInputs if flavor == "ort" else MaskedInputs)(e, names, cached)
    skipped = set(e.constants)
    for positions in (n for n in graph.find_nodes(op="placeholder") if n.target == "positions"):
        e.tables = tabulate(e.graph, positions, e.settings.max_length)
        skipped |= position_only(graph, positions)
    nodes = [n for n in graph.nodes if n.op == "call_function" and n not in skipped]
    _require_lowerings(e, nodes)
    if cached:
        require_state(e.graph)
    if cached and last_token:
        _narrow(e)
    _walk(e, [n for n in nodes if not is_op(n, *_ON_DEMAND)])
    _return(e, cached and last_token)
    if not e.inputs.mask.uses():
        e.inputs.inputs.remove(e.inputs.mask)
        e.note("nothing reads a mask: the rows of a batch must be of one length")


def _has_cache(graph: fx.GraphModule, names: list[str]) -> bool:
    attentions = [n for n in graph.graph.nodes if is_op(n, "attention")]
    causal = all(argument(n, "causal") for n in attentions)
    return names == ["tokens", "positions"] and bool(attentions) and causal


def _require_lowerings(e: Emitter, nodes: list[fx.Node]) -> None:
    """Refuse operators that have none, all at once and before anything is written."""
    lacking = [n for n in nodes if op_name(n) not in e.table and op_name(n) not in KEPT]
    if lacking:
        lines = "\n".join(f"  {n.target}: {_where(n)}" for n in lacking)
        raise LoweringError(
            f"{len(lacking)} nodes have operators without a lowering to ONNX; express them by others, or add "
            f"a lowering to rolora_passes/export/onnx/ops.py:\n{lines}"
        )


def _where(node: fx.Node) -> str:
    """The line of the model that made a node, where capture has kept it."""
    source = node.meta.get("source")
    return f"`{node.name}`" + (f", {source}" if source else "")


def _narrow(e: Emitter) -> None:
    """Mark what is computed for each row's last token alone: what nothing but the logits is made of."""
    from rolora_passes.export.onnx.ops import is_rowwise

    e.narrowed.add(e.graph.graph.output_node())
    for node in reversed(e.graph.graph.nodes):
        alone = all(user in e.narrowed for user in node.users)
        if node.op == "call_function" and node not in e.constants and alone and is_rowwise(e, node):
            e.narrowed.add(node)


def _walk(e: Emitter, nodes: list[fx.Node]) -> None:
    """Lower nodes in order; what cannot be lowered is collected, to be told together.

    Raises:
        LoweringError: there is some.
    """
    import onnx_ir as ir

    refused = []
    for node in nodes:
        try:
            e.result(node)
        except LoweringError as error:
            refused.append(f"  {error} ({_where(node)})")
            e.results[node] = ir.Value(name=node.name)  # so that the nodes behind it are looked at too
    if refused:
        raise LoweringError("\n".join([f"{len(refused)} nodes cannot be lowered to ONNX:", *refused]))


def _return(e: Emitter, last_token: bool) -> None:
    import onnx_ir as ir

    output = e.graph.graph.output_node()
    result = cast(fx.Node, output.args[0])
    value = e.value(result)
    if value.producer() is None:
        value = e.op("Identity", value)
    value.name = "logits"
    names = ["batch", "length"] if e.inputs.cached else [str(s) for s in e.shape(result)[:-1]]
    sizes: list[int | str] = [names[0], 1, *names[2:]] if last_token else list(names)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([*sizes, e.shape(result)[-1]])
    e.inputs.outputs.insert(0, value)
