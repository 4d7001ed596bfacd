"""One of two gloo processes that train a step together; writes forecast and measured peak as RANK.json."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from leantune.anatomy import find_head, find_stacks
from leantune.planner import Sharing, estimate, trace
from leantune.planner.building import build_real
from leantune.planner.measured import _peak
from leantune.planner.step import Step, make_batch
from tests.planner.settings import setting


def local(tensor: Any) -> Any:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    """Build, share, train three steps, measure the last."""
    strategy: Any = sys.argv[1]
    lean, place = json.loads(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = replace(setting("llama", lean), sharing=Sharing(2, strategy), evaluates=False)
    torch.manual_seed(0)
    model: Any = build_real(made)
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in [layer for stack in find_stacks(find_head(model)) for layer in stack.layers]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        shared = model
    else:
        shared = DistributedDataParallel(model)
    trained = [p for p in shared.parameters() if p.requires_grad]
    if strategy == "zero1":
        optimizer: Any = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
    step, batch = Step(shared, optimizer, made), make_batch(made)
    for _ in range(2):  # DDP makes its buckets anew in the second
        step.run(batch)
        optimizer.zero_grad(set_to_none=True)
    inner = optimizer.optim if strategy == "zero1" else optimizer
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    held += [value for state in inner.state.values() for value in state.values()]
    tensors = [local(value) for value in held if isinstance(value, torch.Tensor)]
    # DDP's buckets are older than the measured step
    buckets = 0 if strategy == "fsdp" else sum(p.numel() * p.element_size() for p in trained)
    measured = _peak(lambda: step.run(batch), tensors) + buckets
    found = {
        "world": dist.get_world_size(),
        "sharded": any(isinstance(p, DTensor) for p in shared.parameters()),
        "measured": measured,
        "forecast": trace(made).peak,
        "closed_form": estimate(made).peak,
    }
    (place / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
