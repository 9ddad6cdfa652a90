"""Task accuracy, computed by lm-eval for anything that gives logits.

A task is a name known to lm-eval, a group of ours (GROUPS), a `.yaml` file in lm-eval's format, or a `.jsonl`
file of multiple-choice questions, one `{"question": "…", "choices": ["…", …], "answer": 0}` per line, which
needs no network.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import TemplateError

from rolora_passes.errors import DataError, EvaluationError, MissingExtraError, one_line
from rolora_passes.evaluation.scorers import Scorer
from rolora_passes.evaluation.task_files import keep_templates_from_python, require_data
from rolora_passes.extras import require
from rolora_passes.loading.data import read_lines

GROUPS = {
    # the seven of RoLoRA's zero-shot commonsense reasoning
    "commonsense": (
        "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"
    ),
}  # fmt: skip
PROTOCOL = "lm-eval's tasks, prompts and metrics; no chat template; contexts cut on the left to fit"
LOCAL_PROTOCOL = (
    'zero-shot "Question: …\\nAnswer:", the answer whose " …" is likeliest: acc by log-likelihood, '
    "acc_norm by log-likelihood per character, both by lm-eval"
)
COUNTS = ("examples", "of", "shots", "version")  # what a task's row holds beside its metrics


@dataclass(frozen=True)
class Tasks:
    """Tasks by the names they were given, and as lm-eval loaded them, with their data."""

    asked: tuple[str, ...]
    loaded: Any


def evaluate_tasks(
    scorer: Scorer,
    tokenizer: Any,
    tasks: Sequence[str] | Tasks,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a scorer on tasks; the result is JSON: `tasks` by name, `groups`, `means` and the protocol.

    Args:
        tasks: names, `.yaml` or `.jsonl` files, as this module describes them; or what `load_tasks` returned.
        limit: examples of each task, from the start; None for all.
        seed: for everything that lm-eval draws, such as few-shot examples.
        shots: solved examples before each question, except in tasks that require none; None for each task's
            own number.
        on_progress: called with what is counted, the number done, and the total.

    Raises:
        MissingExtraError: lm-eval is not installed.
        EvaluationError: no such task, or its data set cannot be loaded.
        DataError: a task file is not what it should be.
    """
    ready = tasks if isinstance(tasks, Tasks) else load_tasks(tasks, seed, shots)
    from rolora_passes.evaluation.harness import ScorerLM

    random.seed(seed)  # as lm-eval's own command does
    torch.manual_seed(seed)
    require("numpy.random", "eval").seed(seed)
    lm = ScorerLM(scorer, tokenizer, on_progress)
    evaluator = require("lm_eval.evaluator", "eval")
    try:
        found = evaluator.evaluate(lm, ready.loaded, limit=limit, log_samples=False)
    except TemplateError as error:
        raise EvaluationError(f"a template of a task fails: {one_line(error)}") from error
    local = any(name.endswith(".jsonl") for name in ready.asked)
    return {
        "protocol": PROTOCOL,
        **({"local_protocol": LOCAL_PROTOCOL} if local else {}),
        "limit": limit,
        "seed": seed,
        "lm_eval": version("lm-eval"),
        **_results(found, ready.asked),
    }


def load_tasks(tasks: Sequence[str], seed: int = 0, shots: int | None = None) -> Tasks:
    """Load tasks with their data, so that both are known to exist before a model is opened."""
    names, manager = check_tasks(tasks)
    keep_templates_from_python()
    try:
        asked = [_local_task(Path(name)) if name.endswith(".jsonl") else name for name in names]
        loaded = manager.load(asked)
    except Exception as error:  # whatever lm-eval and the hub's client raise
        raise EvaluationError(
            f"cannot load the tasks {', '.join(map(_title, names))}: {one_line(error)}. Most tasks fetch a "
            "data set: run where the Hugging Face hub can be reached (HF_HUB_OFFLINE unset), or give "
            'questions as a .jsonl file of {"question", "choices", "answer"}'
        ) from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", own or 0 if shots is None or own == 0 else shots)
        task.set_fewshot_seed(seed=seed)
    return Tasks(tuple(tasks), loaded)


def check_tasks(tasks: Iterable[str]) -> tuple[list[str], Any]:
    """Names and files, with our groups expanded, and lm-eval's task manager.

    Raises:
        MissingExtraError, EvaluationError, DataError: see `evaluate_tasks`; no data set is fetched.
    """
    _require_lm_eval()
    names = [name for task in tasks for name in GROUPS.get(task, (task,))]
    files = {name for name in names if name.endswith((".jsonl", ".yaml"))}
    for name in files:
        if not Path(name).is_file():
            raise EvaluationError(f"expected a task file at {name}, found nothing")
        if name.endswith(".jsonl"):
            questions(Path(name))
        else:
            require_data(Path(name))
    titles = [_title(name) for name in names]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice or not names:
        raise EvaluationError(
            f"expected tasks, each once, found {' and '.join(twice) + ' twice' if twice else 'none'}"
        )
    by_name = set(names) - files
    manager = _manager(bool(by_name) or any(map(_is_group, files)))
    for name in by_name - set(manager.all_tasks):
        near = ", ".join(get_close_matches(name, [*manager.all_tasks, *GROUPS], 4)) or "`lm-eval ls tasks`"
        raise EvaluationError(
            f"expected a task of lm-eval, one of {', '.join(GROUPS)}, or a .jsonl or .yaml file, found "
            f"{name!r}; near it: {near}"
        )
    return names, manager


def _title(name: str) -> str:
    return Path(name).stem if name.endswith(".jsonl") else name


def _is_group(file: str) -> bool:
    """Whether a `.yaml` file is a group, which may refer to lm-eval's own tasks."""
    return file.endswith(".yaml") and any(
        line.startswith("group:") for line in Path(file).read_text("utf-8").split("\n")
    )


@functools.cache
def _manager(named: bool) -> Any:
    """lm-eval's task manager; indexing its tasks takes seconds, so it does that only for named tasks."""
    return require("lm_eval.tasks", "eval").TaskManager(include_defaults=named)


def _require_lm_eval() -> None:
    try:
        require("lm_eval.evaluator", "eval")
        require("lm_eval.tasks", "eval").TaskManager.load  # noqa: B018
    except MissingExtraError:
        raise
    except (ImportError, AttributeError) as error:  # 0.4.9 does not import beside transformers 5
        raise MissingExtraError(
            f"lm-eval {version('lm-eval')} does not work here, with transformers {version('transformers')}: "
            f"{one_line(error)}; run `pip install --upgrade rolora-passes[eval]`"
        ) from error


def questions(path: Path) -> list[dict[str, Any]]:
    """The multiple-choice questions in a `.jsonl` file.

    Raises:
        DataError: there is none, or one is not {"question": text, "choices": [texts], "answer": index}.
    """
    try:
        rows = read_lines(path.read_text("utf-8"), path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"expected questions in {path}, found none")
    for number, row in rows:
        choices, answer = row.get("choices"), row.get("answer")
        good = isinstance(row.get("question"), str) and isinstance(choices, list) and len(choices) > 1
        good = good and all(isinstance(choice, str) and choice for choice in choices or ())
        if not good or type(answer) is not int or not 0 <= answer < len(choices or ()):
            raise DataError(
                'expected {"question": text, "choices": [two texts or more], "answer": index of the right '
                f"one}} in line {number} of {path}, found {row!r:.100}"
            )
    return [{key: row[key] for key in ("question", "choices", "answer")} for _, row in rows]


def _local_task(path: Path) -> Any:
    """A file of questions as an lm-eval task."""
    rows = questions(path)
    dataset = require("datasets", "eval").Dataset.from_list(rows)
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return require("lm_eval.api.task", "eval").ConfigurableTask(
        config={
            "task": path.stem,
            "custom_dataset": lambda **_: {"test": dataset},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda row: f"Question: {row['question']}\nAnswer:",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["answer"],
            "metric_list": metrics,
            "num_fewshot": 0,
            "metadata": {"version": 1.0},
        }
    )


def _results(found: dict[str, Any], asked: Iterable[str]) -> dict[str, Any]:
    """lm-eval's results, with one key per metric."""
    groups = found.get("groups") or {}
    counts, shots, versions = found["n-samples"], found["n-shot"], found["versions"]
    tasks = {
        name: {
            **_metrics(row),
            "examples": counts[name]["effective"],
            "of": counts[name]["original"],
            "shots": shots.get(name),
            "version": versions.get(name),
        }
        for name, row in found["results"].items()
        if name in counts
    }
    means = {name: _mean([tasks[_title(task)] for task in GROUPS[name]]) for name in asked if name in GROUPS}
    return {"tasks": tasks, "groups": {name: _metrics(row) for name, row in groups.items()}, "means": means}


def _metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """`acc,none` becomes acc; a standard error that lm-eval could not compute is None."""
    found = {}
    for key, value in row.items():
        metric, _, filtered = key.partition(",")
        if filtered:
            name = metric if filtered == "none" else key
            known = isinstance(value, (int, float)) and math.isfinite(value)
            found[name] = float(value) if known else None
    return found


def stderr_name(metric: str) -> str:
    """The key of a metric's standard error: `acc_stderr`, and `exact_match_stderr,strict` with a filter."""
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _mean(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over tasks: of acc, and of acc_norm if a task has it or else acc, as RoLoRA reports it."""
    return {
        "acc": fmean(row["acc"] for row in rows),
        "acc_norm_or_acc": fmean(row.get("acc_norm", row["acc"]) for row in rows),
    }
