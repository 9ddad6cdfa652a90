"""`rolora inspect`: what a model, a saved graph or a compiled folder is made of."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rolora_passes.display import console


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect", help="what a model, a saved graph or a compiled folder is made of"
    )
    parser.add_argument("model", help="model folder, hub name, .gguf, saved graph, or compiled folder")
    parser.add_argument(
        "--bases", action="store_true", help="which axes may rotate together, or what blocks them"
    )
    parser.add_argument("--graph", action="store_true", help="the graph, a line a node")
    parser.add_argument("--as-captured", action="store_true", help="before fuse-norm")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rolora_passes.fuse_norm import FuseNorm
    from rolora_passes.graphs.capture import capture
    from rolora_passes.graphs.inspect import bases_text, summary
    from rolora_passes.graphs.serialize import load_graph
    from rolora_passes.graphs.text import graph_text
    from rolora_passes.manager import apply_passes
    from rolora_passes.models import load_model

    folder = Path(options.model)
    if (folder / "manifest.json").is_file():
        print((folder / "manifest.json").read_text("utf-8"))
        return
    if folder.suffix == ".safetensors":
        graph = load_graph(folder)
    else:
        with console.status("capturing …"):
            graph = capture(load_model(options.model)[0])
    if not options.as_captured and "norms fused" not in graph.meta["facts"]:
        graph = apply_passes(graph, [FuseNorm()], verify=False)
    print(summary(graph), end="")
    if options.bases:
        print("\n" + bases_text(graph), end="")
    if options.graph:
        print("\n" + graph_text(graph), end="")
