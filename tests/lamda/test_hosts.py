"""The private names of PEFT and transformers that LaMDA relies on: a release that moves one fails here."""

from __future__ import annotations

import inspect
import subprocess
import sys

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import _buffer_dict, tuners_utils
from transformers import trainer_callback

from leantune.lamda import LamdaConfig, LamdaModel
from leantune.peft_methods import add_peft_type


def test_names_of_the_hosts() -> None:
    tuner = tuners_utils.BaseTuner
    for name in (
        "_create_and_replace",
        "_replace_module",
        "_cast_adapter_dtype",
        "_get_adapter_state_dict",
        "_remap_adapter_state_dict_for_load",
        "_remove_adapter_name_from_key",
    ):
        assert callable(getattr(tuner, name)), name
    expected = ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"]
    assert list(inspect.signature(tuner._get_adapter_state_dict).parameters) == expected
    expected = ["model", "config", "adapter_name", "state_dict"]
    assert list(inspect.signature(tuner._remap_adapter_state_dict_for_load).parameters) == expected
    layer = tuners_utils.BaseTunerLayer
    for name in ("_move_adapter_to_device_of_base_layer", "_get_base_layer_device_and_dtype", "set_adapter"):
        assert callable(getattr(layer, name)), name
    assert layer.frozen_peft_weight_names == {}, "the class-level default must stay empty"
    assert callable(layer._freeze_non_trainable_peft_weights)
    assert "persistent" in inspect.signature(_buffer_dict.BufferDict).parameters
    assert {"state", "from_state"} <= set(vars(trainer_callback.ExportableState))
    assert "_enable_peft_forward_hooks" in inspect.getsource(peft.PeftModel._enable_peft_forward_hooks)


def test_lamda_is_a_member_of_the_enum() -> None:
    member = PeftType("LAMDA")
    assert member is PeftType["LAMDA"]
    assert member in list(PeftType)
    assert (member.value, member.name, str(member.value).lower()) == ("LAMDA", "LAMDA", "lamda")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is LamdaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is LamdaModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "lamda_"


def test_a_taken_name_is_an_error() -> None:
    for name in ("LORA", "LAMDA"):
        with pytest.raises(RuntimeError, match=f"{name} already"):
            add_peft_type(name)
    with pytest.raises(ValueError, match="'lamda'"):
        add_peft_type("lamda")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import leantune, peft", "import peft, leantune", "import leantune.lamda"])
def test_any_order_of_imports_registers(order: str) -> None:
    code = f"{order}; import peft; assert 'LAMDA' in peft.PeftType.__members__"
    subprocess.run([sys.executable, "-c", code], check=True)
