"""How good a model still is: perplexity, divergence and task accuracies of graphs and of artefacts."""

from rolora_passes.evaluation.perplexity import Divergence, Perplexity, divergence, perplexity
from rolora_passes.evaluation.scorers import GraphScorer, ProgramScorer, Scorer, open_scorer
from rolora_passes.evaluation.tasks import evaluate_tasks

__all__ = [
    "Divergence",
    "GraphScorer",
    "Perplexity",
    "ProgramScorer",
    "Scorer",
    "divergence",
    "evaluate_tasks",
    "open_scorer",
    "perplexity",
]
