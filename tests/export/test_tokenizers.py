"""A compiled folder has the model's own tokenizer files, and the runtimes make the same tokens of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rolora_passes.errors import LoweringError
from rolora_passes.export.tokenizers import require_same_tokens, require_tokenizer, save_tokenizer
from rolora_passes.loading.models import load_tokenizer

SPECIAL = ("<s>", "</s>", "<|end|>")


def byte_level(folder: Path, **names: Any) -> str:
    """A byte-level BPE in a folder that looks like a model's."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [AddedToken(s, special=True) for s in SPECIAL]
    words.train_from_iterator(
        ["the quick brown fox"],
        trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=specials, vocab_size=270),
    )
    return saved(folder, words, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|end|>"], **names)


def saved(folder: Path, words: Tokenizer, **names: Any) -> str:
    folder.mkdir(exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def test_own_files_travel_as_they_are(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "out").mkdir()
    save_tokenizer(source, load_tokenizer(source), tmp_path / "out")
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_the_runtimes_make_the_same_tokens(target: str, tmp_path: Path) -> None:
    assert require_tokenizer(byte_level(tmp_path / "model"), [target]) == []


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "model")
    tokenizer = load_tokenizer(source)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LoweringError, match=r"from that of executorch's runtime, found .* for 'The quick"):
        require_same_tokens(tmp_path / "model", tokenizer, ["executorch"])


def test_a_special_token_that_is_lost_is_named(tmp_path: Path) -> None:
    source = byte_level(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    known = json.loads(path.read_text())
    tokenizer = load_tokenizer(source)
    known["added_tokens"] = [token for token in known["added_tokens"] if token["content"] != "<|end|>"]
    path.write_text(json.dumps(known))
    with pytest.raises(LoweringError, match=r"know the special token <\|end\|> \(2\)"):
        require_same_tokens(tmp_path / "model", tokenizer, ["executorch"])


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    source = saved(tmp_path / "model", words)
    with pytest.raises(
        LoweringError, match=r"ExecuTorch's tokenizer cannot load the model's tokenizer\.json"
    ):
        require_tokenizer(source, ["executorch"])
