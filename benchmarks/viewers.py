"""Whether viewers open what `rolora inspect --view` writes: starts those that are installed.

    pip install ai-edge-model-explorer netron onnx
    python benchmarks/viewers.py MODEL [--recipe rotated-8da4w]

They say where they are to be seen; Enter stops them. Neither is needed by the library or its tests.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rolora_passes import apply_passes
from rolora_passes.graphs import capture
from rolora_passes.loading.models import load_model
from rolora_passes.recipes import load_recipe
from rolora_passes.reporting.model_explorer import write_model_explorer
from rolora_passes.reporting.netron import write_netron


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--recipe", default="rotated-8da4w")
    options = parser.parse_args()
    graph = apply_passes(capture(load_model(options.model)[0]), load_recipe(options.recipe), verify=False)
    with tempfile.TemporaryDirectory() as folder:
        first, *others = write_model_explorer(graph, Path(folder) / "model.json")
        program = write_netron(graph, Path(folder) / "model.onnx")
        data = f"--node_data_paths={','.join(map(str, others))}"
        commands = [
            ["model-explorer", str(first), data, "--no_open_in_browser", "--port", "18080"],
            ["netron", str(program), "--port", "18081"],
        ]
        found = [command for command in commands if shutil.which(command[0])]
        if not found:
            sys.exit("neither viewer is installed: pip install ai-edge-model-explorer netron")
        running = [subprocess.Popen(command) for command in found]
        try:
            input("press Enter to stop\n")
        finally:
            for process in running:
                process.terminate()


if __name__ == "__main__":
    main()
