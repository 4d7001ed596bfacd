"""Numbers as people read them."""

import math

import pytest

from leantune.report import formats as f


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (8064, "8,064"),
        (9_999, "9,999"),
        (10_000, "10.0 k"),
        (147_456, "147 k"),
        (999_700, "1.00 M"),
        (22_713_216, "22.7 M"),
        (6_738_415_616, "6.74 B"),
        (2931.4, "2,931"),
        (None, "–"),
        (math.nan, "not a number"),
        ("?", "?"),
    ],
)
def test_count(value, text):
    assert f.format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (36_045, "35.2 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (1_299_227_607, "1.21 GiB"),
        (24 * 2**30, "24.0 GiB"),
        (5000 * 2**40, "5,000 TiB"),
        (None, "–"),
    ],
)
def test_bytes(value, text):
    assert f.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 ms"),
        (0.0123, "12.3 ms"),
        (0.9999, "1.00 s"),
        (4.56, "4.56 s"),
        (59.97, "1 min"),
        (200, "3 min 20 s"),
        (3599.7, "1 h"),
        (3725, "1 h 2 min"),
        (86_399.9, "1 d"),
        (86_400 * 2 + 3 * 3600, "2 d 3 h"),
        (None, "–"),
    ],
)
def test_seconds(value, text):
    assert f.format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 %"),
        (0.0, "0 %"),
        (0.00001, "< 0.01 %"),
        (0.0065, "0.65 %"),
        (0.12, "12.0 %"),
        (0.9997, "99.97 %"),
        (0.999999, "> 99.99 %"),
        (1, "100 %"),
        (None, "–"),
    ],
)
def test_share_never_reads_as_none_or_all_by_rounding(value, text):
    assert f.format_share(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("accuracy", 0.9153, "91.5 %"),
        ("accuracy", 1, "100.0 %"),
        ("macro_f1", 0.5, "50.0 %"),
        ("exact_match", 0.5, "50.0 %"),
        ("token_accuracy", 0.5, "50.0 %"),
        ("rougeL", 0.412, "41.2 %"),
        ("rougeL", 41.2, "41.2"),
        ("loss", 0.341, "0.341"),
        ("loss", math.nan, "not a number"),
        ("loss", math.inf, "infinite"),
        ("matthews_correlation", -0.25, "−0.250"),
        ("perplexity", 12.345, "12.3"),
        ("rows", 3080, "3,080"),
        ("accuracy", None, "–"),
    ],
)
def test_metric(name, value, text):
    assert f.format_metric(name, value) == text


@pytest.mark.parametrize(("value", "text"), [(5e-4, "5e-4"), (1.25e-5, "1.25e-5"), (0.1, "0.1"), (0, "0")])
def test_rate(value, text):
    assert f.format_rate(value) == text


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("lamda", "LaMDA"),
        ("lamda++", "LaMDA++"),
        ("none", "full fine-tuning"),
        ("lamda+tokentune", "LaMDA + TokenTune"),
        (["lora", "ckpt"], "LoRA + checkpointing"),
        ("something new", "something new"),
        (None, "–"),
    ],
)
def test_method_name(method, text):
    assert f.method_name(method) == text


def test_headline_metric_prefers_what_readers_want_and_takes_the_loss_last():
    assert f.headline_metric({"loss": 1.0, "f1": 0.5, "accuracy": 0.5}) == "accuracy"
    assert f.headline_metric({"loss": 1.0, "perplexity": 2.7}) == "perplexity"
    assert f.headline_metric({"epoch": 3, "runtime": 2.0, "loss": 1.0}) == "loss"
    assert f.headline_metric({"accuracy": None}) is None
    assert f.headline_metric(None) is None


def test_direction():
    assert f.lower_is_better("loss") and f.lower_is_better("eval_loss") and f.lower_is_better("perplexity")
    assert not f.lower_is_better("accuracy")
