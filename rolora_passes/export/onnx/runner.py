"""Running a folder that `to_onnx` wrote: text through onnxruntime-genai, logits through ONNX Runtime."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolora_passes.errors import LoweringError, RunError, one_line
from rolora_passes.export.target import Encode
from rolora_passes.extras import require

MODEL, DATA = "model.onnx", "model.onnx.data"
INPUTS = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids"}
"""What a graph's inputs are called."""


def generate(
    folder: str | os.PathLike[str],
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
    begin: int = 0,
) -> str:
    """Continue a prompt with onnxruntime-genai's generator; returns the new text.

    Args:
        begin: 1 or more, if the tokenizer is to write what begins a text (BOS) before the prompt.
        on_text: called with each piece of text as it is generated.

    Raises:
        RunError: the prompt is longer than what the model holds, or the runtime fails.
        MissingExtraError: onnxruntime-genai is not installed.
    """
    genai = require("onnxruntime_genai", "onnx")
    try:
        model = genai.Model(os.fspath(folder))
        tokenizer = genai.Tokenizer(model)
        tokenizer.update_options(add_special_tokens="true" if begin else "false")
        tokens, stream = tokenizer.encode(prompt), tokenizer.create_stream()
        generator = genai.Generator(
            model, _parameters(genai, model, len(tokens) + max_new_tokens, temperature)
        )
        generator.append_tokens(tokens)
        pieces: list[str] = []
        while not generator.is_done() and len(pieces) < max_new_tokens:
            generator.generate_next_token()
            pieces.append(stream.decode(generator.get_next_tokens()[0]))
            if on_text is not None:
                on_text(pieces[-1])
    except RuntimeError as error:  # the runtime's own, whatever it is about
        raise RunError(f"onnxruntime-genai failed on {folder}: {one_line(error)}") from error
    return "".join(pieces)


def _parameters(genai: Any, model: Any, length: int, temperature: float) -> Any:
    parameters = genai.GeneratorParams(model)
    sampled = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    parameters.set_search_options(max_length=length, **sampled)
    return parameters


# onnxruntime-genai's tokenizer asks for a configuration that says of which model it is.
_GENAI = """{"model": {"type": "decoder", "context_length": 16, "eos_token_id": 0, "vocab_size": 1,
"decoder": {}}, "search": {"max_length": 16}}"""


def encoder(folder: Path) -> Encode:
    """onnxruntime-genai's tokenizer, with the files of a folder.

    Raises:
        LoweringError: it cannot load them.
        MissingExtraError: onnxruntime-genai is not installed.
    """
    genai = require("onnxruntime_genai", "onnx")
    with tempfile.TemporaryDirectory() as other:
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
                shutil.copyfile(path, Path(other) / path.name)
        (Path(other) / "genai_config.json").write_text(_GENAI, "utf-8")
        try:
            runtime = genai.Tokenizer(other)
        except Exception as error:
            raise LoweringError(
                f"onnxruntime-genai cannot load the model's tokenizer: {one_line(error)}; "
                "another target's may"
            ) from error
    runtime.update_options(add_special_tokens="false")
    return lambda text: runtime.encode(text)


class OnnxProgram:
    """A decoder with its caches: `program(tokens, position)` gives logits after tokens put at a position.

    Args:
        entries: settings of the session; None: what `genai_config.json` says, if there is one.

    Raises:
        RunError: ONNX Runtime refuses the model.
        MissingExtraError: ONNX Runtime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], entries: Mapping[str, str] | None = None) -> None:
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # what fails is raised
        for name, value in (_session_entries(Path(folder)) if entries is None else entries).items():
            options.add_session_config_entry(name, value)
        path = os.path.join(folder, MODEL)
        try:
            self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a class for every status
            raise RunError(f"ONNX Runtime refuses {path}: {one_line(error)}") from error
        self._outputs = [o.name for o in self.session.get_outputs()]
        self._empty = {
            i.name: (i.shape[1], i.shape[3]) for i in self.session.get_inputs() if i.name.startswith("past")
        }
        self._caches: dict[str, Any] = {}

    def __call__(self, tokens: Tensor, position: int, mask: Tensor | None = None) -> Tensor:
        """Logits [B, 1 or S, V] of tokens int64 [B, S] behind the first `position` columns of the caches.

        Args:
            mask: int64 [B, position + S], 0 where a row is padded; all tokens, if it is not given.
        """
        batch, length = tokens.shape
        mask = torch.ones(batch, position + length, dtype=torch.int64) if mask is None else mask
        feed = {"input_ids": tokens.contiguous().numpy(), "attention_mask": mask.contiguous().numpy()}
        for name, (heads, width) in self._empty.items():
            feed[name] = (
                self._caches[name][:, :, :position]
                if position
                else torch.zeros(batch, heads, 0, width).numpy()
            )
        try:
            results = dict(zip(self._outputs, self.session.run(None, feed), strict=True))
        except Exception as error:  # the runtime has a class for every status
            raise RunError(f"ONNX Runtime failed at position {position}: {one_line(error)}") from error
        self._caches = {name: results[name.replace("past_key_values", "present")] for name in self._empty}
        return torch.from_numpy(results["logits"])

    def whole(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a graph without caches gives for its inputs, by their names in the graph; every row is
        whole."""
        feed = {INPUTS.get(name, name): value.contiguous().numpy() for name, value in inputs.items()}
        feed["attention_mask"] = torch.ones_like(inputs["tokens"]).numpy()
        taken = {i.name for i in self.session.get_inputs()}
        try:
            found = self.session.run(None, {name: value for name, value in feed.items() if name in taken})
        except Exception as error:  # the runtime has a class for every status
            raise RunError(f"ONNX Runtime failed: {one_line(error)}") from error
        return torch.from_numpy(found[0])


def _session_entries(folder: Path) -> dict[str, str]:
    """The settings of ONNX Runtime in `genai_config.json`, which genai's own sessions take as well."""
    config = folder / "genai_config.json"
    if not config.is_file():
        return {}
    known = json.loads(config.read_text("utf-8"))["model"]["decoder"]["session_options"]
    return {name: value for name, value in known.items() if name.startswith("session.")}
