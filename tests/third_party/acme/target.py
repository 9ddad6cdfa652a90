"""A target."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from rolora_passes.errors import LoweringError
from rolora_passes.export import Target
from rolora_passes.graphs import load_graph, save_graph
from rolora_passes.graphs.graph import is_op
from rolora_passes.graphs.info import info, set_info
from rolora_passes.graphs.running import run


@dataclass(frozen=True)
class Written:
    path: Path
    length: int
    seed: int

    def rows(self):
        return [f"{self.path.name}, for {self.length} tokens"]


@dataclass(frozen=True)
class Echo(Target):
    """A graph as it is, run by torch."""

    name: ClassVar[str] = "echo"
    program: ClassVar[str] = "echo.safetensors"
    shout: bool = field(default=False, metadata={"help": "in capitals"})
    seed: int = field(default=0, metadata={"help": "of nothing"})

    def lower(self, graph, folder, *, max_length, methods=None, check=True):
        if any(is_op(node, "fake_quantize") for node in graph.graph.nodes):
            raise LoweringError("an echo rounds no activations")
        set_info(graph, config={**info(graph).config, "shout": self.shout})
        return Written(save_graph(graph, folder / self.program), max_length, self.seed)

    def score(self, folder):
        graph, before = load_graph(folder / self.program), []

        def call(tokens, position):
            before[position:] = tokens[0].tolist()
            return run(graph, torch.tensor([before]))[:, -1:]

        return call

    def run(self, folder, prompt, max_new_tokens, temperature=0.0, on_text=None, begin=0):
        shout = info(load_graph(folder / self.program)).config["shout"]
        text = prompt.upper() if shout else prompt
        on_text(text)
        return text
