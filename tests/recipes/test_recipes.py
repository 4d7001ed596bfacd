"""Recipes: strict keys, readable errors, overrides, YAML without traps."""

from __future__ import annotations

from pathlib import Path

import pytest

from leantune.errors import UserError
from leantune.recipes import Recipe, parse_overrides, yaml

MINIMAL = """
model: {path: bundled:minilm, task: classification}
data: {path: data/banking77}
lean: {adapter: {type: lamda}}
output: runs/x
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    return file


def complaint(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.load(file, *overrides)
    return str(caught.value)


def test_defaults_are_filled_and_survive_a_round_trip(recipe_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file)
    assert recipe.lean.adapter.type == "lamda" and recipe.lean.adapter.r == 32
    assert recipe.train.learning_rate is not None
    again = tmp_path / "again.yaml"
    again.write_text(yaml.dump(recipe.to_dict()))
    assert Recipe.load(again) == recipe


def test_every_shipped_recipe_is_valid() -> None:
    files = sorted(Path("recipes").glob("*.yaml"))
    assert files
    for file in files:
        recipe = Recipe.load(file)
        first = file.read_text().splitlines()[0]
        assert first == f"# leantune train {file}", "a recipe's first line is the command that runs it"
        assert recipe.output.startswith("runs/")


def test_overrides_reach_any_depth(recipe_file: Path) -> None:
    recipe = Recipe.load(
        recipe_file,
        "train.learning_rate=5e-4",
        "lean.adapter.r=8",
        "train.weight_decay=0.1",
        "data.text=body",
    )
    assert (recipe.train.learning_rate, recipe.lean.adapter.r, recipe.data.text) == (5e-4, 8, "body")
    assert recipe.train.model_extra == {"weight_decay": 0.1}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("lean.adapter.rank=3", "lean.adapter.rank: unknown key"),
        ("modle.path=x", "modle: unknown key; did you mean model?"),
        ("model.task=clasification", "did you mean classification?"),
        ("lean.adapter.type=lambda", "lean.adapter.type = 'lambda': accepted are 'lamda'"),
        ("lean.adapter={r: 3}", "lean.adapter.type is missing: accepted are 'lamda', 'lora', 'bottleneck'"),
        ("lean.adapter.r=0", "lean.adapter.r = 0: must be above 0"),
        ("lean.adapter.r=2.5", "lean.adapter.r = 2.5: must be a whole number"),
        ("lean.adapter.dropout=1", "lean.adapter.dropout = 1: must be below 1"),
        ("train.epochs=many", "train.epochs = 'many': must be a number"),
        ("train.epochs=.nan", "train.epochs = nan: must be"),
        ("train=3", "train = 3: must be a group of keys"),
        ("lean.prune.heads=1", 'lean.prune.heads = 1: must be a share in [0, 1), as a number or as "1/3"'),
        ("lean.prune={head: 0.3}", "lean.prune.head: unknown key; did you mean heads?"),
        ("lean.quantize=nf5", "lean.quantize = 'nf5': accepted are 'nf4', 'fp4', 'int8' or 'int8-torchao'"),
        ("lean.tokens={keep: 0}", "lean.tokens.keep = 0: must be a whole number above 0, or a share"),
        ("lean.tokens={keep: 1.5}", "lean.tokens.keep = 1.5: must be"),
        ("train.num_train_epochs=3", "train.num_train_epochs: write train.epochs instead"),
        ("train.output_dir=x", "train.output_dir: not to be set here"),
        ("train.deepspeed=ds.json", "train.deepspeed: not to be set here, not in this release"),
        ("train.weight_decai=0.1", "train.weight_decai: unknown key; did you mean weight_decay?"),
        ("output=null", "output = None: must be text"),
        ("model.path.deep=x", "model.path.deep: model.path is 'bundled:minilm', not a group of keys"),
        ("nonsense", "'nonsense': an override is key=value"),
        ("a..b=1", "an override is key=value"),
    ],
)
def test_a_mistake_is_one_clear_line(recipe_file: Path, override: str, said: str) -> None:
    message = complaint(recipe_file, override)
    assert said in message
    assert "\n" not in message


def test_all_mistakes_are_told_at_once(recipe_file: Path) -> None:
    message = complaint(recipe_file, "train.epochs=-1", "lean.adapter.r=x", "foo=1", "train.bar=2")
    assert len(message.splitlines()) == 4
    for key in ("train.epochs", "lean.adapter.r", "foo", "train.bar"):
        assert key in message


def test_missing_groups_are_named(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("output: x\n")
    assert "model is missing" in complaint(file) and "data is missing" in complaint(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x 1\nb: *x\n", "aliases"),
        ("output: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("output: 1\noutput: 2\n", "given twice"),
        ("output: [1\n", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("- 1\n", "a recipe is a mapping"),
        ("1: 2\n", "is not a word"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    assert said in complaint(file)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "no such file" in complaint(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output: \xe9\n")
    assert "not UTF-8" in complaint(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_text("#" * (1 << 20) + "\n")
    assert "larger than 1 MiB" in complaint(tmp_path / "big.yaml")


def test_yaml_types_are_those_of_yaml_1_2() -> None:
    parsed = yaml.parse("{a: 5e-4, b: no, c: 010, d: 0x10, e: 1_0, f: ~, g: true, h: 1., i: 2001-01-01}", "x")
    assert parsed == {
        "a": 5e-4, "b": "no", "c": 10, "d": 16, "e": "1_0", "f": None, "g": True, "h": 1.0, "i": "2001-01-01",
    }  # fmt: skip
    assert parse_overrides(["x.y=[1, two]"]) == [(["x", "y"], [1, "two"])]


def test_the_method_has_a_name(recipe_file: Path) -> None:
    assert Recipe.load(recipe_file).method == "lamda"
    assert Recipe.load(recipe_file, "lean.adapter={type: none}").method == "full"


def test_schema_for_editors() -> None:
    import jsonschema

    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data = yaml.read(Path("recipes/banking77.yaml"))
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "foo": 1}, schema)
