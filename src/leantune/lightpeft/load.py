"""A base model, pruned while it is read: the whole of it is never in memory.

transformers builds the model and fills it, as always; two things differ. The class's `__init__` cuts the
(still empty) layers to the plan, and the weights handed to `from_pretrained` were cut one tensor at a
time as they came from the file, or from a base that is in memory already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from leantune.anatomy import Group
from leantune.errors import UserError
from leantune.lightpeft.fingerprint import plain_name
from leantune.lightpeft.plan import PruningPlan
from leantune.lightpeft.surgery import ParameterCut, parameter_cuts, prune_base, slice_parameter

# Reads one weight, cut if so wanted.
Reader = Callable[[ParameterCut | None], Tensor]


class Weights(Mapping[str, Reader]):
    """A base model's weights by name, each read when it is called for."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Reader:
        return self._readers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    @classmethod
    def from_files(cls, source: str) -> Weights:
        """Those of a model folder or hub name, in safetensors files.

        Raises:
            UserError: There are none.
        """
        readers: dict[str, Reader] = {}
        for file in _files(source):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    readers[name] = _from_file(file, name)
        return cls(readers)

    def in_memory(self, device: torch.device) -> Weights:
        """The same, read now and held on `device`."""
        return Weights({name: _from_memory(read(None).to(device)) for name, read in self.items()})

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.values()))(None).device


def load_pruned(
    auto_class: Any,
    config: PretrainedConfig,
    plan: PruningPlan | None,
    weights: Weights,
    source: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model with the plan carried out.

    Args:
        auto_class: `AutoModelForSequenceClassification` or the like.
        config: The whole model's config, with the labels of the task.
        plan: What stays; None: all of it.
        weights: Of the whole base.
        source: Folder or hub name, for the generation settings and the name in saved adapters.
        **options: `dtype`, `attn_implementation`.

    Raises:
        UserError: The plan is for another base.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if options.get("dtype") == "auto":
        options["dtype"] = config.dtype or next(iter(weights.values()))(None).dtype
    with torch.device("meta"):
        whole = auto_class.from_config(config, **options)
    cls: Any = type(whole)
    names = _names_in_files(whole, weights)
    cuts: Mapping[str, ParameterCut] = {}
    if plan is not None:
        groups = plan.check(whole, read=lambda name: weights[names[name]](None))
        cuts = parameter_cuts(whole, plan.cuts(groups))
        cls = _pruned_class(cls, groups, plan)
    state = _read(weights, names, cuts)
    model = cls.from_pretrained(None, config=config, state_dict=state, **options)
    model.__class__ = type(whole)
    if source is not None:
        model.name_or_path = model.config._name_or_path = source
        if model.can_generate():
            model.generation_config = _generation_config(source, model)
    return model


def _pruned_class(cls: type, groups: tuple[Group, ...], plan: PruningPlan) -> Any:
    """The model's class, whose instances are born pruned."""

    def init(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        prune_base(self, groups, plan.kept)

    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def _names_in_files(whole: PreTrainedModel, weights: Weights) -> dict[str, str]:
    """Parameter name in the model → name among the weights; either may lack the base model's prefix."""
    by_plain_name = {plain_name(whole, name): name for name in weights}
    return {
        name: by_plain_name[plain_name(whole, name)]
        for name in whole.state_dict()
        if plain_name(whole, name) in by_plain_name
    }


def _read(weights: Weights, names: Mapping[str, str], cuts: Mapping[str, ParameterCut]) -> dict[str, Tensor]:
    missing = [name for name in cuts if name not in names]
    if missing:
        raise UserError(f"the base's weights hold no {missing[0]}: it cannot be pruned while it is read")
    in_model = {there: here for here, there in names.items()}
    return {there: read(cuts.get(in_model.get(there, ""))) for there, read in weights.items()}


def _from_file(file: str, name: str) -> Reader:
    def read(cut: ParameterCut | None) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name) if cut is None else slice_parameter(opened.get_slice(name), cut)

    return read


def _from_memory(tensor: Tensor) -> Reader:
    return lambda cut: tensor if cut is None else slice_parameter(tensor, cut)


def _files(source: str) -> list[str]:
    try:
        single = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            return [single]
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            return list(get_checkpoint_shard_files(source, index)[0])
    except OSError as error:
        raise UserError(f"{source}: the weights cannot be opened: {str(error).splitlines()[0]}") from None
    raise UserError(f"{source}: pruning reads safetensors files, and there are none (save the model again)")


def _generation_config(source: str, model: Any) -> GenerationConfig:
    if Path(source).is_dir() and not (Path(source) / "generation_config.json").is_file():
        return model.generation_config
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return model.generation_config
