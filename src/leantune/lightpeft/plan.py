"""The pruning plan: what stays of a base model and of its adapter, as plain data.

On disk a plan is `plan.json` and, beside it, `masks.safetensors` (the learned masks; folded into the kept
units' weights when the plan is carried out). Both together are a few hundred kilobytes; the base itself is
never written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from leantune.anatomy import Group, find_groups, find_head
from leantune.errors import UserError
from leantune.lightpeft.config import LightPeftConfig
from leantune.lightpeft.fingerprint import Fingerprint, Reader, check_same_base, plain_name
from leantune.lightpeft.picture import picture
from leantune.lightpeft.surgery import ModuleCut, module_cuts, parameter_cuts, slice_parameter

FORMAT = 1
_LARGEST_FILE = 256 * 2**20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Units(_Strict):
    """What stays of one attention or FFN block."""

    kind: Literal["heads", "neurons"]
    layer: int = Field(ge=0)
    count: int = Field(gt=0)
    kept: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _sensible(self) -> Units:
        if not self.kept:
            raise ValueError("keeps no unit: a layer must not be emptied")
        if list(self.kept) != sorted(set(self.kept)) or self.kept[-1] >= self.count:
            raise ValueError(f"kept must be ascending numbers below {self.count}, each once")
        return self


class Module(_Strict):
    """What stays of one module of the adapter."""

    rank: int = Field(gt=0)
    kept: tuple[Annotated[int, Field(ge=0)], ...]
    importance: float | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Module:
        if list(self.kept) != sorted(set(self.kept)) or (self.kept and self.kept[-1] >= self.rank):
            raise ValueError(f"kept must be ascending numbers below {self.rank}, each once")
        return self


class _File(_Strict):
    format: Literal[1]
    base: Fingerprint
    settings: dict[str, Any]
    groups: dict[str, Units]
    modules: dict[str, Module]
    masks_sha256: str | None


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """What is pruned (METHODS §2).

    Attributes:
        groups: Name of each attention and FFN block (without the base model's prefix) → its kept units.
        modules: Name of each module of the adapter → its kept ranks (none: the module goes). Empty where only
            the base is pruned.
        masks: Block → learned mask (count,), float32; folded into what is kept. Empty: nothing is folded.
        base: Fingerprint of the base that the plan is for.
        settings: The `LightPeftConfig` it was made with.
    """

    groups: dict[str, Units]
    base: Fingerprint
    modules: dict[str, Module] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    settings: LightPeftConfig = field(default_factory=LightPeftConfig)

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Block → kept units, of the blocks that lose any."""
        return {name: units.kept for name, units in self.groups.items() if len(units.kept) < units.count}

    def check(
        self, model: nn.Module, groups: tuple[Group, ...] | None = None, read: Reader | None = None
    ) -> tuple[Group, ...]:
        """See that the plan is for this model's base; returns the model's groups.

        Args:
            model: The whole model; on meta if `read` is given.
            groups: From `find_groups(model)`.
            read: Reads a weight by parameter name, where the model itself holds none yet.

        Raises:
            UserError: It is for another base, or names blocks that the model does not have.
        """
        groups = groups or find_groups(model)
        check_same_base(self.base, model, groups, read)
        counts = {group.name: group.count for group in groups}
        for name, units in self.groups.items():
            if counts.get(name) != units.count:
                found = f"{counts[name]} there" if name in counts else "not in this model"
                raise UserError(
                    f"the pruning plan does not fit: {name} has {units.count} {units.kind}, {found}"
                )
        return groups

    def cuts(self, groups: tuple[Group, ...]) -> dict[str, ModuleCut]:
        """What each layer of the base loses."""
        return module_cuts(groups, self.kept, self.masks)

    def sizes(self, whole: nn.Module) -> tuple[int, int, int]:
        """Parameters of the whole base without its head, of the blocks that can be cut, and those that go.

        Args:
            whole: The whole model; meta tensors will do.
        """
        head = find_head(whole)
        groups = find_groups(whole)
        everything = dict(head.base_model.named_parameters())
        names = {plain_name(head, cut.module) for group in groups for cut in group.cuts}
        blocks = sum(p.numel() for name, p in everything.items() if name.rpartition(".")[0] in names)
        gone = sum(
            weight.numel() - slice_parameter(weight, cut).numel()
            for name, cut in parameter_cuts(head, self.cuts(groups)).items()
            for weight in [head.get_parameter(name).to("meta")]
        )
        return sum(p.numel() for p in everything.values()), blocks, gone

    def __str__(self) -> str:
        return picture(self.groups, self.modules)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, file: str | Path) -> None:
        """Write `file` (JSON) and, if there are masks, `masks.safetensors` beside it."""
        place = Path(file)
        masks = (
            save_tensors({name: mask.contiguous() for name, mask in self.masks.items()})
            if self.masks
            else None
        )
        content = _File(
            format=FORMAT,
            base=self.base,
            settings=self.settings.to_dict(),
            groups=self.groups,
            modules=self.modules,
            masks_sha256=hashlib.sha256(masks).hexdigest() if masks else None,
        )
        if masks:
            (place.parent / "masks.safetensors").write_bytes(masks)
        place.write_text(_one_line_each(content.model_dump(mode="json")), encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            UserError: A file is missing, damaged, or not a plan.
        """
        place = Path(file)
        content = _read(place)
        masks: dict[str, Tensor] = {}
        if content.masks_sha256 is not None:
            masks = _read_masks(place.parent / "masks.safetensors", content.masks_sha256)
        for name, mask in masks.items():
            if name not in content.groups or mask.shape != (content.groups[name].count,):
                raise UserError(f"{place}: the masks do not fit the plan at {name}")
        try:
            settings = LightPeftConfig(**content.settings)
        except TypeError as error:
            raise UserError(f"{place}: settings: {error}") from None
        return cls(content.groups, content.base, content.modules, masks, settings)


def _one_line_each(content: dict[str, Any]) -> str:
    """JSON that a person can read: one line a block and a module."""
    parts = []
    for key, value in content.items():
        if key in ("groups", "modules") and value:
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            parts.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _read(place: Path) -> _File:
    try:
        if place.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{place}: too large for a pruning plan")
        return _File.model_validate_json(place.read_bytes())
    except OSError:
        raise UserError(f"{place}: no such file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{place}: not a valid pruning plan: {where}: {first['msg']}") from None


def _read_masks(place: Path, expected: str) -> dict[str, Tensor]:
    try:
        data = place.read_bytes()
    except OSError:
        raise UserError(f"{place}: missing; the plan needs it") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"{place}: damaged, or of another plan (its checksum differs)")
    try:
        masks = load_tensors(data)
    except SafetensorError as error:
        raise UserError(f"{place}: {error}") from None
    return {name: mask.to(torch.float32) for name, mask in masks.items()}
