"""Recipes: one strict YAML a run. Schema, loading, overrides, and errors that a person can act on."""

from leantune.recipes.loading import load_recipe, parse_overrides
from leantune.recipes.schema import (
    AdapterRecipe,
    DataRecipe,
    FullRecipe,
    LamdaRecipe,
    LeanRecipe,
    LoraRecipe,
    ModelRecipe,
    Recipe,
    TokensRecipe,
    TrainRecipe,
)

__all__ = [
    "AdapterRecipe",
    "DataRecipe",
    "FullRecipe",
    "LamdaRecipe",
    "LeanRecipe",
    "LoraRecipe",
    "ModelRecipe",
    "Recipe",
    "TokensRecipe",
    "TrainRecipe",
    "load_recipe",
    "parse_overrides",
]
