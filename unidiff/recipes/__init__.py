"""Recipes: what is special to one set of pictures that people know. Everything else is done by the commands for any pictures."""
