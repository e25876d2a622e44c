"""Released model families: per family a key map both ways, a config map and a vocabulary.

`load_released` reads any of them; `FAMILIES` is their registry. `unidiff.families.checkpoint` and `.verify` are the
commands `unidiff convert`, `info` and `verify`.
"""

from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import offload, quantise
from unidiff.families.family import FAMILIES, Family, Released

__all__ = ["FAMILIES", "Family", "Released", "load_released", "offload", "quantise"]
