"""What a file that somebody else wrote may name: operators, types, parameters. Anything else is refused.

fx turns a graph into Python code, and a parameter's name becomes attributes of modules, so names are checked
before either is made.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from rolora_passes.errors import GraphFormatError
from rolora_passes.graphs.operators.registry import OURS, SETS, operators

# Of Python's functions those that have a record: they compute with sizes, and take results apart.
_PYTHON = {r.name: getattr(operator, r.name.partition(".")[2]) for r in OURS if "::" not in r.name}
# ATen's operators with an underscore are its insides, and some trust their arguments; these are in graphs.
_INSIDES = {
    "__and__", "__or__", "__xor__", "_softmax", "_log_softmax", "_safe_softmax", "_to_copy", "_unsafe_view",
}  # fmt: skip
_OUTSIDE = {"from_file"}  # reads and makes files
_TYPES = (torch.dtype, torch.layout, torch.memory_format)
_TYPES_BY_NAME = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, _TYPES)}
_PART = re.compile(r"[\w\-/:+@ ]+")
_BARE = fx.GraphModule(torch.nn.Module(), fx.Graph())


def operator_name(target: Any) -> str:
    """What a file calls an operator: `aten.linear.default`, or `operator.getitem`.

    Raises:
        GraphFormatError: `find_operator` would refuse it.
    """
    name = next((name for name, function in _PYTHON.items() if function is target), str(target))
    if find_operator(name) is not target:
        raise GraphFormatError(f"{target} is not a registered operator")
    return name


def find_operator(name: object) -> Callable[..., Any]:
    """The operator of a name: ATen's, or one with a record, that computes values from values and no more.

    Operators that write into a tensor, or to a file, and functions of Python are refused.

    Raises:
        GraphFormatError: no such operator, or one that a file may not name.
    """
    if isinstance(name, str) and name in _PYTHON:
        found: Callable[..., Any] = _PYTHON[name]
        return found
    parts = name.split(".") if isinstance(name, str) else []
    known = len(parts) == 3 and (parts[0] == "aten" or f"{parts[0]}::{parts[1]}" in operators())
    if not known or not all(re.fullmatch(r"\w+", p) for p in parts):
        raise GraphFormatError(
            f"the graph calls {name!r}, which is not a registered operator of aten or rolora, nor one that "
            f"an installed package has a record of ({SETS.group}); a graph holds no other functions"
        )
    namespace, base, overload = parts
    try:
        torch._C._dispatch_find_schema_or_throw(
            f"{namespace}::{base}", "" if overload == "default" else overload
        )
    except RuntimeError as error:
        raise GraphFormatError(
            f"the graph calls {name}, which this torch ({torch.__version__}) lacks"
        ) from error
    target = getattr(getattr(getattr(torch.ops, namespace), base), overload)
    inside = base.startswith("_") and base not in _INSIDES
    if not isinstance(target, torch._ops.OpOverload) or inside or base in _OUTSIDE:
        raise GraphFormatError(f"the graph calls {name}, which is not an operator that a graph may call")
    if target._schema.is_mutable:
        raise GraphFormatError(f"the graph calls {name}, which writes into a tensor; a graph never does")
    return target


def require_arguments(target: Any, args: Collection[Any], kwargs: Mapping[str, Any], where: str) -> None:
    """That a call has the arguments that its operator's schema declares: how many, and which are tensors.

    Raises:
        GraphFormatError: it has not.
    """
    if not isinstance(target, torch._ops.OpOverload):
        if kwargs or len(args) != (1 if target is operator.neg else 2):
            raise GraphFormatError(
                f"{where}: expected the operands of {target.__name__}, found {args}, {kwargs}"
            )
        return
    schema = target._schema.arguments
    places = [a for a in schema if not a.kwarg_only]
    given = {declared.name: value for declared, value in zip(places, args, strict=False)}
    names = {a.name for a in schema}
    missing = [a.name for a in schema if not a.has_default_value() and a.name not in {*given, *kwargs}]
    if len(args) > len(places) or missing or not {*kwargs} <= names - {*given}:
        raise GraphFormatError(
            f"{where}: expected arguments as in {target._schema}, found {len(args)} and {[*kwargs]}"
        )
    for declared in schema:
        value = {**given, **kwargs}.get(declared.name, declared.default_value)
        if str(declared.type) == "Tensor" and not isinstance(value, (fx.Node, int, float)):
            raise GraphFormatError(f"{where}: expected {declared.name} to be a value, found {value!r}")


def named_type(name: object) -> Any:
    """A `torch.dtype`, layout or memory format by its name without `torch.`.

    Raises:
        GraphFormatError: torch has none of that name.
    """
    if not isinstance(name, str) or name not in _TYPES_BY_NAME:
        raise GraphFormatError(f"expected the name of a type, such as float32, found {name!r}")
    return _TYPES_BY_NAME[name]


# What ATen calls its operators on whole numbers, and nodes after them.
_BITWISE = re.compile(r"__(and|or|xor|lshift|rshift)__(_\d+)?")


def require_identifier(name: object, taken: Collection[str], what: str) -> str:
    """The name of a node or an input: it becomes a variable in code.

    Raises:
        GraphFormatError: it is no identifier, a keyword, or taken.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise GraphFormatError(f"expected an identifier as the name of {what}, found {name!r}")
    hidden = name.startswith("__") and not _BITWISE.fullmatch(name)
    if keyword.iskeyword(name) or hidden or name == "self" or name in taken:
        raise GraphFormatError(f"expected a name for {what} that is not taken, found {name!r}")
    return name


def require_tensor_names(names: Iterable[object]) -> None:
    """Dotted names of parameters: they become attributes of modules.

    Raises:
        GraphFormatError: one has other characters than letters, digits and -/:+@ in a part, stands for
            what a module has already (`forward`, `_parameters`, `__class__`), or is the beginning of another.
    """
    known = list(names)
    for name in known:
        parts = name.split(".") if isinstance(name, str) else [""]
        if not all(_PART.fullmatch(part) for part in parts):
            raise GraphFormatError(f"expected the dotted name of a parameter, found {name!r}")
        for owner, part in zip([_BARE, *[torch.nn.Module()] * len(parts)], parts, strict=False):
            if hasattr(owner, part) or part.startswith("__"):
                raise GraphFormatError(f"a parameter cannot be called {name!r}: {part!r} is a module's own")
        for stop in range(1, len(parts)):
            if ".".join(parts[:stop]) in known:
                raise GraphFormatError(f"{'.'.join(parts[:stop])} is a parameter and holds another, {name!r}")
