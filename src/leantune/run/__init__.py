"""Execute recipes: data, model, training, evaluation, the run folder, prediction, export."""

from leantune.run.evaluation import evaluate
from leantune.run.exporting import export
from leantune.run.loading import load
from leantune.run.pipeline import Interrupted, Run, train
from leantune.run.prediction import predict
from leantune.run.switching import TaskSwitcher

__all__ = ["Interrupted", "Run", "TaskSwitcher", "evaluate", "export", "load", "predict", "train"]
