"""FLOPs of a full and of a partial pass, from a model's config.

A matrix product `[m, k] x [k, n]` counts 2 m k n. With width d, KV heads of together d_kv, and a feed-forward of width f,
one token costs in one layer

    queries and keys  2 d (d + d_kv)        output projection  2 d^2
    values            2 d d_kv              feed-forward       6 d f (SwiGLU), 4 d f (GELU)
    attention         4 d per key it looks at

which without shared heads is 8 d^2 + 6 d f plus 4 d S in a row of S tokens, and the head 2 d V for each position whose
logits over V ids are wanted. Embeddings, norms, rotary, biases, softmax and adaLN (once per row) are left out: they are
far less, and no cache changes what they cost at the positions it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unidiff.models.layers import default_ffn_size
from unidiff.models.partial import LayerWork


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one token in one layer, by kind of work.

    Attributes:
        query_key, value, output, feed_forward: of its linear layers. pair: attention, for each key that a query sees.
        width: d, for the head.
    """

    query_key: int
    value: int
    output: int
    feed_forward: int
    pair: int
    width: int

    @classmethod
    def of(cls, config: Any) -> LayerFlops:
        """From the config of a `MaskedTransformer`."""
        d = config.hidden_size
        kv = d // config.num_heads * (config.num_kv_heads or config.num_heads)
        inner = config.ffn_size or default_ffn_size(d, config.activation)
        matrices = 3 if config.activation == "swiglu" else 2
        return cls(2 * d * (d + kv), 2 * d * kv, 2 * d * d, 2 * matrices * d * inner, 4 * d, d)

    @property
    def token(self) -> int:
        """All linear layers together: c of the formulas."""
        return self.query_key + self.value + self.output + self.feed_forward

    def linear(self, work: LayerWork) -> int:
        """Linear layers of one row in one layer."""
        return work.qk * self.query_key + work.v * self.value + work.out * (self.output + self.feed_forward)

    def attention(self, work: LayerWork, keys: int) -> int:
        """Attention of one row in one layer, over `keys` keys."""
        return work.qk * keys * self.pair

    def head(self, positions: int, ids: int) -> int:
        """Logits of some positions over some ids."""
        return 2 * self.width * ids * positions


@dataclass(frozen=True)
class PassWork:
    """What one pass of one row does.

    Attributes:
        layers: positions through the matrices, one entry per layer. keys: keys that every query looks at.
        head: positions whose logits are wanted. ids: over how many ids.
    """

    layers: tuple[LayerWork, ...]
    keys: int
    head: int = 0
    ids: int = 0

    @classmethod
    def even(cls, layers: int, queries: int, keys: int, head: int = 0, ids: int = 0) -> PassWork:
        """The same positions in every layer; `queries = keys` is a full pass."""
        return cls((LayerWork(queries, queries, queries),) * layers, keys, head, ids)

    def flops(self, layer: LayerFlops) -> int:
        """Layers, attention and head."""
        layers = sum(layer.linear(w) + layer.attention(w, self.keys) for w in self.layers)
        return layers + layer.head(self.head, self.ids)


def full_pass_flops(config: Any, length: int, head: int = 0, ids: int = 0) -> int:
    """A pass over a whole row of `length` tokens, with logits of `head` positions over `ids` ids."""
    return partial_pass_flops(config, length, length, head, ids)


def partial_pass_flops(config: Any, queries: int, length: int, head: int = 0, ids: int = 0) -> int:
    """A pass that recomputes `queries` positions of a row of `length` tokens in every layer."""
    return PassWork.even(config.num_layers, queries, length, head, ids).flops(LayerFlops.of(config))


def total_flops(config: Any, passes: Sequence[PassWork]) -> int:
    """All passes of a decode of one row."""
    layer = LayerFlops.of(config)
    return sum(p.flops(layer) for p in passes)
