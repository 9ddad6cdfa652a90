"""Build the wheel, and use it in empty environments: without extras, and with each of them.

python scripts/release.py                        all; each environment downloads what it installs
python scripts/release.py --extra none onnx      these alone

The wheel is left in dist/. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What the environments share, made with the package of this checkout.
FIXTURE = """
import json
from pathlib import Path
import torch
from gguf_files import entries_of, tensors_of, tiny, write_gguf
from tiny_checkpoint import TEXT, save_byte_checkpoint
from rolora_passes.graphs import capture, run, save_graph
from rolora_passes.loading.models import load_model
graph = capture(load_model(str(save_byte_checkpoint(Path("MODEL"), layers=1)))[0])
tokens = torch.randint(0, 250, (1, 9))
torch.save((tokens, run(graph, tokens)), "expected.pt")
save_graph(graph, "graph.safetensors")
llama = tiny("llama")
write_gguf(Path("model.gguf"), "llama", entries_of("llama", llama), tensors_of("llama", llama))
Path("text.txt").write_text(TEXT * 4)
question = {"question": "Which animal is lazy?", "choices": ["the dog", "the fox"], "answer": 0}
Path("questions.jsonl").write_text(json.dumps(question))
"""
GRAPH = """
import torch
from rolora_passes import FoldConstants, FuseNorm, Rotate, apply_passes
from rolora_passes.graphs import load_graph, run
graph = load_graph("graph.safetensors")
"""
RUN = """
tokens, expected = torch.load("expected.pt")
graph = apply_passes(graph, [FuseNorm(), Rotate(), FoldConstants()])
torch.testing.assert_close(run(graph, tokens), expected, rtol=1e-3, atol=1e-4)
"""
TO_EXECUTORCH = """
from rolora_passes.export import generate, to_executorch
to_executorch(graph, "model.pte", max_length=64)
generate("model.pte", "MODEL/tokenizer.json", "The quick", 4)
"""
TO_ONNX = """
from rolora_passes.export import to_onnx
to_onnx(graph, "onnx", max_length=64)
"""
# By extra, the commands that use what it brings. Where that is missing, they name the extra.
USES: dict[str, list[list[str]]] = {
    "none": [["rolora", "--help"], ["rolora", "passes"], ["python", "-c", GRAPH + RUN]],
    "transformers": [["rolora", "inspect", "MODEL", "--recipe", "rotated-8da4w"]],
    "gguf": [["rolora", "inspect", "model.gguf"]],
    "executorch": [["python", "-c", GRAPH + TO_EXECUTORCH]],
    "onnx": [
        ["python", "-c", GRAPH + TO_ONNX],
        ["rolora", "inspect", "graph.safetensors", "--view", "view.onnx"],
    ],
    "eval": [["rolora", "eval", "graph.safetensors", "--tokenizer", "MODEL", "--tasks", "questions.jsonl"]],
    "learn": [
        ["rolora", "learn", "MODEL", "--recipe", "spinquant:W4A4KV4", "--set", "steps=2", "-o", "learned",
         "--calibration", "text.txt", "--samples", "4", "--length", "32"],
    ],
    "report": [
        ["rolora", "inspect", "MODEL", "--recipe", "8da4w", "--html", "report.html", "--text", "text.txt"],
    ],
    "docs": [["mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml")]],
}  # fmt: skip


def brought(extra: str) -> set[str]:
    """An extra, those that it brings in turn, and "none", whose uses need no extra."""
    nested = [re.search(rf"^{PROJECT['name']}\[(.*)\]", requirement) for requirement in EXTRAS.get(extra, ())]
    names = [name for found in nested if found for name in found[1].split(",")]
    return {"none", extra}.union(*map(brought, names))


def build() -> Path:
    """The wheel of this checkout, in dist/."""
    shutil.rmtree(
        ROOT / "build" / "lib", ignore_errors=True
    )  # setuptools packs all that an earlier build left
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "."]
    subprocess.run(pip, cwd=ROOT, check=True)
    return max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)


class Environment:
    """An empty environment, and beside it the files that its uses read.

    Raises:
        SystemExit: something does not install, or does not do what it should; by every method.
    """

    def __init__(self, place: Path, fixture: Path) -> None:
        self.place = place
        shutil.copytree(fixture, place, dirs_exist_ok=True)
        venv.create(place / "venv", with_pip=True)

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, with nothing on Python's path but what was installed."""
        program = self.place / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / command[0]
        known = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [program, *command[1:]], cwd=self.place, env=known, capture_output=True, text=True
        )

    def install(self, wheel: Path, extra: str) -> None:
        """Install a wheel with an extra.

        torch goes in first and alone: its exact version decides which build is taken.
        """
        wanted = f"rolora-passes{'' if extra == 'none' else f'[{extra}]'} @ {wheel.as_uri()}"
        for what in ("torch==2.13.0", wanted):
            pip = ["python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
            done = self.call([*pip, "-c", str(ROOT / "constraints.txt"), what])
            if done.returncode:
                raise SystemExit(f"{what} does not install:\n{done.stderr}")

    def use(self, command: list[str], missing: set[str]) -> None:
        """Run a command.

        Args:
            missing: extras of which it has to name one, and stop; none if it has to work.
        """
        done = self.call(command)
        last = (done.stderr.splitlines() or [""])[-1]
        named = re.search(r"MissingExtraError: .*`pip install rolora-passes\[(\w+)\]`", last)
        if done.returncode if not missing else not (named and named[1] in missing):
            wanted = f"an error that names {' or '.join(sorted(missing))}" if missing else "success"
            raise SystemExit(
                f"expected {wanted} of {' '.join(command)}\nfound {done.returncode}\n{done.stderr}"
            )

    def megabytes(self) -> float:
        """What it takes on the disk; links count as such."""
        return sum(path.lstat().st_size for path in (self.place / "venv").rglob("*")) / 1e6


def attempt(wheel: Path, extra: str, place: Path, fixture: Path) -> str:
    """Install the wheel with an extra, use all that it brings, and see that the rest names what is missing.

    Returns: what works, and what that cost.
    """
    start = time.perf_counter()
    environment = Environment(place, fixture)
    environment.install(wheel, extra)
    installed, size = time.perf_counter() - start, environment.megabytes()
    for name, uses in USES.items():
        # No code of the package needs what `docs` brings, so nothing names it.
        if name in brought(extra) or name != "docs":
            for command in uses:
                environment.use(command, missing=brought(name) - brought(extra))
    used = time.perf_counter() - start - installed
    return f"{extra:12} {size:6.0f} MB   installed in {installed:4.0f} s   used in {used:4.0f} s"


def main() -> None:
    """Build and try; say what works."""
    parser = argparse.ArgumentParser(description="Build the wheel, and use it in empty environments.")
    known = [*USES, "all"]
    parser.add_argument("--extra", nargs="+", choices=known, default=known, help="all, unless given")
    chosen = parser.parse_args().extra
    wheel = build()
    print(f"{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
    with tempfile.TemporaryDirectory() as fixture:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        subprocess.run([sys.executable, "-c", FIXTURE], cwd=fixture, env=environment, check=True)
        for extra in chosen:
            with tempfile.TemporaryDirectory() as place:
                print(attempt(wheel, extra, Path(place), Path(fixture)), flush=True)


if __name__ == "__main__":
    main()
