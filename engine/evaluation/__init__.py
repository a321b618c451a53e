"""The paper's evaluations: data set readers, protocols and scorers (specification §14)."""

from facetrt.engine.evaluation.catalogue import EVALUATIONS, open_evaluation
from facetrt.engine.evaluation.protocol import Choice, Evaluation, Options, Row, Summary
from facetrt.engine.evaluation.running import evaluate

__all__ = ["EVALUATIONS", "Choice", "Evaluation", "Options", "Row", "Summary", "evaluate", "open_evaluation"]
