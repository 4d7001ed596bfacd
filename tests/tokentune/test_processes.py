"""Two processes (DDP on gloo) choose different tokens and end with one process's gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def work() -> None:
    from leantune.tokentune import TokenTuneConfig, chosen_tokens, token_tune
    from tests.tiny_models import all_in_float64, batch_for, tiny

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    whole = batch_for("llama", batch=4, padding="right")
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}
    with all_in_float64():
        shared = token_tune(tiny("llama"), TokenTuneConfig(4, seed=7)).train()
        wrapped = nn.parallel.DistributedDataParallel(shared)
        wrapped(**half).loss.backward()
        own = chosen_tokens(shared)
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own)
        assert not torch.equal(both[0], both[1])
        # DDP averages over processes: one process that takes both halves with those choices, halved
        alone = token_tune(tiny("llama"), TokenTuneConfig(4, seed=7)).train()
        for number, choice in enumerate(both):
            rows = slice(2 * number, 2 * number + 2)
            part = {key: value[rows] for key, value in whole.items()}
            (alone(**part, token_choice=choice).loss / 2).backward()
    for one, other in zip(shared.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    Path(sys.argv[1], f"done-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.tokentune.test_processes", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["done-0", "done-1"]


if __name__ == "__main__":
    work()
