"""Weights of models: what they must be, reading files of them, models that check what they load, saving."""
