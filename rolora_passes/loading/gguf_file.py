"""Loading a GGUF file of which every entry and tensor is read, has no effect, or is named in a refusal."""

from __future__ import annotations

import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rolora_passes.errors import CaptureError, one_line
from rolora_passes.extras import require
from rolora_passes.loading.checkpoint import some
from rolora_passes.loading.gguf_entries import KNOWN, configuration
from rolora_passes.loading.gguf_reading import forget, read_once, reader
from rolora_passes.loading.gguf_rope import FACTORS, TENSORS, require_rotary_width, scale_frequencies
from rolora_passes.loading.gguf_tokens import require_tokens_known

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NO_EFFECT = ("GGUF.", "general.", "quantize.imatrix.", "split.")
# Options that add parameters to a model, which GGUF says by the tensors that it has.
_OPTIONS = (
    "attention_bias",
    "mlp_bias",
    "use_bias",
    "use_qkv_bias",
    "qk_layernorm",
    "lm_head_bias",
    "conv_bias",
)


class GgufFile:
    """A GGUF file whose metadata was read, and whose tensors can be.

    Raises:
        CaptureError: not such a file, or cut short; an architecture or a type of quantization that is not
            known, or an entry of the tokenizer.
    """

    @staticmethod
    def at(path: Path) -> GgufFile:
        """The file at a place, as it was read last where it has not changed since."""
        state = path.stat()
        return _file(path, state.st_mtime_ns, state.st_size)

    def __init__(self, path: Path) -> None:
        for module in ("transformers", "gguf", "accelerate"):  # transformers reads GGUF files with both
            require(module, "gguf")
        from transformers.integrations.gguf import read_gguf_metadata

        self.path = path
        self.entries: dict[str, Any]
        try:
            self.entries, _ = read_gguf_metadata(str(path))  # arrays of strings by their length: that is fast
        except Exception as error:  # as many as there are ways to be no such file
            raise CaptureError(
                f"cannot load {path}: expected a whole GGUF file ({one_line(error)})"
            ) from error
        self._require_known()
        require_tokens_known(self.entries, path)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The tensors by name, mapped from the file."""
        try:
            return {tensor.name: tensor for tensor in reader(self.path).tensors}
        except Exception as error:
            raise CaptureError(
                f"cannot load {self.path}: expected a whole GGUF file ({one_line(error)})"
            ) from error

    @property
    def architecture(self) -> str:
        return str(self.entries["general.architecture"])

    def _require_known(self) -> None:
        found = self.entries.get("general.architecture")
        if found not in KNOWN or self.entries.get("general.type", "model") != "model":
            kind = self.entries.get("general.type", "model")
            raise CaptureError(
                f"expected a GGUF file of a model of the architecture {', '.join(KNOWN)}, found a {kind} of "
                f"{found!r} in {self.path}: give the checkpoint that it was made of"
            )
        if self.entries.get("split.count", 1) > 1:
            raise CaptureError(
                f"{self.path} is one of {self.entries['split.count']} parts (split.count): join "
                "them with llama.cpp's gguf-split --merge"
            )
        prefixes = (*_NO_EFFECT, "tokenizer.", f"{self.architecture}.")
        if strange := [name for name in self.entries if not name.startswith(prefixes)]:
            raise CaptureError(f"nothing reads the entry {some(strange)} of {self.path}")

    def _require_types(self) -> None:
        import gguf

        for tensor in self.tensors.values():
            size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
            try:
                gguf.dequantize(np.zeros((1, size), np.uint8), tensor.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise CaptureError(
                    f"{tensor.name} in {self.path} has the type {tensor.tensor_type.name}, which cannot be "
                    f"dequantized here: {one_line(error)}"
                ) from error

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model with dequantized weights.

        Raises:
            CaptureError: an entry or a tensor that nothing reads, or that is missing or of another shape.
        """
        from transformers import AutoModelForCausalLM, GgufConfig

        self._require_types()
        config, optional = self.configuration()
        with read_once():
            model, info = AutoModelForCausalLM.from_pretrained(
                **self._place,
                config=config,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        self._require_read(model, info, optional)
        if FACTORS in self.tensors:
            scale_frequencies(model, torch.from_numpy(self._values(FACTORS)))
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights are floating point now
        forget()
        _file.cache_clear()
        return model

    @property
    def _place(self) -> dict[str, str]:
        return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}

    def configuration(self) -> tuple[Any, set[str]]:
        """What the entries and the names of the tensors say of the model, and the biases that are zero.

        Raises:
            CaptureError: an entry, or a tensor, that nothing reads.
        """
        return copy.deepcopy(self._configuration[0]), self._configuration[1]

    @cached_property
    def _configuration(self) -> tuple[Any, set[str]]:
        from transformers import PreTrainedConfig

        with read_once():
            found, _ = PreTrainedConfig.get_config_dict(**self._place)
        factors = {name: self._values(name) for name in TENSORS if name in self.tensors}
        return self._with_options(configuration(self.entries, factors, found))

    def _values(self, name: str) -> Any:
        import gguf

        found = gguf.dequantize(self.tensors[name].data, self.tensors[name].tensor_type)
        return np.array(found, dtype=np.float32).reshape(-1)

    def _with_options(self, config: Any) -> tuple[Any, set[str]]:
        """The configuration with every option that the file's tensors ask for, and what that adds.

        Biases are where the file has them: a bias that an option adds and that the file lacks is zero.
        """
        unread, held = self._unread(config)
        added: set[str] = set()
        for option in _OPTIONS:
            if unread and getattr(config, option, None) is False:
                other = type(config)(**{**config.to_dict(), option: True})
                fewer, more = self._unread(other)
                if len(fewer) < len(unread):
                    config, unread, added = other, fewer, added | (more - held)
        if unread:
            raise CaptureError(
                f"a {config.model_type} of transformers does not read {some(sorted(unread))} of "
                f"{self.path}: it would compute something else. Give the checkpoint it was made of"
            )
        return config, added

    def _unread(self, config: Any) -> tuple[set[str], set[str]]:
        """Tensors of the file that a model of a configuration does not read, and the model's parameters."""
        from transformers import AutoModelForCausalLM
        from transformers.integrations.gguf import is_gguf_arch_supported
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        held = set(model.state_dict())
        require_rotary_width(model, self._own(), f"{self.architecture}.")
        if is_gguf_arch_supported(self.architecture):  # read by rules, and what is left over is reported
            return set(), held
        processor = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=config.to_dict())
        with read_once():
            known = get_gguf_hf_weights_map(model, processor)
        self._require_parts(known)
        names = {
            name for name in self.tensors if name not in known and name.removesuffix(".weight") not in known
        }
        return names - set(TENSORS), held

    def _require_parts(self, known: dict[str, str]) -> None:
        """Refuse a file that lacks one of several tensors that are one parameter here: it would be zeros."""
        parts = [name for name in known if list(known.values()).count(known[name]) > 1]
        if lacking := [n for n in parts if n not in self.tensors and f"{n}.weight" not in self.tensors]:
            raise CaptureError(f"expected the tensor {some(lacking)} in {self.path}, found none")

    def _own(self) -> dict[str, Any]:
        prefix = f"{self.architecture}."
        return {k.removeprefix(prefix): v for k, v in self.entries.items() if k.startswith(prefix)}

    def _require_read(self, model: PreTrainedModel, info: dict[str, Any], optional: set[str]) -> None:
        kind = type(model).__name__
        missing = {n for n in info["missing_keys"] if not (n in optional and n.endswith(".bias"))}
        for what, names in (("found none", missing), ("found more", set(info["unexpected_keys"]))):
            if names:
                raise CaptureError(
                    f"expected the tensors of a {kind} in {self.path}, {what}: {some(sorted(names))} (in "
                    "transformers' names)"
                )
        if mismatched := sorted(info["mismatched_keys"]):
            name, found, expected = mismatched[0]
            raise CaptureError(
                f"expected {name} as {list(expected)}, which the entries of {self.path} say of a "
                f"{kind}, found {list(found)}"
            )


@lru_cache(maxsize=1)
def _file(path: Path, changed: int, size: int) -> GgufFile:
    return GgufFile(path)
