"""lm-eval sees the log-likelihoods the model gives, and its accuracies are those counted by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny_checkpoint import character_tokenizer, save_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rolora_passes.errors import DataError, EvaluationError, MissingExtraError
from rolora_passes.evaluation import Scorer, evaluate_tasks, open_scorer
from rolora_passes.evaluation.harness import ScorerLM
from rolora_passes.evaluation.tasks import GROUPS, _mean, check_tasks, load_tasks, questions

QUESTIONS = [
    {"question": "What is red?", "choices": ["a rose", "grass {{ and }} sky", "snow"], "answer": 0},
    {"question": "Two and two", "choices": ["4", "5"], "answer": 0},
    {"question": "Two and one", "choices": ["4", "3"], "answer": 1},
    {"question": "A long word", "choices": ["antidisestablishmentarianism", "ox", "i"], "answer": 0},
    {"question": 'He said "no"', "choices": ["yes", "no", "maybe"], "answer": 1},
]


class Torch(Scorer):
    """transformers' own model; what it was asked is kept."""

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.model, self.max_length, self.vocabulary = model, max_length, model.config.vocab_size
        self.asked: list[tuple[list[int], int]] = []
        self.shapes: list[tuple[int, ...]] = []

    def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
        assert tokens.shape[1] <= self.max_length
        self.shapes.append(tuple(tokens.shape))
        self.asked.append((tokens[0].tolist(), start))
        with torch.no_grad():
            return self.model(input_ids=tokens).logits[:, start:]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def harness(model: PreTrainedModel, max_length: int = 256) -> ScorerLM:
    return ScorerLM(Torch(model, max_length), character_tokenizer())


def ask(method: Callable[[list[Instance]], Any], *arguments: tuple[Any, ...]) -> Any:
    return method([Instance("loglikelihood", {}, given, i) for i, given in enumerate(arguments)])


def by_hand(model: PreTrainedModel, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """One token after another: the sum of log-probabilities, and whether each was the likeliest."""
    total, greedy = 0.0, True
    for token in answer:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([context])).logits[0, -1].double().log_softmax(-1)
        total, greedy = total + float(found[token]), greedy and int(found.argmax()) == token
        context = [*context, token]
    return total, greedy


def likeliest(model: PreTrainedModel, context: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            context = [*context, int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())]
    return context[-count:]


@pytest.mark.parametrize("batch_tokens", [0, 64, 1024])
def test_loglikelihood_is_that_of_the_model(model: PreTrainedModel, batch_tokens: int) -> None:
    """One by one, and in rows of other lengths, padded."""
    tokenizer, lm = character_tokenizer(), harness(model)
    lm.scorer.batch_tokens = batch_tokens
    context = "Question: Why?\nAnswer:"
    greedy = tokenizer.decode(likeliest(model, tokenizer.encode(context), 5))
    pairs = [
        (context, " because"),
        (context, greedy),
        (context, greedy[:4] + "#"),
        (context, "b"),
        ("", "b c"),
    ]
    pairs += [("Ends in a space ", "word")]
    found = ask(lm.loglikelihood, *pairs)
    rows = [rows for rows, _ in lm.scorer.shapes]
    # Two answers differ in their last token alone, so their logits are the same.
    assert rows == {0: [1] * 5, 64: [2, 2, 1], 1024: [5]}[batch_tokens]
    for (context, answer), (value, is_greedy) in zip(pairs, found, strict=True):
        before = tokenizer.encode(context) or [tokenizer.eos_token_id]
        expected, was_greedy = by_hand(model, before, tokenizer.encode(answer))
        if context.endswith(" "):  # lm-eval counts the space with the answer
            expected, was_greedy = by_hand(model, before[:-1], tokenizer.encode(" " + answer))
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_greedy == was_greedy
    assert [is_greedy for _, is_greedy in found[:3]] == [False, True, False]


def test_contexts_are_cut_on_the_left(model: PreTrainedModel) -> None:
    tokenizer, lm = character_tokenizer(), harness(model, max_length=12)
    ((value, _),) = ask(lm.loglikelihood, ("far too long a context for it", " end"))
    assert lm.scorer.asked == [(tokenizer.encode("ntext for it en"[-12:]), 8)]
    kept = tokenizer.encode("ntext for it")[-9:]
    assert value == pytest.approx(by_hand(model, kept, tokenizer.encode(" end"))[0], abs=1e-4)
    with pytest.raises(EvaluationError, match="an answer of 1 to 12 tokens, found 13 after 'a'"):
        ask(lm.loglikelihood, ("a", "b" * 13))


def test_answers_of_one_token_cost_one_call(model: PreTrainedModel) -> None:
    lm = harness(model)
    found = ask(lm.loglikelihood, *[("Answer:", letter) for letter in "ABCD"])
    assert len(lm.scorer.asked) == 1 and len({value for value, _ in found}) == 4


def test_the_same_text_divided_otherwise(model: PreTrainedModel) -> None:
    """What was kept of the request before is not taken for another's."""
    tokenizer, pairs = character_tokenizer(), [("Answer: a", "bc"), ("Answer:", " abc"), ("Answer: ab", "c")]
    for (context, answer), (value, _) in zip(pairs, ask(harness(model).loglikelihood, *pairs), strict=True):
        expected = by_hand(model, tokenizer.encode(context), tokenizer.encode(answer))[0]
        assert value == pytest.approx(expected, abs=1e-4)


def test_rolling(model: PreTrainedModel) -> None:
    """Every token once, each window with as much context as there is."""
    tokenizer, text = character_tokenizer(), "abcdefghijkl"
    ids = tokenizer.encode(text)
    (whole,) = ask(harness(model).loglikelihood_rolling, (text,))
    assert whole == pytest.approx(by_hand(model, [tokenizer.eos_token_id], ids)[0], abs=1e-4)
    (cut,) = ask(harness(model, max_length=5).loglikelihood_rolling, (text,))
    parts = [([tokenizer.eos_token_id], ids[:5]), (ids[4:5], ids[5:10]), (ids[6:10], ids[10:])]
    assert cut == pytest.approx(sum(by_hand(model, *part)[0] for part in parts), abs=1e-4)


def test_generation_is_greedy_up_to_a_stop(model: PreTrainedModel) -> None:
    tokenizer, lm = character_tokenizer(), harness(model, max_length=64)
    new = tokenizer.decode(likeliest(model, tokenizer.encode("Say:"), 8))
    assert "~" not in new, "choose another prompt: this one ends at once"
    for settings, expected in (
        ({"max_gen_toks": 8}, new),
        ({"until": new[3:5], "max_gen_toks": 8}, new.split(new[3:5])[0]),
        ({"until": ["", new[6]], "max_gen_toks": 8, "do_sample": False}, new.split(new[6])[0]),
    ):
        assert ask(lm.generate_until, ("Say:", settings)) == [expected]
    with pytest.raises(EvaluationError, match="expected a task with greedy generation, found"):
        ask(lm.generate_until, ("Say:", {"do_sample": True}))
    with pytest.raises(EvaluationError, match="generates up to 256 tokens; the model holds 64"):
        ask(lm.generate_until, ("Say:", {}))


def test_generation_stops_at_the_end_of_text(model: PreTrainedModel) -> None:
    class Ends(Torch):
        def logits(self, tokens: Tensor, start: int = 0) -> Tensor:
            found = torch.zeros(1, tokens.shape[1] - start, 97)
            found[..., 70 if tokens.shape[1] < 7 else character_tokenizer().eos_token_id] = 1
            return found

    lm = ScorerLM(Ends(model, 256), character_tokenizer())
    assert ask(lm.generate_until, ("Say:", {"max_gen_toks": 9})) == [character_tokenizer().decode([70] * 3)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_of_questions(checkpoint: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    scorer, tokenizer = open_scorer(checkpoint)
    done: list[tuple[str, int, int]] = []
    path = write(tmp_path / "quiz.jsonl", QUESTIONS)
    found = evaluate_tasks(scorer, tokenizer, [path], seed=7, on_progress=lambda *at: done.append(at))
    right, right_normed = [], []
    for row in QUESTIONS:
        prompt = tokenizer.encode(f"Question: {row['question']}\nAnswer:")
        scores = [by_hand(model, prompt, tokenizer.encode(" " + choice))[0] for choice in row["choices"]]
        normed = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["answer"])
        right_normed.append(normed.index(max(normed)) == row["answer"])
    quiz = found["tasks"]["quiz"]
    assert quiz["acc"] == pytest.approx(sum(right) / 5)
    assert quiz["acc_norm"] == pytest.approx(sum(right_normed) / 5)
    assert right != right_normed, "the questions do not tell the two apart"
    p = quiz["acc"]
    assert quiz["acc_stderr"] == pytest.approx((p * (1 - p) / 4) ** 0.5)
    assert (quiz["examples"], quiz["of"], quiz["shots"]) == (5, 5, 0)
    assert (found["seed"], found["limit"], found["lm_eval"]) == (7, None, sys.modules["lm_eval"].__version__)
    assert "likeliest" in found["local_protocol"] and found["groups"] == found["means"] == {}
    assert done[-1] == ("answers", 13, 13)
    json.dumps(found, allow_nan=False)
    first = evaluate_tasks(scorer, tokenizer, [path], limit=2)["tasks"]["quiz"]
    assert (first["examples"], first["of"], first["acc"]) == (2, 5, sum(right[:2]) / 2)


def test_a_yaml_task(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed to lm-eval as it is."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_target: answer\ndoc_to_choice: choices\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    scorer, tokenizer = open_scorer(checkpoint)
    quiz = write(tmp_path / "quiz.jsonl", QUESTIONS)
    found = evaluate_tasks(scorer, tokenizer, [str(tmp_path / "mine.yaml"), quiz])["tasks"]
    assert found["mine"]["acc"] == found["quiz"]["acc"]


def test_a_yaml_task_runs_no_python(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a function that it names, nor one that a file it includes names, nor a template's."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    mine, ran = tmp_path / "mine.yaml", tmp_path / "ran"
    (tmp_path / "surprise.py").write_text(f"open({str(ran)!r}, 'w')\ndef text(doc): return ''\n")
    (tmp_path / "base.yaml").write_text("doc_to_text: !function surprise.text\n")
    for text in ("task: mine\ndoc_to_text: !function surprise.text\n", "task: mine\ninclude: base.yaml\n"):
        mine.write_text(text)
        with pytest.raises(
            EvaluationError, match=r"has lm-eval run !function surprise\.text; a task file may"
        ):
            load_tasks([str(mine)])
    mine.write_text("task: [")
    with pytest.raises(EvaluationError, match=r"is not a task in YAML"):
        load_tasks([str(mine)])
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    code = "{{ cycler.__init__.__globals__.os.mkdir('" + str(ran) + "') }}"
    mine.write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_target: answer\ndoc_to_choice: choices\n"
        f'doc_to_text: "{code}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    with pytest.raises(EvaluationError, match="SecurityError"):
        evaluate_tasks(*open_scorer(checkpoint), [str(mine)])
    assert not ran.exists()


def test_means_of_a_group(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, QUESTIONS[:n]) for name, n in (("one.jsonl", 2), ("two.jsonl", 5)))
    monkeypatch.setitem(GROUPS, "both", (one, two))
    found = evaluate_tasks(*open_scorer(checkpoint), ["both"])
    rows = list(found["tasks"].values())
    assert found["means"]["both"] == {
        "acc": pytest.approx((rows[0]["acc"] + rows[1]["acc"]) / 2),
        "acc_norm_or_acc": pytest.approx((rows[0]["acc_norm"] + rows[1]["acc_norm"]) / 2),
    }


def test_a_mean_takes_acc_where_there_is_no_acc_norm() -> None:
    rows = [{"acc": 0.5, "acc_norm": 0.25}, {"acc": 0.75}]
    assert _mean(rows) == {"acc": 0.625, "acc_norm_or_acc": 0.5}


def test_names_of_tasks() -> None:
    names, manager = check_tasks(["commonsense", "mmlu"])
    assert len(names) == 8 and set(names) <= set(manager.all_tasks)
    for tasks, message in (
        (["piqqa"], "expected a task of lm-eval, .* found 'piqqa'; near it: piqa"),
        (["none.jsonl"], "expected a task file at none.jsonl, found nothing"),
        (["none.yaml"], "expected a task file at none.yaml, found nothing"),
        (["piqa", "commonsense"], "each once, found piqa twice"),
        ([], "expected tasks, each once, found none"),
    ):
        with pytest.raises(EvaluationError, match=re.escape(message).replace(r"\.\*", ".*")):
            check_tasks(tasks)


GOOD = {"question": "a", "choices": ["b", "c"], "answer": 0}
ROWS: dict[str, Any] = {
    "no answer": {"question": "a", "choices": ["b", "c"]},
    "beyond": {**GOOD, "answer": 2},
    "negative": {**GOOD, "answer": -1},
    "a letter": {**GOOD, "answer": "A"},
    "true": {**GOOD, "answer": True},
    "one choice": {**GOOD, "choices": ["b"]},
    "empty choice": {**GOOD, "choices": ["b", ""]},
    "text": {**GOOD, "choices": "bc"},
    "numbers": {**GOOD, "choices": [1, 2]},
    "no question": {"choices": ["b", "c"], "answer": 0},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_questions_that_are_none(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", [GOOD, row])
    with pytest.raises(
        DataError, match=r"expected {\"question\": text, .*} in line 2 of .*quiz.jsonl, found {"
    ):
        check_tasks([path])


def test_files_of_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "quiz.jsonl"
    for content, message in (
        (b"", "questions in .*, found none"),
        (b"\xff", "not text"),
        (b"{", "line 1 of .* JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            questions(path)


def test_data_out_of_reach(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'you/rows' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", fail)
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: you/rows\noutput_type: multiple_choice\n")
    message = (
        r"cannot load the tasks .*mine.*: ConnectionError: .*Hub \(Off.*HF_HUB_OFFLINE unset.*\.jsonl file"
    )
    with pytest.raises(EvaluationError, match=message):
        evaluate_tasks(*open_scorer(checkpoint), [str(tmp_path / "mine.yaml")])


def test_examples_shown_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = write(tmp_path / "rows.jsonl", QUESTIONS)
    for name, shots in (("plain", ""), ("zero", "num_fewshot: 0\n"), ("one", "num_fewshot: 1\n")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
            f"test_split: test\nfewshot_split: test\noutput_type: multiple_choice\n{shots}"
            "doc_to_target: answer\ndoc_to_choice: choices\ndoc_to_text: question\n"
        )
    files = [str(tmp_path / f"{name}.yaml") for name in ("plain", "zero", "one")]
    opened = open_scorer(checkpoint)
    for shots, expected in ((None, [0, 0, 1]), (2, [2, 0, 2])):
        found = evaluate_tasks(*opened, files, limit=1, shots=shots)["tasks"]
        assert [found[name]["shots"] for name in ("plain", "zero", "one")] == expected
        assert found["one"]["acc"] in (0, 1) and found["one"]["acc_stderr"] is None


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules, "lm_eval"]:
        if name.partition(".")[0] == "lm_eval":
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingExtraError, match=r"lm_eval\S* is not installed: run `pip install rolora-passes\[eval\]`"
    ):
        check_tasks(["piqa"])


def test_an_lm_eval_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise AttributeError("module transformers has no attribute AutoModelForVision2Seq")

    monkeypatch.setattr("rolora_passes.evaluation.tasks.require", fail)
    message = (
        r"lm-eval \S+ does not work here, with transformers \S+: .*Vision2Seq; run `pip install --upgrade"
    )
    with pytest.raises(MissingExtraError, match=message):
        check_tasks(["piqa"])
