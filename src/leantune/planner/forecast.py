"""What a forecast says, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Engine = Literal["traced", "closed form"]


@dataclass(frozen=True)
class Memory:
    """What is in memory at the moment of a training step when most is, in bytes.

    Attributes:
        weights: Parameters and buffers.
        gradients: Of trained parameters, as far as they exist at that moment.
        optimizer: Its state (AdamW: two numbers a trained parameter).
        activations: What autograd keeps of the layers for the backward pass.
        logits: The output head's results, the loss, and their gradients.
        temporary: Everything else that exists only for a moment; what gradient checkpointing computes again.
        quantization: Scales of quantised weights, and weights dequantised for a product.
        communication: On several GPUs, weights gathered and gradients on their way.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int
    quantization: int = 0
    communication: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Figures:
    """What one training step costs.

    Attributes:
        memory: At the peak, split.
        saved_activation_bytes: As `leantune.saved_activation_bytes` would measure it.
        parameters: Of base, head and adapter.
        trained: Parameters that are trained.
        forward_flops: Floating-point operations of the forward pass; None where they are not known.
        backward_flops: Of the backward pass, what checkpointing computes again included.
        engine: Where the figures come from.
        evaluation_peak: Bytes at the peak of an evaluation batch, between two training steps.
        saving_peak: Bytes while a checkpoint is written.
    """

    memory: Memory
    saved_activation_bytes: int
    parameters: int
    trained: int
    forward_flops: int | None
    backward_flops: int | None
    engine: Engine
    evaluation_peak: int = 0
    saving_peak: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the peak of training."""
        return self.memory.total

    @property
    def flops(self) -> int | None:
        """Of a forward and a backward pass."""
        known = self.forward_flops is not None and self.backward_flops is not None
        return (self.forward_flops or 0) + (self.backward_flops or 0) if known else None


@dataclass(frozen=True)
class Forecast:
    """One row of a plan.

    Attributes:
        name: The method, as in the table.
        own: Whether it is the recipe's own.
        changes: Recipe key → value: what makes the recipe this one.
        train: The main stage at its start; None where the method does not work on the model.
        estimate: The masked first stage of a pruned run.
        frozen: After LaMDA froze all of B.
        step_seconds: Of an optimizer step of the main stage, by its arithmetic; None: not known.
        refused: Why the method does not work on the model, in one line.
        note: What else there is to say, in one line.
    """

    name: str
    own: bool
    changes: dict[str, Any]
    train: Figures | None = None
    estimate: Figures | None = None
    frozen: Figures | None = None
    step_seconds: float | None = None
    refused: str | None = None
    note: str | None = None

    @property
    def largest(self) -> Figures | None:
        """The stage with the highest peak of training."""
        stages = [stage for stage in (self.train, self.estimate) if stage is not None]
        return max(stages, key=lambda figures: figures.peak, default=None)

    @property
    def peak(self) -> int | None:
        """Bytes at the peak of the whole run's training: the larger of its stages."""
        return None if self.largest is None else self.largest.peak

    @property
    def needed(self) -> int | None:
        """Bytes at the peak of the whole run: of training, evaluation and saving."""
        if self.largest is None or self.train is None:
            return None
        return max(self.largest.peak, self.train.evaluation_peak, self.train.saving_peak)

    @property
    def trained_at_end(self) -> int | None:
        """Parameters that are trained to the end."""
        last = self.frozen or self.train
        return None if last is None else last.trained

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the sums."""
        data = asdict(self)
        for stage in ("train", "estimate", "frozen"):
            figures = getattr(self, stage)
            if figures is not None:
                data[stage]["memory"]["total"] = figures.peak
        return data | {"peak": self.peak, "needed": self.needed, "trained_at_end": self.trained_at_end}
