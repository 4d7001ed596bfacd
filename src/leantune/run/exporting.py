"""Take a run out of leantune: a plain PEFT LoRA, or a plain merged checkpoint. Compared before it is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leantune.errors import UserError
from leantune.lamda import save_as_lora
from leantune.run import lean
from leantune.run.folder import whole_folder, write_text
from leantune.run.loading import LoadedRun, attach_saved, base_for_run, open_run
from leantune.run.models import load_base, quiet_transformers, resolve

KINDS = ("lora", "merged", "pruned")
FIXED_TEXTS = ("The quick brown fox jumps over the lazy dog.", "Where is my card? It was sent 2 weeks ago!")
# Largest difference of logits, relative to their size, at which an export counts as equal to the run.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Exported:
    """An export that was compared with its run."""

    folder: Path
    kind: str
    max_abs_difference: float


def export(run: str | Path, to: str, out: str | Path) -> Exported:
    """Export a finished run; the folder appears only after its outputs were found equal to the run's.

    Args:
        run: The run folder.
        to: `lora` (a PEFT LoRA of the same rank, which opens without leantune) or `merged` (a plain
            checkpoint with the adapter folded in; after full fine-tuning, the model itself).
        out: A folder that does not exist yet or is empty.

    Returns:
        Where it lies and the largest difference of logits on fixed inputs.

    Raises:
        UserError: The run cannot be exported that way, the folder is taken, or the outputs differ.
    """
    if to not in KINDS:
        raise UserError(f"--to {to}: accepted are {', '.join(KINDS)}")
    place = Path(out).expanduser()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--out {out}: is there already and not empty")
    loaded = open_run(run)
    write = _writer(loaded, to)
    with whole_folder(place) as folder:
        inputs = _fixed_inputs(loaded)
        expected = _logits(loaded.model, inputs)
        with quiet_transformers():
            write(folder)
        if to == "lora":
            loaded.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", _readme(loaded, to))
        difference = _compare(expected, _logits(_reopen(loaded, to, folder), inputs), to)
    return Exported(place, to, difference)


def _writer(loaded: LoadedRun, to: str) -> Callable[[Path], Any]:
    """What writes the weights, or why that cannot be."""
    adapter = loaded.recipe.lean.adapter.type
    if to == "pruned":
        raise UserError(f"--to pruned: {loaded.folder.path} is not a pruned run")
    if to == "merged":
        return lambda folder: _merged(loaded).save_pretrained(folder)  # type: ignore[operator]
    if adapter == "none":
        raise UserError("--to lora: the run has no adapter (full fine-tuning); use --to merged")
    if adapter == "lora":
        return lambda folder: _copy_weights(loaded.folder.adapter, folder)
    return lambda folder: save_as_lora(loaded.model, folder)


def _merged(loaded: LoadedRun) -> nn.Module:
    if not lean.is_adapted(loaded.model):
        return loaded.model
    return loaded.model.merge_and_unload(safe_merge=True)  # type: ignore[operator]


def _copy_weights(source: Path, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, folder / name)


def _reopen(loaded: LoadedRun, to: str, folder: Path) -> nn.Module:
    """The export as a stranger would open it."""
    if to == "lora":
        model: nn.Module = attach_saved(base_for_run(loaded.recipe, loaded.task, loaded.config), folder)
    else:
        model = load_base(loaded.recipe.model, loaded.task.auto_class, loaded.config, source=str(folder))
    return model.to(next(loaded.model.parameters()).device).eval()


def _fixed_inputs(loaded: LoadedRun) -> dict[str, Tensor]:
    pair = [FIXED_TEXTS[::-1]] if loaded.recipe.data.text_pair else []
    encoded = loaded.tokenizer(list(FIXED_TEXTS), *map(list, pair), padding=True, return_tensors="pt")
    return dict(encoded.to(next(loaded.model.parameters()).device))


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def _compare(expected: Tensor, found: Tensor, to: str) -> float:
    """The largest difference.

    Raises:
        UserError: It is above what rounding explains, in the model's precision.
    """
    difference = (expected.double() - found.double()).abs().max().item()
    allowed = TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise UserError(
            f"--to {to}: the export's outputs differ from the run's by {difference:.2e} "
            f"(allowed {allowed:.2e}); nothing was written"
        )
    return difference


def _readme(loaded: LoadedRun, to: str) -> str:
    """How to open the export without leantune."""
    auto = loaded.task.auto_class.__name__
    base = resolve(loaded.recipe.model.path)
    if to == "merged":
        opening = f'model = {auto}.from_pretrained(".")'
        imports = f"from transformers import AutoTokenizer, {auto}"
    else:
        opening = (
            'config = AutoConfig.from_pretrained(".")   # number and names of labels\n'
            f'base = {auto}.from_pretrained("{base}", config=config)\n'
            'model = PeftModel.from_pretrained(base, ".")'
        )
        imports = f"from peft import PeftModel\nfrom transformers import AutoConfig, AutoTokenizer, {auto}"
    return (
        f"# {loaded.recipe.method} run on {loaded.recipe.model.path}, exported as {to}\n\n"
        f'```python\n{imports}\n\n{opening}\ntokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )
