"""How good a model is: perplexity, divergence and task accuracy of graphs and of compiled programs."""

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
