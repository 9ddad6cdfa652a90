"""Recipes: pipelines as data, by name, by method and setting, or from a file."""

from rolora_passes.recipes.recipe import Recipe, dump_recipe, load_recipe, recipe_names, recipes, settled

__all__ = ["Recipe", "dump_recipe", "load_recipe", "recipe_names", "recipes", "settled"]
