"""What a model is fine-tuned to do: columns → features, head, metrics, predictions. One module a kind."""

from transformers import PretrainedConfig

from leantune.recipes import Recipe
from leantune.run.tasks.base import Prediction, Task
from leantune.run.tasks.causal_lm import CausalLM
from leantune.run.tasks.seq2seq import Seq2Seq
from leantune.run.tasks.sequence import Classification, Regression

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, Regression, CausalLM, Seq2Seq)}


def make_task(recipe: Recipe, config: PretrainedConfig | None = None) -> Task:
    """The recipe's task; with `config` (of a finished run) it knows its labels already."""
    return TASKS[recipe.model.task](recipe, config)


__all__ = ["TASKS", "CausalLM", "Classification", "Prediction", "Regression", "Seq2Seq", "Task", "make_task"]
