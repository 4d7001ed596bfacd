"""Light-PEFT: learn early what a task does not need, prune base and adapter, leave the base on disk alone."""

from leantune.lightpeft.config import LightPeftConfig
from leantune.lightpeft.decide import check_amounts, learned_plan, make_plan, random_plan
from leantune.lightpeft.estimation import LightPeftEstimation, attach_masks, detach_masks, estimation_of
from leantune.lightpeft.express import plain_config
from leantune.lightpeft.load import Weights, load_pruned
from leantune.lightpeft.plan import PruningPlan
from leantune.lightpeft.prune import prune, shrink
from leantune.lightpeft.reshape import Adapter, grow, take

__all__ = [
    "Adapter",
    "LightPeftConfig",
    "LightPeftEstimation",
    "PruningPlan",
    "Weights",
    "attach_masks",
    "check_amounts",
    "detach_masks",
    "estimation_of",
    "grow",
    "learned_plan",
    "load_pruned",
    "make_plan",
    "plain_config",
    "prune",
    "random_plan",
    "shrink",
    "take",
]
