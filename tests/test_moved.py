"""Modules that moved are found by their old names, once, with a note."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from rolora_passes.moved import MOVED


def test_every_old_name_leads_to_a_module_that_exists() -> None:
    missing = [new for new in MOVED.values() if importlib.util.find_spec(f"rolora_passes.{new}") is None]
    assert not missing


def test_an_old_name_is_the_same_module_and_says_where_it_went() -> None:
    sys.modules.pop("rolora_passes.fuse_norm", None)
    with pytest.warns(FutureWarning, match=r"rolora_passes.fuse_norm is rolora_passes.passes.fuse_norm now"):
        old = importlib.import_module("rolora_passes.fuse_norm")
    new = importlib.import_module("rolora_passes.passes.fuse_norm")
    assert old is new and new.__spec__ is not None and new.__spec__.name == "rolora_passes.passes.fuse_norm"


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"rolora_passes\.nothing"):
        importlib.import_module("rolora_passes.nothing")


def test_the_package_itself_uses_no_old_name() -> None:
    code = "import pkgutil, importlib, rolora_passes as r\nimport sys\n"
    code += "[importlib.import_module(m.name) for m in pkgutil.walk_packages(r.__path__, 'rolora_passes.')"
    code += " if not m.name.endswith('__main__')]"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning:rolora_passes", "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "this name goes" not in done.stderr, done.stderr


def test_names_that_left_a_module_are_found_with_a_warning() -> None:
    from rolora_passes.graphs import expressions, graph
    from rolora_passes.numerics import affine, codebooks

    with pytest.warns(FutureWarning, match=r"graphs\.graph\.Expressions is .*expressions\.Expressions now"):
        assert graph.Expressions is expressions.Expressions  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning, match=r"numerics\.affine\.absmax is .*numerics\.codebooks\.absmax now"):
        assert affine.absmax is codebooks.absmax  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = graph.nothing  # type: ignore[attr-defined]
