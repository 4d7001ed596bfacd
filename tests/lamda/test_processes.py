"""Two processes share the parameters (DDP on gloo): frozen columns exact, the result that of one process."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS = 10


def train(model: nn.Module, wrapped: nn.Module, rows: slice) -> list[dict[str, Tensor]]:
    from leantune.lamda import freeze_columns
    from leantune.lamda.model import lamda_layers
    from tests.lamda.conftest import batch_for

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    history = []
    for step in range(1, STEPS + 1):
        wrapped(**{key: value[rows] for key, value in batch_for("llama", seed=step).items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freeze_columns(wrapped, optimizer, step, STEPS)
        history.append(
            {k: layer.joined_columns("default").clone() for k, layer in lamda_layers(model).items()}
        )
    return history


def _check_start_from_data(init: str, rank: int) -> None:
    """Each process sees half of the batches: the same A in both, that of one process which sees all."""
    from peft import get_peft_model

    import leantune.lamda.prepare as prepare
    from leantune import LamdaConfig
    from leantune.lamda.model import lamda_layers
    from tests.lamda.conftest import batch_for, build

    batches = [batch_for("llama", seed=number) for number in range(4)]
    settings = {"r": 12, "target_modules": ["q_proj", "up_proj"], "init": init}
    shared = get_peft_model(build("llama").double(), LamdaConfig(**settings))
    prepare.prepare_lamda(shared, batches[2 * rank : 2 * rank + 2])
    prepare.dist = types.SimpleNamespace(is_available=lambda: False)
    alone = get_peft_model(build("llama").double(), LamdaConfig(**settings))
    prepare.prepare_lamda(alone, batches)
    prepare.dist = dist
    for name, layer in lamda_layers(shared).items():
        A = layer.lamda_A["default"]
        first = A.clone()
        dist.broadcast(first, 0)
        assert torch.equal(A, first)
        B = lamda_layers(alone)[name].lamda_A["default"]
        torch.testing.assert_close((A @ B.T).abs(), torch.eye(12).double(), rtol=0, atol=1e-6)


def work() -> None:
    from peft import get_peft_model

    import leantune.lamda.freezing as freezing
    from leantune import LamdaConfig
    from tests.lamda.conftest import TARGETS, build

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    config = {"r": 5, "target_modules": TARGETS["llama"], "freeze_ratio": 0.6}
    shared = get_peft_model(build("llama"), LamdaConfig(**config))
    together = train(shared, nn.parallel.DistributedDataParallel(shared), slice(2 * rank, 2 * rank + 2))
    freezing._is_shared = lambda model: False
    alone = get_peft_model(build("llama"), LamdaConfig(**config))
    for step, (ours, theirs) in enumerate(zip(together, train(alone, alone, slice(4)), strict=True), start=1):
        frozen = freezing.frozen_columns(step, STEPS, 5, 0.6)
        for name, columns in ours.items():
            assert torch.equal(columns[:, :frozen], together[-1][name][:, :frozen])
            torch.testing.assert_close(columns, theirs[name], rtol=1e-3, atol=1e-4)
    for init in ("activation", "gradient"):
        _check_start_from_data(init, rank)
    Path(sys.argv[1], f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    subprocess.run(
        [*launcher, "-m", "tests.lamda.test_processes", str(tmp_path)], check=True, cwd=root, timeout=300
    )
    assert {path.name for path in tmp_path.iterdir()} == {"done-0", "done-1"}


if __name__ == "__main__":
    work()
