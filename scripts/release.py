"""Build the wheel, and try it in empty environments: without extras, and with each of them.

python scripts/release.py                        all; each environment downloads what it installs
python scripts/release.py --extra none onnx      these alone

The wheel is left in dist/. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In every environment: a saved graph loads, takes passes, runs, and computes what it did.
ALWAYS = """
import torch
from rolora_passes import FoldConstants, FuseNorm, Rotate, apply_passes
from rolora_passes.errors import MissingExtraError
from rolora_passes.graphs import load_graph, run
tokens, expected = torch.load("expected.pt")
graph = apply_passes(load_graph("graph.safetensors"), [FuseNorm(), Rotate(), FoldConstants()])
torch.testing.assert_close(run(graph, tokens), expected, rtol=1e-3, atol=1e-4)
"""
# With each extra: what it is for, on the same graph.
TRIED = {
    "none": """
from rolora_passes.export import to_onnx
from rolora_passes.loading.models import load_model
for use in (lambda: load_model("none"), lambda: to_onnx(graph, "folder")):
    try:
        use()
    except MissingExtraError as error:
        print(error)
    else:
        raise SystemExit("expected an error that names the extra")
""",
    "transformers": """
from transformers import LlamaConfig, LlamaForCausalLM
from rolora_passes.graphs import capture
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=50, num_attention_heads=4)
capture(LlamaForCausalLM(LlamaConfig(**sizes)))
""",
    "gguf": """
from rolora_passes.errors import CaptureError
from rolora_passes.loading.models import load_model
open("model.gguf", "wb").write(b"GGUF")
try:
    load_model("model.gguf")
except CaptureError as error:
    assert "expected a whole GGUF file" in str(error), error
""",
    "executorch": """
from rolora_passes.export import to_executorch
to_executorch(graph, "model.pte", max_length=32)
""",
    "onnx": """
from rolora_passes.export import to_onnx
to_onnx(graph, "folder", max_length=32)
""",
    "eval": """
from rolora_passes.extras import require
require("lm_eval.evaluator", "eval"), require("datasets", "eval")
""",
    "learn": """
from pathlib import Path
from rolora_passes.recipes.learned import draw_losses
draw_losses([3.0, 2.0, 1.0], {}, Path("losses.png"))
""",
    "report": """
from rolora_passes.extras import require
assert require("plotly.offline", "report").get_plotlyjs()
""",
}
TRIED["all"] = "".join(code for extra, code in TRIED.items() if extra != "none")
# What the environments share, made with the package of this checkout.
FIXTURE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from rolora_passes.graphs import capture, run, save_graph
torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=257)
heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
graph = capture(LlamaForCausalLM(LlamaConfig(**sizes, **heads)))
tokens = torch.randint(0, 257, (1, 9))
torch.save((tokens, run(graph, tokens)), "expected.pt")
save_graph(graph, "graph.safetensors")
"""


def extras() -> list[str]:
    """The extras for users, as pyproject has them, and none; but "cuda", which only builds beside a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    beside = ("dev", "docs", "cuda")
    return ["none", *(name for name in project["optional-dependencies"] if name not in beside)]


def build() -> Path:
    """The wheel of this checkout, in dist/."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "."]
    subprocess.run(pip, cwd=ROOT, check=True)
    return max((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)


def call(*command: str | Path, place: Path) -> None:
    """Run a command in a folder, with nothing on Python's path but what its environment has."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)


def attempt(wheel: Path, extra: str, place: Path, fixture: Path) -> None:
    """Install the wheel with an extra into an empty environment, and use it.

    torch goes in first and alone: its exact version decides which build is taken.

    Raises:
        subprocess.CalledProcessError: something does not install, or does not work.
    """
    venv.create(place, with_pip=True)
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    pip += ["-c", ROOT / "constraints.txt"]
    wanted = f"rolora-passes{'' if extra == 'none' else f'[{extra}]'} @ {wheel.as_uri()}"
    call(*pip, "torch==2.13.0", place=place)
    call(*pip, wanted, place=place)
    for name in ("expected.pt", "graph.safetensors"):
        (place / name).write_bytes((fixture / name).read_bytes())
    # -I: nothing of this checkout is found, only what was installed.
    for use in (["-m", "rolora_passes", "passes"], ["-c", ALWAYS + TRIED[extra]]):
        call(python, "-I", *use, place=place)


def main() -> None:
    """Build and try; say what works."""
    parser = argparse.ArgumentParser(description="Build the wheel, and try it in empty environments.")
    parser.add_argument("--extra", nargs="+", choices=extras(), default=extras(), help="all, unless given")
    chosen = parser.parse_args().extra
    wheel = build()
    print(f"{wheel.relative_to(ROOT)}, {wheel.stat().st_size / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder:
        fixture = Path(folder)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", FIXTURE], cwd=fixture, env=environment, check=True)
        for extra in chosen:
            with tempfile.TemporaryDirectory() as place:
                attempt(wheel, extra, Path(place), fixture)
            print(f"{extra}: installs, and works", flush=True)


if __name__ == "__main__":
    main()
