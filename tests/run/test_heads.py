"""What the base's weights lack is trained in full and saved, whatever the architecture calls it.

PEFT knows `classifier` and `score`. A pooler, a dense layer before the classifier, or a head of another name
that it leaves alone would stay random, and be drawn anew whenever the adapter is loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import leantune
from leantune.run.models import head_modules, load_base, new_modules
from leantune.run.tasks import make_task
from tests.conftest import make_tokenizer
from tests.run.support import SETTINGS, printed, quiet, recipe
from tests.tiny_models import tiny

HEADS = {
    "bart": {"classification_head"},
    "distilbert": {"pre_classifier", "classifier"},
    "deberta-v3": {"pooler", "classifier"},
    "modernbert": {"head", "classifier"},
    "gpt2": {"score"},
}


def base_folder(family: str, folder: Path, head: str = "base") -> Path:
    """A tiny model without a head for the task, as pretrained ones are."""
    tiny(family, head, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "lamda", "full"])
@pytest.mark.parametrize("family", HEADS)
@pytest.mark.filterwarnings("ignore")  # tiny tokenizers and models disagree on their special tokens
def test_the_whole_head_is_trained_and_saved(
    family: str, method: str, data_folder: Path, tmp_path: Path
) -> None:
    base = base_folder(family, tmp_path / "base")
    made = recipe(base, data_folder, tmp_path / "run", SETTINGS[method], train={"steps": 2})
    run = leantune.train(made, console=quiet())
    assert leantune.evaluate(run.folder) == run.metrics["evaluation"]
    torch.manual_seed(1234)  # a part that is not in the file would be drawn from this
    again = leantune.load(run.folder)[0]
    torch.manual_seed(4321)
    other = leantune.load(run.folder)[0]
    for one, two in zip(again.state_dict().items(), other.state_dict().items(), strict=True):
        if "original_module" not in one[0]:
            assert torch.equal(one[1], two[1]), one[0]
    plain = load_base(made.model, make_task(made).auto_class, again.config, source=str(base))
    assert set(head_modules(plain)) == HEADS[family] == set(new_modules(plain))
    counted = sum(p.numel() for name in HEADS[family] for p in plain.get_submodule(name).parameters())
    assert run.metrics["parameters"]["head"] == counted


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_missing_inside_the_model_are_told(data_folder: Path, tmp_path: Path) -> None:
    """A masked language model has no pooler; BERT's classifier reads one."""
    base = base_folder("bert", tmp_path / "base", "masked-lm")
    console = quiet()
    made = recipe(base, data_folder, tmp_path / "run", SETTINGS["lora"], train={"steps": 2})
    run = leantune.train(made, console=console)
    assert "the weights lack bert.pooler: drawn from the seed, trained in full and saved" in printed(console)
    assert leantune.evaluate(run.folder) == run.metrics["evaluation"]
