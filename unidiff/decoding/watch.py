"""What callbacks see of a decode, and what their answers mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
from torch import Tensor
from torch import bool as torch_bool

from unidiff.decoding.state import DecodeState
from unidiff.tokens import TokenBatch


class DecodeView:
    """A decode after one of its passes, for callbacks. Every tensor is a copy: writing in it changes nothing.

    Copies are made when they are asked for; a view that is kept does not change with the passes to come.

    Attributes:
        step: passes made, counting those that needed no forward. nfe: network evaluations, guidance streams counted.
        finishing: the next pass fills everything that is open.
    """

    __slots__ = ("_state",)
    _state: DecodeState

    def __init__(self, state: DecodeState) -> None:
        object.__setattr__(self, "_state", replace(state))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} of a decode cannot be set by a callback; it may only look on, or return False")

    @property
    def batch(self) -> TokenBatch:
        """Current tokens `[B, L]`, [MASK] at open positions."""
        return own_copy(self._state.batch)

    @property
    def ids(self) -> Tensor:
        """int64 `[B, L]`, the tokens alone."""
        return self._state.ids.clone()

    @property
    def open(self) -> Tensor:
        """bool `[B, L]`, targets still masked."""
        return self._state.open.clone()

    @property
    def settled(self) -> Tensor:
        """bool `[B, L]`, targets that may not be masked again (end-of-text fill)."""
        return self._state.settled.clone()

    @property
    def written(self) -> Tensor:
        """bool `[B, L]`, filled in the last pass."""
        return self._state.written.clone()

    @property
    def committed(self) -> Tensor:
        """bool `[B, L]`, decoded targets, which remasking may revise."""
        return self._state.committed

    @property
    def confidence(self) -> Tensor:
        """float32 `[B, L]`, see `DecodeState`."""
        return self._state.confidence.clone()

    @property
    def step(self) -> int:
        return self._state.step

    @property
    def nfe(self) -> int:
        return self._state.nfe

    @property
    def finishing(self) -> bool:
        return self._state.finishing


Callback = Callable[[int, DecodeView], object]
"""`callback(step, view)` after each pass, from 0; False fills the rest in one last pass."""


def declines(answer: object) -> bool:
    """Whether a callback's answer is False, of Python, NumPy or torch. Anything else, None above all, goes on."""
    if isinstance(answer, Tensor):
        return answer.dtype == torch_bool and answer.numel() == 1 and not bool(answer)
    return isinstance(answer, bool | np.bool_) and not answer


def own_copy(batch: TokenBatch) -> TokenBatch:
    """The same batch in tensors of its own."""
    return TokenBatch(*(getattr(batch, f.name).clone() for f in fields(batch)))
