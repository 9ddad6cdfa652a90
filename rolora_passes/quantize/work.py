"""A work folder: the finished stages of a run, from which one that was killed goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from rolora_passes.errors import WorkError
from rolora_passes.files import holding, writing
from rolora_passes.graphs.graph import parameters
from rolora_passes.graphs.text import graph_text
from rolora_passes.numerics.gptq import Quantized
from rolora_passes.ondisk import kept, rest

Row = dict[str, Any]
"""What is known of a stage beside its results."""
_CHUNK = 1 << 24  # elements that are hashed at a time


@contextmanager
def keeping(work: Path | None, graph: fx.GraphModule, tokens: Tensor, options: object) -> Iterator[Kept]:
    """The stages of one run: kept while it goes on, and when it fails; removed when it is over.

    Runs that differ in the graph, a weight, the tokens or the options have files of their own, and leave each
    other's alone.

    Args:
        work: the folder; None to keep nothing.

    Raises:
        WorkError: another process works in the folder, or it cannot be written to.
    """
    if work is None:
        yield Kept(None)
        return
    with holding(work):
        for unfinished in work.glob(".gptq-*"):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)
        stages = Kept(work / f"gptq-{_fingerprint(graph, tokens, options)}")
        yield stages
        for file in stages.files:
            file.unlink(missing_ok=True)


class Kept:
    """Finished stages, by number.

    Args:
        stem: of their files; None: none are kept.
    """

    def __init__(self, stem: Path | None) -> None:
        self._stem = stem
        self.files: list[Path] = []

    def load(self, number: int, names: Sequence[str]) -> tuple[dict[str, Quantized], Row] | None:
        """A stage that an earlier run finished; None if it is not there (any more), or damaged."""
        if self._stem is None:
            return None
        file = self._file(number)
        self.files.append(file)
        try:
            with safe_open(file, "pt") as saved:
                row = json.loads(saved.metadata()["figures"])
                parts = ("integers", "scale", "zero")
                return {
                    name: Quantized(*(kept(saved.get_tensor(f"{name}.{part}")) for part in parts))
                    for name in names
                }, row
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, number: int, results: Mapping[str, Quantized], row: Row) -> None:
        """Keep a stage.

        Raises:
            WorkError: it cannot be written; what was kept before stays.
        """
        if self._stem is None:
            return
        tensors = {
            f"{name}.{part}": value.cpu() for name, q in results.items() for part, value in vars(q).items()
        }
        file = self._file(number)
        try:
            with writing(file) as temporary:
                save_file(tensors, temporary, metadata={"figures": json.dumps(row)})
        except OSError as error:
            raise WorkError(
                f"cannot keep finished stages in {file.parent}: {error.strerror or error}; make room there "
                "and run again, which goes on from the last one, or give another folder (--work)"
            ) from error
        for value in tensors.values():
            rest(value)

    def _file(self, number: int) -> Path:
        assert self._stem is not None
        return self._stem.with_name(f"{self._stem.name}-{number}.safetensors")


def _fingerprint(graph: fx.GraphModule, tokens: Tensor, options: object) -> str:
    """A name for everything that decides the result: a run that differs in any of it has other files."""
    digest = hashlib.sha256(repr((graph_text(graph), options)).encode())
    for tensor in (*parameters(graph).values(), tokens):
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        for part in tensor.detach().cpu().contiguous().flatten().split(_CHUNK):
            digest.update(part.view(torch.uint8).numpy().data)
            rest(tensor, part)
    return digest.hexdigest()[:32]
