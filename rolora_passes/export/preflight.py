"""What a recipe asks of a target's kernels, tried on a stand-in before any weight is loaded.

A configuration says which linears a model has and how wide they are. The stand-in has the same linears, by
name and with their true inputs, but few outputs each, and no layers around them. A recipe's quantizers run on
it, and it is lowered: whatever they or the lowering refuse, they refuse here, in their own words and at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

import rolora_passes.graphs.operators  # noqa: F401  (defines torch.ops.rolora)
from rolora_passes.adapters.exchange import load_adapter
from rolora_passes.errors import CaptureError, LoweringError
from rolora_passes.export.target import TARGETS, Target
from rolora_passes.graphs.bases.rotations import load_rotations
from rolora_passes.graphs.graph import add_parameter, aten, finish, site_names
from rolora_passes.graphs.info import set_info
from rolora_passes.graphs.sites import matches
from rolora_passes.loading.models import load_outline
from rolora_passes.passes.add_kv_cache import AddKVCache
from rolora_passes.passes.add_lora import AddLoRA
from rolora_passes.passes.base import Pass
from rolora_passes.passes.fold_constants import FoldConstants
from rolora_passes.passes.loftq import LoftQ
from rolora_passes.passes.manager import apply_passes
from rolora_passes.passes.merge_lora import MergeLoRA
from rolora_passes.passes.observe_activations import ObserveActivations
from rolora_passes.passes.quantize_activations import QuantizeActivations
from rolora_passes.passes.quantize_embedding import QuantizeEmbedding
from rolora_passes.passes.quantize_kv_cache import QuantizeKVCache
from rolora_passes.passes.quantize_weights import QuantizeWeights
from rolora_passes.passes.smooth_quant import SmoothQuant
from rolora_passes.quantize.clips import CLIPS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 16  # outputs of a linear of the stand-in; more where branches have a higher rank
_FORMS = (QuantizeKVCache, QuantizeEmbedding, ObserveActivations, SmoothQuant, MergeLoRA, FoldConstants)


@dataclass(frozen=True)
class Outline:
    """What a configuration says of a decoder.

    Attributes:
        linears: the width that each linear reads, by name; the head is the last.
        embedding: the name and the width of the token table.
        heads: how many of queries, how many of keys and values, and their width.
        layers: how many attend.
        vocabulary: token ids are below this.
        positions: how many tokens of context it is made for; None if the configuration does not say.
    """

    linears: dict[str, int]
    embedding: tuple[str, int]
    heads: tuple[int, int, int]
    layers: int
    vocabulary: int
    positions: int | None


def outline(source: str) -> Outline:
    """Read a model's configuration, and no weights.

    Raises:
        CaptureError: nothing there, or not the configuration of a causal language model.
    """
    model = load_outline(source)
    names = {id(module): name for name, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside = [module for module in model.get_decoder().modules() if module is not head]
    found = {names[id(module)]: width for module in inside if (width := _width(module))}
    if head is not None and (width := _width(head)):
        found[names[id(head)]] = width
    rows, width = table.weight.shape
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum(kind in ("full_attention", "sliding_attention") for kind in kinds)
    positions = getattr(config, "max_position_embeddings", None)
    return Outline(found, (names[id(table)], int(width)), _heads(model), layers, int(rows), positions)


def _width(module: nn.Module) -> int | None:
    """What a linear reads: [out, in], or [in, out] of GPT-2's; None of any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.weight.shape[0])
    return int(module.weight.shape[1]) if isinstance(module, nn.Linear) else None


def _heads(model: PreTrainedModel) -> tuple[int, int, int]:
    """Those of all layers; where a configuration does not say them by these names, some that kernels have."""
    config: Any = model.config.get_text_config()
    count = getattr(config, "num_attention_heads", None)
    if not isinstance(count, int):
        return 1, 1, 64
    kv, width = (getattr(config, name, None) for name in ("num_key_value_heads", "head_dim"))
    return count, kv or count, width or config.hidden_size // count


def require_vocabulary(known: Outline, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives plain text ids which the model has no embedding of.

    Raises:
        CaptureError: so it does. (Tokens added for other inputs, say images, may well lie beyond the table.)
    """
    if tokenizer.vocab_size > known.vocabulary:
        raise CaptureError(
            f"expected a tokenizer of at most {known.vocabulary} tokens, which the model has embeddings of, "
            f"found {tokenizer.vocab_size}: it is another model's"
        )


def require_memory(known: Outline, passes: Sequence[Pass], max_length: int) -> None:
    """Refuse a context whose caches, tables and activations are more than this machine's memory holds.

    The graph has caches and tables, and so has the runtime that tries the program, which plans for a call of
    the whole context.

    Raises:
        LoweringError: says how much they take, and the longest context there is memory for.
    """
    _, heads, width = known.heads
    size = 1 if any(isinstance(step, QuantizeKVCache) for step in passes) else 4
    held = 2 * heads * width * size * known.layers + 2 * width * 4  # keys and values; sine and cosine
    one = 2 * held + 4 * sum(set(known.linears.values()))  # at least: what a layer's linears read
    if max_length > (most := _memory() // one):
        raise LoweringError(
            f"a context of {max_length} tokens takes {one * max_length / 1e9:.3g} GB to compile, most of it "
            f"caches, and this machine has {_memory() / 1e9:.3g} GB: give a --max-length of {most} or less"
        )


def _memory() -> int:
    """Bytes of memory that the system says this process may have; else all that it can address."""
    found = [sys.maxsize]
    with suppress(AttributeError, ValueError, OSError):  # Windows has none of this
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError, OSError):  # the limit of a container, if there is one
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return min(found)


def require_kernels(known: Outline, passes: Sequence[Pass], targets: Iterable[Target]) -> None:
    """Try a recipe on a stand-in for a model, and ask the targets whether they can lower what it makes.

    Raises:
        PassError, LoweringError: what a quantizer or a target refuses.
    """
    graph = stand_in(known, passes)
    for target in targets:
        with TARGETS.telling(target.name):
            refusal = target.can(graph)
        if refusal is not None:
            raise refusal


def require_files(passes: Sequence[Pass]) -> None:
    """Read the adapters and rotations that a recipe names, and refuse what is wrong with them."""
    for step in passes:
        given, adapter = (getattr(step, name, None) for name in ("given", "adapter"))
        if isinstance(given, (str, Path)):
            load_rotations(given)
        if adapter is not None:
            load_adapter(adapter)


def stand_in(known: Outline, passes: Sequence[Pass]) -> fx.GraphModule:
    """A small decoder whose linears have the forms that a recipe gives those of the model.

    Passes that train or turn are left out, for they leave the forms alone, and those of other packages.

    Raises:
        PassError: a quantizer refuses the model, say for groups that do not divide what a linear reads.
        LoweringError: a recipe with add-kv-cache, which lowering does itself.
    """
    ranks = [step.rank for step in passes if isinstance(step, (AddLoRA, LoftQ))]
    linears = _one_of_each(known.linears, passes)
    graph = _sketch(dataclasses.replace(known, linears=linears), max([_ROWS, *ranks]))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for form in (form for step in passes for form in _forms(step)):
        targets = getattr(form, "targets", "all-linear")
        if any(matches(name, targets) for name in site_names(graph).values()):  # else of what is not sketched
            graph = apply_passes(graph, [form], verify=False, calibration=tokens)
    return apply_passes(graph, [FoldConstants()], verify=False)


def _one_of_each(linears: dict[str, int], passes: Sequence[Pass]) -> dict[str, int]:
    """Of the linears that no pass tells apart, such as those of equal layers, the first; and the head."""
    patterns = [p for step in passes for p in (getattr(step, "targets", ()), getattr(step, "exclude", ()))]
    *inner, head = linears
    first: dict[object, str] = {}
    for name in inner:
        kind = re.sub(r"\d+", "", name), linears[name], *(matches(name, pattern) for pattern in patterns)
        first.setdefault(kind, name)
    return {name: linears[name] for name in (*first.values(), head)}


def _forms(step: Pass) -> Iterator[Pass]:
    """What gives a graph the same forms as a pass, without a look at data or at weights."""
    change: Any = dataclasses.replace
    if isinstance(step, AddKVCache):
        raise LoweringError(
            f"the cache is added when a graph is lowered: leave {step.name} out of the recipe"
        )
    if isinstance(step, QuantizeWeights):
        yield change(step, method="rtn" if step.method == "gptq" else step.method, clip_search=False)
    elif isinstance(step, QuantizeActivations) and step.clip_search:
        yield change(step, clip_search=False, clip=CLIPS[1])
    elif isinstance(step, LoftQ):
        sites: Any = {"targets": step.targets, "exclude": step.exclude}
        yield QuantizeWeights(int(step.bits), step.group_size, grid=step.grid, head=None, **sites)
        yield AddLoRA(targets=step.targets, rank=step.rank)
    elif isinstance(step, AddLoRA):
        yield AddLoRA(rank=step.rank)  # which linears have one makes no difference
    elif isinstance(step, (QuantizeActivations, *_FORMS)):
        yield step


def _sketch(known: Outline, rows: int) -> fx.GraphModule:
    """forward(tokens, positions) -> logits [B, S, rows], by way of every linear, and of one attention."""
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    call = graph.graph.call_function
    tokens = graph.graph.placeholder("tokens")
    graph.graph.placeholder("positions")
    set_info(graph, config={"vocab_size": rows})

    def one(x: fx.Node) -> fx.Node:
        return call(aten.slice.Tensor, (x, -1, 0, 1))

    def wide(x: fx.Node, width: int) -> fx.Node:
        ones = add_parameter(graph, f"stand_in.ones_{width}", torch.ones(width))
        return call(aten.mul.Tensor, (one(x), ones))

    def linear(x: fx.Node, name: str, width: int) -> fx.Node:
        return call(aten.linear.default, (x, add_parameter(graph, f"{name}.weight", torch.ones(rows, width))))

    name, width = known.embedding
    table = add_parameter(graph, f"{name}.weight", torch.ones(rows, width))
    start = call(aten.embedding.default, (table, tokens))
    *inner, head = known.linears.items()
    inputs = {width: wide(start, width) for width in dict.fromkeys(known.linears.values())}
    parts = [one(_attend(graph, start, wide, known.heads))]
    parts += [call(aten.relu.default, (linear(inputs[width], name, width),)) for name, width in inner]
    total = parts[0]
    for part in parts[1:]:
        total = call(aten.add.Tensor, (one(part), total))
    graph.graph.output(linear(wide(total, head[1]), *head))
    return finish(graph)


def _attend(graph: fx.GraphModule, start: fx.Node, wide: Any, heads: tuple[int, int, int]) -> fx.Node:
    call = graph.graph.call_function
    count, kv, width = heads
    query, key, value = (
        call(aten.unflatten.int, (wide(start, n * width), -1, [n, width])) for n in (count, kv, kv)
    )
    mixed = call(torch.ops.rolora.attention.default, (query, key, value, width**-0.5))
    return call(aten.flatten.using_ints, (mixed, 2, 3))
