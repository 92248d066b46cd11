"""Recipes: YAML, dotted overrides and flags become one validated object."""
