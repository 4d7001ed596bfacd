"""Training on several GPUs: who holds what (data parallel, ZeRO 1–3, FSDP).

Every process runs its own rows, so activations, logits and temporary memory stay what they are on one GPU.
What is split over N processes (Rajbhandari et al., "ZeRO", SC 2020, figure 1):

    strategy      weights   gradients   optimizer   besides
    ddp           1         1           1           DDP's buckets: the trained gradients once more
    zero1         1         1           1/N         the same buckets
    zero2         1         1/N         1/N         the trained gradients of the largest layer, to be reduced
    zero3, fsdp   1/N       1/N         1/N         gathered for use: what stands outside the layers, and two
                                                    layers (the one at work and the next); as in zero2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from leantune.errors import UserError

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
_SPLIT = {  # weights, gradients, optimizer
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp": (True, True, True),
}


@dataclass(frozen=True)
class Units:
    """Bytes that a strategy moves between processes, of one model.

    Attributes:
        largest: Weights of the largest layer.
        outside: Weights outside the layers: embeddings, output head, last norm.
        trained: All trained weights, which is the size of all gradients.
        trained_largest: Of those, the largest layer's share.
    """

    largest: int
    outside: int
    trained: int
    trained_largest: int


@dataclass(frozen=True)
class Sharing:
    """How many processes, and what they split.

    Attributes:
        gpus: N, one process each.
        strategy: As on the command line; of no meaning where N is 1.
    """

    gpus: int = 1
    strategy: Strategy = "ddp"

    @property
    def shares(self) -> tuple[float, float, float]:
        """What one process holds of weights, gradients and optimizer state."""
        weights, gradients, optimizer = (1 / self.gpus if split else 1.0 for split in _SPLIT[self.strategy])
        return weights, gradients, optimizer

    def communication(self, units: Units) -> int:
        """Bytes that one process has for gathering weights and reducing gradients."""
        if self.gpus == 1:
            return 0
        split_weights, split_gradients, _ = _SPLIT[self.strategy]
        reduced = units.trained_largest if split_gradients else units.trained
        return reduced + (units.outside + 2 * units.largest if split_weights else 0)


def parse_sharing(gpus: int, strategy: str | None) -> Sharing:
    """`--gpus` and `--strategy` as typed.

    Raises:
        UserError: One of them is not accepted, or a strategy stands alone.
    """
    if gpus < 1:
        raise UserError(f"--gpus = {gpus}: must be a whole number of at least 1")
    if strategy is not None and strategy not in STRATEGIES:
        raise UserError(f"--strategy = {strategy!r}: accepted are {', '.join(STRATEGIES)}")
    if strategy is not None and gpus == 1:
        raise UserError(f"--strategy = {strategy!r}: says how GPUs share a model; give --gpus 2 or more")
    return Sharing(gpus, strategy or "ddp")  # type: ignore[arg-type]
