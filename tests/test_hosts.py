"""Private names of the hosts that `run` relies on: a release that moves one fails here, by name."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainingArguments
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer
from transformers.trainer_pt_utils import LengthGroupedSampler


@pytest.mark.parametrize(
    "name",
    [
        "_get_output_dir",
        "_save_checkpoint",
        "_get_train_sampler",
        "_prepare_inputs",
        "_evaluate",
        "_determine_best_metric",
        "_run_epoch",
        "_finalize_training",
    ],
)
def test_trainer_has(name: str) -> None:
    assert callable(getattr(Trainer, name))


def test_checkpoints_are_written_where_get_output_dir_says() -> None:
    source = inspect.getsource(Trainer._save_checkpoint)
    assert "self._get_output_dir(" in source and "checkpoint_folder" in source


def test_samplers_can_be_seeded() -> None:
    assert "generator" in inspect.signature(LengthGroupedSampler.__init__).parameters


def test_training_arguments_have_what_recipes_set() -> None:
    fields = TrainingArguments.__dataclass_fields__
    for name in (
        "include_num_input_tokens_seen",
        "restore_callback_states_from_checkpoint",
        "logging_nan_inf_filter",
    ):
        assert name in fields


def test_quantisation_has_what_we_touch() -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    int8 = pytest.importorskip("torchao.quantization").Int8Tensor
    source = inspect.getsource(modules.Linear4bit)
    for name in ("support_avx512bf16_for_cpu", "packing_format_for_cpu", "compute_type_is_set"):
        assert name in source
    layer = modules.Linear8bitLt(8, 4, has_fp16_weights=False).to("cpu")
    assert hasattr(layer.weight, "SCB") and layer.state.SCB is None
    assert "act_quant_kwargs" in int8.optional_tensor_attribute_names
    assert "compute_dtype" in inspect.getsource(BaseTunerLayer._get_base_layer_device_and_dtype)
    assert "source_cls" in inspect.getsource(replace_with_bnb_linear)
    assert callable(HfQuantizer.remove_quantization_config)


def test_import_is_light_and_help_is_quick() -> None:
    """`import leantune` loads neither torch nor transformers; LaMDA is there as soon as peft is."""
    script = (
        "import sys, leantune, leantune.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import peft\n"
        "assert {'LAMDA', 'BOTTLENECK'} <= peft.PeftType.__members__.keys()\n"
        "assert 'leantune.lamda' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "first", ["import peft, leantune", "import leantune.lamda, peft", "import leantune.run"]
)
def test_registered_whatever_comes_first(first: str) -> None:
    script = f"{first}\nimport peft\nassert {{'LAMDA', 'BOTTLENECK'}} <= peft.PeftType.__members__.keys()\n"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there_and_explained() -> None:
    import leantune

    for name in leantune.__all__:
        value = getattr(leantune, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = leantune.nothing  # type: ignore[attr-defined]


def test_torch_has_what_the_planner_traces_with() -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import flop_registry

    assert torch.ops.aten.mm in flop_registry
    assert "allow_non_fake_inputs" in inspect.signature(FakeTensorMode).parameters
    assert isinstance(torch.empty(1).untyped_storage()._cdata, int)
