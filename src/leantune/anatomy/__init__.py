"""Where things live in a model: the only place in leantune that knows architectures.

- `stack`: the head model inside any wrapper, its stacks of layers, the per-position arguments of a layer
- `attention`: interception of every attention call
- `deberta`: the one stock attention that is not reached that way
- `heads`: the task of a head, and which tokens feed it
- `blocks`: attention heads and feed-forward neurons, and which features of which layers belong to them
"""

from leantune.anatomy.attention import Kernel, attention_handled_by, current_handler, is_sdpa
from leantune.anatomy.blocks import Attribute, Cut, Group, find_groups
from leantune.anatomy.deberta import disentangled_forward, is_disentangled
from leantune.anatomy.example import example
from leantune.anatomy.heads import TOKENWISE, Pooling, Task, decoder_inputs, find_task, poolings
from leantune.anatomy.stack import Side, Stack, argument_names, find_head, find_stacks, position_axis

__all__ = [
    "TOKENWISE",
    "Attribute",
    "Cut",
    "Group",
    "Kernel",
    "Pooling",
    "Side",
    "Stack",
    "Task",
    "argument_names",
    "attention_handled_by",
    "current_handler",
    "decoder_inputs",
    "disentangled_forward",
    "example",
    "find_groups",
    "find_head",
    "find_stacks",
    "find_task",
    "is_disentangled",
    "is_sdpa",
    "poolings",
    "position_axis",
]
