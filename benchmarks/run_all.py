"""Run every benchmark and keep what they print, dated, in `benchmarks/results`."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent


def commands(folder: Path, peer: Path | None) -> list[list[str]]:
    """What to run; ExecuTorch's own exporter takes ten minutes, unless a file it made is given."""
    recipes = ("8da4w", "rotated-8da4w", "rotated-8da4w-tied")
    made = [f"{name}={folder / name / 'model.pte'}" for name in recipes]
    peers = [f"{name}={folder / name}" for name in ("builder", "builder-pruned")]
    onnx = [f"{name}={folder / name}-onnx" for name in recipes]
    peer_file = peer or folder / "peer" / "peer.pte"
    tokenizer = str(folder / "8da4w" / "tokenizer.json")
    return [
        ["hadamard.py"],
        ["passes.py"],
        ["exactness.py"],
        ["outliers.py"],
        ["parity.py"],
        ["eight_bits.py"],
        *([] if peer else [["peer_executorch.py", "--out", str(folder / "peer")]]),
        *[["compile_packaged.py", "--recipe", name, "--output", str(folder / name)] for name in recipes],
        *[
            [
                *("compile_packaged.py", "--recipe", name, "--target", "onnx"),
                "--output",
                f"{folder / name}-onnx",
            ]
            for name in recipes
        ],
        ["onnx_parity.py"],
        ["peer_onnx.py", "-o", str(folder / "builder")],
        ["peer_onnx.py", "-o", str(folder / "builder-pruned"), "--prune-lm-head"],
        ["bench_onnx.py", *peers, *onnx, f"pte={folder / 'rotated-8da4w'}", "--threads", "1"],
        ["tracking.py"],
        ["bench_executorch.py", f"peer={peer_file}", *made, "--census"],
        ["bench_executorch.py", f"peer={peer_file}", *made, "--tokenizer", tokenizer, "--threads", "1"],
        ["bench_executorch.py", f"peer={peer_file}", *made, "--tokenizer", tokenizer, "--threads", "2"],
    ]


def main() -> None:
    """Run, print, and append to today's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="a .pte that peer_executorch.py made before")
    parser.add_argument("--only", nargs="+", help="run only the scripts named")
    arguments = parser.parse_args()
    results = HERE / "results" / f"{datetime.now(UTC).date().isoformat()}.md"
    results.parent.mkdir(exist_ok=True)
    with results.open("a") as file, tempfile.TemporaryDirectory() as folder:
        file.write(
            f"\n## {platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n"
        )
        for command in commands(Path(folder), arguments.peer):
            if arguments.only and command[0].removesuffix(".py") not in arguments.only:
                continue
            shown = " ".join(command).replace(folder, "OUT").replace(str(arguments.peer), "peer.pte")
            print(f"$ python benchmarks/{shown}", flush=True)
            done = subprocess.run(
                [sys.executable, command[0], *command[1:]], cwd=HERE, stdout=subprocess.PIPE, text=True
            )
            print(done.stdout, flush=True)
            file.write(f"\n    $ python benchmarks/{shown}\n\n```\n{done.stdout.rstrip()}\n```\n")
            file.flush()
            if done.returncode:
                sys.exit(f"{command[0]} failed")


if __name__ == "__main__":
    main()
