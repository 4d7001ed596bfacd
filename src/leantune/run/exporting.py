"""Take a run out of leantune: a plain PEFT LoRA, or a plain merged checkpoint. Compared before it is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from leantune.anatomy import find_groups, find_head
from leantune.errors import UserError
from leantune.lamda import lamda_to_lora, save_as_lora
from leantune.lightpeft import Adapter, grow, plain_config, take
from leantune.run import lean
from leantune.run.data import open_splits
from leantune.run.evaluation import evaluate_split
from leantune.run.folder import whole_folder, write_text
from leantune.run.loading import LoadedRun, attach_saved, base_for_run, open_run
from leantune.run.models import load_base, quiet_transformers, resolve
from leantune.run.quantization import KINDS as QUANTISED
from leantune.run.quantization import dequantise, quantization_code

KINDS = ("lora", "merged", "pruned")
FIXED_TEXTS = ("The quick brown fox jumps over the lazy dog.", "Where is my card? It was sent 2 weeks ago!")
# Largest difference of logits, relative to their size, at which an export counts as equal to the run.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Exported:
    """An export that was compared with its run.

    Attributes:
        folder: Where it lies.
        kind: `lora`, `merged` or `pruned`.
        max_abs_difference: Of logits on fixed inputs.
        evaluation: Of a pruned run's adapter on the whole base, which is another model and not an equal one:
            `{"run": {metric: value}, "recovered": {metric: value}}`; None where the data is gone.
        base: Of a run on a quantised base, in words: which base the export holds or needs; else None.
    """

    folder: Path
    kind: str
    max_abs_difference: float
    evaluation: dict[str, dict[str, float]] | None = None
    base: str | None = None


def export(run: str | Path, to: str, out: str | Path) -> Exported:
    """Export a finished run; the folder appears only after its outputs were found equal to the run's.

    Args:
        run: The run folder.
        to: `lora` (a PEFT LoRA of the same rank, which opens without leantune; that of a pruned run is put
            back on the whole base, LoRAM's recovery, and evaluated there), `merged` (a plain checkpoint with
            the adapter folded in, of a quantised base into its dequantised weights; after full fine-tuning,
            the model itself), or `pruned` (the same of a pruned run, if the architecture's config can
            express it).
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
    recovered = loaded.plan is not None and to == "lora"
    evaluation = None
    with whole_folder(place) as folder:
        inputs = _fixed_inputs(loaded)
        expected = _expected(loaded, to, inputs)
        with quiet_transformers():
            write(folder)
        if to == "lora":
            loaded.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", _readme(loaded, to))
        reopened = _reopen(loaded, to, folder)
        found = _logits(reopened, inputs)
        if recovered:
            difference = (expected.double() - found.double()).abs().max().item()
            evaluation = _evaluate_both(loaded, reopened)
        else:
            difference = _compare(expected, found, to)
    return Exported(place, to, difference, evaluation, _base_in_words(loaded, to))


def _writer(loaded: LoadedRun, to: str) -> Callable[[Path], Any]:
    """What writes the weights, or why that cannot be."""
    adapter = loaded.recipe.lean.adapter.type
    if to == "pruned" and loaded.plan is None:
        raise UserError(f"--to pruned: {loaded.folder.path} is not a pruned run")
    if to == "merged" and loaded.plan is not None:
        raise UserError("--to merged: the run is pruned; use --to pruned, or --to lora for the whole base")
    if adapter == "bottleneck":
        raise UserError(f"--to {to}: a bottleneck adapter is not linear: it is no LoRA and cannot be merged")
    if to == "pruned":
        return _pruned_writer(loaded)
    if to == "merged":
        return lambda folder: _merged(loaded).save_pretrained(folder)  # type: ignore[operator]
    if adapter == "none":
        raise UserError("--to lora: the run has no adapter (full fine-tuning); use --to merged")
    if loaded.plan is not None:
        return lambda folder: _recovered(loaded).save(folder)
    if (variant := getattr(loaded.recipe.lean.adapter, "variant", "lora")) in ("adalora", "vera"):
        raise UserError(f"--to lora: {variant} is no LoRA in PEFT's files; use --to merged")
    if adapter == "lora":
        return lambda folder: _copy_weights(loaded.folder.adapter, folder)
    return lambda folder: save_as_lora(loaded.model, folder)


def _pruned_writer(loaded: LoadedRun) -> Callable[[Path], Any]:
    """The pruned model with its adapter merged, if its architecture's config can express the shapes."""
    assert loaded.plan is not None
    try:
        config = plain_config(_whole(loaded), loaded.plan)
    except UserError as error:
        raise UserError(f"--to pruned: {error}") from None

    def write(folder: Path) -> None:
        model: Any = _merged(loaded)
        model.config = config
        model.save_pretrained(folder)

    return write


def _recovered(loaded: LoadedRun) -> Adapter:
    """A pruned run's adapter as a LoRA of the whole base."""
    assert loaded.plan is not None
    if loaded.recipe.lean.adapter.type == "lora":
        adapter = take(loaded.model)
    else:
        adapter = Adapter(*lamda_to_lora(loaded.model))
    return grow(adapter, loaded.plan.cuts(find_groups(_whole(loaded))))


def _whole(loaded: LoadedRun) -> PreTrainedModel:
    """The unpruned model on meta: its shapes alone."""
    with torch.device("meta"):
        return loaded.task.auto_class.from_config(loaded.config)


def _evaluate_both(loaded: LoadedRun, recovered: nn.Module) -> dict[str, dict[str, float]] | None:
    """Metrics of the run and of its adapter on the whole base, on the split that counts most."""
    metrics = loaded.folder.metrics() or {}
    measured = metrics.get("evaluation") or {}
    split = next((name for name in ("test", "validation") if name in measured), None)
    if split is None:
        return None
    try:
        rows = open_splits(loaded.task.data, loaded.recipe.train.seed, need_train=False)[split]
    except UserError:
        return None  # the data is not here any more
    found = evaluate_split(replace(loaded, model=recovered), rows, split)
    return {"run": measured[split], "recovered": found}


def _merged(loaded: LoadedRun) -> nn.Module:
    if not lean.is_adapted(loaded.model):
        return loaded.model
    model = loaded.model if loaded.recipe.lean.quantize is None else _dequantised(loaded)
    return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]


def _dequantised(loaded: LoadedRun) -> nn.Module:
    """The run's adapter on what its quantised base stands for: rounded to 4 bits again, it would be lost."""
    base = base_for_run(loaded.recipe, loaded.task, loaded.config)
    dequantise(base)
    return attach_saved(base, loaded.folder.adapter).to(next(loaded.model.parameters()).device).eval()


def _expected(loaded: LoadedRun, to: str, inputs: dict[str, Tensor]) -> Tensor:
    """What an equal export says.

    A kind of quantisation that rounds a layer's inputs in evaluation agrees with no plain weights; a merged
    export of it is compared with the adapter on the dequantised base.
    """
    kind = loaded.recipe.lean.quantize
    if kind is not None and to == "merged" and QUANTISED[kind].rounds_inputs:
        return _logits(_dequantised(loaded), inputs)
    return _logits(loaded.model, inputs)


def _base_in_words(loaded: LoadedRun, to: str) -> str | None:
    kind = loaded.recipe.lean.quantize
    if kind is None:
        return None
    if to == "lora":
        return f"trained on the base in {kind} and equal there; on the whole base it is another model"
    return f"merged into the dequantised {kind} base, the weights that the adapter was trained on"


def _copy_weights(source: Path, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, folder / name)


def _reopen(loaded: LoadedRun, to: str, folder: Path) -> nn.Module:
    """The export as a stranger would open it."""
    if to == "lora":
        model: nn.Module = attach_saved(base_for_run(loaded.recipe, loaded.task, loaded.config), folder)
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = load_base(loaded.recipe.model, loaded.task.auto_class, config, source=str(folder))
    return model.to(next(loaded.model.parameters()).device).eval()


def _fixed_inputs(loaded: LoadedRun) -> dict[str, Tensor]:
    pair = [FIXED_TEXTS[::-1]] if loaded.recipe.data.text_pair else []
    encoded = loaded.tokenizer(list(FIXED_TEXTS), *map(list, pair), padding=True, return_tensors="pt")
    return loaded.task.fixed_inputs(dict(encoded.to(next(loaded.model.parameters()).device)))


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
    other = " Pruned there, on the whole base here: another model than the run's."
    note = other if to == "lora" and loaded.plan is not None else ""
    auto = loaded.task.auto_class.__name__
    base = resolve(loaded.recipe.model.path)
    note += f" {words[0].upper()}{words[1:]}." if (words := _base_in_words(loaded, to)) else ""
    if to in ("merged", "pruned"):
        opening = f'model = {auto}.from_pretrained(".")'
        imports = f"from transformers import AutoTokenizer, {auto}"
    else:
        code = quantization_code(find_head(loaded.model)) if loaded.recipe.lean.quantize else None
        quantised = ", quantization_config=quantization" if code else ""
        opening = (
            'config = AutoConfig.from_pretrained(".")   # number and names of labels\n'
            f"{code.before if code else ''}"
            f'base = {auto}.from_pretrained("{base}", config=config{quantised})\n'
            f"{code.after if code else ''}"
            'model = PeftModel.from_pretrained(base, ".")'
        )
        imports = f"from peft import PeftModel\nfrom transformers import AutoConfig, AutoTokenizer, {auto}"
        imports += f"\n{code.imports}" if code else ""
    return (
        f"# {loaded.recipe.method} run on {loaded.recipe.model.path}, exported as {to}.{note}\n\n"
        f'```python\n{imports}\n\n{opening}\ntokenizer = AutoTokenizer.from_pretrained(".")\n```\n'
    )
