"""A second pipeline around the parts of a first one, without a copy of any weight."""

from __future__ import annotations

import difflib
from typing import Any, Self


class SharedParts:
    """Gives a pipeline class `components`, with which it can be made again, and `from_pipe`."""

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of the constructor: `type(pipe)(**pipe.components)` is the same pipeline again."""
        return {name: getattr(self, name) for name in self._component_names}

    _component_names: tuple[str, ...] = ()

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> Self:
        """A new pipeline with the parts of another one, which share their weights.

        Args:
            pipeline: of this class.
            changes: parts or settings to take instead, by their name in `components`.

        Raises:
            ValueError: a pipeline of another class, or a part that does not fit.
            TypeError: an unknown name.
        """
        if not isinstance(pipeline, cls):
            raise ValueError(f"from_pipe got a {type(pipeline).__name__}; expected a {cls.__name__}")
        parts = pipeline.components
        for name in changes:
            if name not in parts:
                near = difflib.get_close_matches(name, parts, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected some of {list(parts)}"
                raise TypeError(f"{cls.__name__}.from_pipe got an unexpected argument {name!r}; {hint}")
        return cls(**{**parts, **changes})
