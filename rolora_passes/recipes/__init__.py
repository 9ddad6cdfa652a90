"""Recipes: pipelines as data, by name, by method and setting, or from a file."""

from rolora_passes.recipes.recipe import dump_recipe, load_recipe, recipe_names, settled

__all__ = ["dump_recipe", "load_recipe", "recipe_names", "settled"]
