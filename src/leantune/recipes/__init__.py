"""Recipes: one strict YAML a run. Schema, loading, overrides, and errors that a person can act on."""

from leantune.recipes.loading import load_recipe, parse_overrides
from leantune.recipes.schema import (
    AdapterRecipe,
    BottleneckRecipe,
    DataRecipe,
    FullRecipe,
    LamdaRecipe,
    LeanRecipe,
    LoraRecipe,
    ModelRecipe,
    PruneRecipe,
    Recipe,
    TokensRecipe,
    TrainRecipe,
)

__all__ = [
    "AdapterRecipe",
    "BottleneckRecipe",
    "DataRecipe",
    "FullRecipe",
    "LamdaRecipe",
    "LeanRecipe",
    "LoraRecipe",
    "ModelRecipe",
    "PruneRecipe",
    "Recipe",
    "TokensRecipe",
    "TrainRecipe",
    "load_recipe",
    "parse_overrides",
]
