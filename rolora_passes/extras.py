"""Optional dependencies, imported inside the function that needs them.

The extras are in pyproject.toml. A saved graph loads, takes passes and is lowered without transformers;
capturing a model or reading its tokenizer needs it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from rolora_passes.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of rolora-passes installs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise MissingExtraError(
            f"{module} is not installed: run `pip install rolora-passes[{extra}]`"
        ) from error
