"""`rolora passes`: the passes and recipes, or one of them."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("passes", help="list the passes and recipes, or explain one")
    parser.add_argument("name", nargs="?")
    parser.set_defaults(run=run)


def documents(cls: type[Any]) -> Iterator[str]:
    """What a pass says of itself, and what the classes say whose options it has too."""
    from rolora_passes.passes.base import Pass

    for each in cls.__mro__[: cls.__mro__.index(Pass)]:
        if each.__doc__:
            yield inspect.cleandoc(each.__doc__)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.errors import PluginError
    from rolora_passes.numerics.grids import GRIDS
    from rolora_passes.passes.registry import PASSES
    from rolora_passes.recipes import dump_recipe, load_recipe, recipes

    if options.name and options.name.partition(":")[0] in recipes():
        print(dump_recipe(load_recipe(options.name)), end="")
        return
    if options.name:
        print("\n\n".join(documents(PASSES[options.name])))
        return
    for name in PASSES:
        origin = PASSES.origin(name)
        try:
            about = (inspect.getdoc(PASSES[name]) or "undocumented").splitlines()[0]
        except PluginError as error:
            about = f"cannot be used: {error}"
        print(f"{name:22} {about}" + (f" [{origin}]" if origin else ""))
        for clash in PASSES.clashes(name):
            print(f"{'':22} {clash}")
    grids = [name + (f" [{origin}]" if (origin := GRIDS.origin(name)) else "") for name in GRIDS]
    print(f"\ngrids: {', '.join(grids)}")
    print("\nrecipes; W4A4KV4 stands for any setting:")
    for recipe in recipes().values():
        print(f"{recipe.example:22} {recipe.about.partition('. ')[0].removesuffix('.')}.")
