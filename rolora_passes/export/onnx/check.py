"""Running a folder that was just lowered to ONNX against the graph that it came from."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rolora_passes.export.checking import (
    Checked,
    Reference,
    check_decoder,
    max_distance,
    require_near,
    running,
)
from rolora_passes.export.onnx.runner import OnnxProgram
from rolora_passes.graphs.inputs import inputs_for
from rolora_passes.graphs.verify import sample_tokens

_ROWS, _NEW = (9, 5), 2  # tokens of the rows of a batch, and how many are decoded after them


def check_onnx(
    name: str, program: OnnxProgram, graph: fx.GraphModule, max_length: int, cached: bool, padded: bool
) -> Checked:
    """Compare a text in one call and token by token, and a batch with padding on either side.

    Args:
        cached: it is a decoder with caches; else all tokens go in at once.
        padded: the rows of a batch may differ in length.

    Raises:
        LoweringError: the logits differ by more than they may; the program does not run.
    """
    reference = Reference(graph, max_length)
    if not cached:
        return _check_whole(name, program, reference)
    checked = check_decoder(name, program, reference)
    for left in (True, False) if padded else ():
        _check_batch(name, program, reference, left)
    return checked


def _check_batch(name: str, program: OnnxProgram, reference: Reference, left: bool) -> None:
    """Two rows, of which the second is shorter, as long as a prompt and some decoded tokens."""
    longest, most = max(_ROWS), max(_ROWS) + _NEW
    texts = sample_tokens(reference.graph, 2, most)
    tokens, mask = torch.zeros(2, most, dtype=torch.int64), torch.ones(2, most, dtype=torch.int64)
    for row, length in enumerate(_ROWS):
        place = slice(longest - length, longest) if left else slice(0, length)
        mask[row, :longest] = 0
        mask[row, place] = 1
        tokens[row, place] = texts[row, :length]
        tokens[row, longest:] = texts[row, length : length + _NEW]
    expected = [reference.logits(texts[row : row + 1, : length + _NEW]) for row, length in enumerate(_ROWS)]
    start = 0
    for end in range(longest, most + 1):
        found = running(name, lambda s=start, e=end: program(tokens[:, s:e], s, mask[:, :e]))  # type: ignore[misc]
        for row, (logits, bound) in enumerate(expected):
            last = _last(mask[row, start:end], name == "ort") if found.shape[1] > 1 else 0
            at = _ROWS[row] + end - longest - 1
            error = max_distance(found[row : row + 1, last : last + 1], logits[:, at : at + 1])
            side = "left" if left else "right"
            require_near(name, f"{at + 1} tokens of a row padded on the {side}", error, bound)
        start = end


def _last(mask: Tensor, compact: bool) -> int:
    """Where the logits of a row's last token are: kernels without gaps in their caches move rows to
    the left."""
    return int(mask.sum()) - 1 if compact else int(mask.nonzero().max())


def _check_whole(name: str, program: OnnxProgram, reference: Reference) -> Checked:
    tokens = sample_tokens(reference.graph, 2, max(13, reference.window * 2 + 3))
    given = inputs_for(reference.graph, tokens)
    expected, bound = reference.logits(tokens)
    found = running(name, lambda: program.whole(given))
    error = max_distance(found, expected)
    require_near(name, f"{tokens.shape[1]} tokens of two rows", error, bound)
    return Checked(name, tokens.shape[1], error, bound)
