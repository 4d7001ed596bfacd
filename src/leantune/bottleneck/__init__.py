"""The bottleneck Adapter (serial and parallel) as a PEFT method. See README.md in this folder.

Importing this package makes the method known to PEFT (`import leantune` sees to it).
"""

from __future__ import annotations

from peft.utils import register_peft_method

from leantune.bottleneck.config import BottleneckConfig
from leantune.bottleneck.model import BottleneckModel
from leantune.peft_methods import add_peft_type

__all__ = ["BottleneckConfig", "BottleneckModel"]

add_peft_type("BOTTLENECK")
register_peft_method(
    name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix="bottleneck_"
)
