"""A few of the variants of `benchmarks/fuzz_loads.py`: each load is right, or refused with our own error."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_no_load_is_wrong(seed: int) -> None:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_loads.py"
    spec = importlib.util.spec_from_file_location("fuzz_loads", path)
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    found = fuzz.run(24, seed)
    assert found["right"] > 4 and found["refused"] > 4 and not found["WRONG"], dict(found)
