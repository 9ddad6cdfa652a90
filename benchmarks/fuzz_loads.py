"""Variants of tiny checkpoints and GGUF files: each load is right, or refused with the library's own error.

    python benchmarks/fuzz_loads.py [--count 1000] [--seed 0] [--verbose]

A variant removes, adds, renames, reshapes or replaces tensors, or changes or removes keys of config.json or
entries of a GGUF. What it means is computed beside the library: by transformers' class, filled by hand with
the tensors of the files. A load is right if its logits are those. A refusal is right for any variant that was
spoilt, and wrong for one that means the same as before. A key that config.json lacks takes the default of its
class: that is what the file then means.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as t

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fuzz_variants import Variant, checkpoints, gguf_files

from rolora_passes.errors import RoloraError
from rolora_passes.loading.models import load_model


def outcome(variant: Variant, path: Path) -> str:
    """ "right", "refused", or what is wrong."""
    try:
        model = load_model(str(path))[0]
    except RoloraError as error:
        if variant.same:
            return f"WRONG: refused, and it means the same as before: {error}"
        if variant.named and not any(name in str(error) for name in variant.named):
            return f"WRONG: refused without naming {variant.named[0]}: {error}"
        return "refused"
    except Exception as error:
        return f"WRONG: a bare {type(error).__name__}: {error}"
    if variant.expected is None:
        return "WRONG: loaded, though a part of it cannot be read"
    tokens = torch.randint(2, 90, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right, found = variant.expected()(tokens).logits, model(tokens).logits
    error = float((found - right).abs().max() / right.abs().max())
    return "right" if error < 1e-4 else f"WRONG: logits are {error:.1e} off"


def run(count: int, seed: int, verbose: bool = False) -> Counter[str]:
    """Outcomes of variants, by kind; every wrong one is printed."""
    generator, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        sources = [checkpoints(Path(folder) / "checkpoints"), gguf_files(Path(folder) / "gguf")]
        for number in range(count):
            variant = generator.choice(sources)(generator)
            with contextlib.redirect_stderr(io.StringIO()):
                said = outcome(variant, variant.path)
            found[said.partition(":")[0]] += 1
            found[f"{variant.kind}: {said.partition(':')[0]}"] += 1
            if verbose or said.startswith("WRONG"):
                print(f"{number} {variant.what}: {said}", flush=True)
            shutil.rmtree(variant.path) if variant.path.is_dir() else variant.path.unlink()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    t.logging.set_verbosity_error()
    t.logging.disable_progress_bar()
    start = time.perf_counter()
    table: dict[str, Any] = dict(sorted(run(options.count, options.seed, options.verbose).items()))
    print(json.dumps(table, indent=1))
    print(f"{options.count} variants in {time.perf_counter() - start:.0f} s")
    sys.exit(int(bool(table.get("WRONG"))))
