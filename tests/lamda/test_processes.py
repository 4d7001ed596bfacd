"""Two processes share the parameters (DDP on gloo): frozen columns exact, the result that of one process."""

from __future__ import annotations

import subprocess
import sys
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
