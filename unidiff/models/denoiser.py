"""`Denoiser`: what training, scoring and decoding ask of a model, whatever its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from unidiff.models.partial import CachePlan, LayerWork, PartialHidden, Select
from unidiff.models.store import FeatureStore, StoreOptions
from unidiff.tokens.batch import TokenBatch


class Denoiser(Protocol):
    """Features of every position, and a head that can be sliced."""

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None,
        time: Tensor | None = None,
    ) -> Tensor:
        """ids, modality int64 `[B, L]`, positions int64 `[B, L, 3]`, mask bool `[B, 1, L, L]` -> `[B, L, D]`.

        `time` float `[B]` is diffusion time; a model without time conditioning ignores it.
        """
        ...

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`[..., D]` -> logits `[..., stop - start]` of the vocabulary slice."""
        ...


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one token in one layer, by kind of work.

    A matrix product `[m, k] x [k, n]` counts 2 m k n. With width d, KV heads of together d_kv, and a feed-forward of
    width f, one token costs in a layer of the masked transformer

        queries and keys  2 d (d + d_kv)        output projection  2 d^2
        values            2 d d_kv              feed-forward       6 d f (SwiGLU), 4 d f (GELU)
        attention         4 d per key it looks at

    which without shared heads is 8 d^2 + 6 d f plus 4 d S in a row of S tokens. Embeddings, norms, rotary, biases,
    softmax and adaLN (once per row) are left out: they are far less, and no cache changes what they cost at the
    positions it computes.

    Attributes:
        query_key, value, output, feed_forward: of its linear layers. pair: attention, for each key that a query sees.
    """

    query_key: int
    value: int
    output: int
    feed_forward: int
    pair: int

    @property
    def token(self) -> int:
        """All linear layers together: c of the formulas."""
        return self.query_key + self.value + self.output + self.feed_forward

    def linear(self, work: LayerWork) -> int:
        """Linear layers of one row."""
        return work.qk * self.query_key + work.v * self.value + work.out * (self.output + self.feed_forward)

    def attention(self, work: LayerWork, keys: int) -> int:
        """Attention of one row, over `keys` keys."""
        return work.qk * keys * self.pair


@dataclass(frozen=True)
class DenoiserTraits:
    """What decoding relies on besides a model's answers.

    Attributes:
        ids: how many ids the model knows.
        width: D of the features.
        layers: what each layer costs, in the order in which `PartialHidden.work` lists them.
        affine_head: logits are affine in the features, so that a weighted sum of features gives that of logits.
        block_length: of block-causal attention; None where every position sees every other.
        timed: features depend on the time.
        codes_per_token: image codes that share one token of the layers, which are computed together.
        recordable: a pass asks the device for nothing on its way, so that it can be recorded (`unidiff.decoding.graphs`).
    """

    ids: int
    width: int
    layers: tuple[LayerFlops, ...]
    affine_head: bool
    block_length: int | None = None
    timed: bool = False
    codes_per_token: int = 1
    recordable: bool = True

    def head_flops(self, positions: int, ids: int) -> int:
        """Logits of some positions over some ids."""
        return 2 * self.width * ids * positions


@runtime_checkable
class PartialDenoiser(Denoiser, Protocol):
    """A denoiser that can recompute some positions against stored features: what every cache needs to save work."""

    @property
    def traits(self) -> DenoiserTraits: ...

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """Empty features for the rows of `batch`, whose layout is fixed from here on; ids do not matter."""
        ...

    def partial(
        self,
        ids: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        time: Tensor | None = None,
        select: Select | None = None,
    ) -> PartialHidden:
        """Recompute the positions of a plan; the others keep the features that `store` holds of them.

        Every query sees what it would see in `hidden`, but never a position that no pass has computed yet.

        Args:
            ids: int64 `[B, L]`, current tokens.
            plan: a full plan, or one without `query`, equals `hidden` (before `shifted`).
            store: from `make_store` for the same rows; changed in place.
            time: as in `hidden`.
            select: with `plan.verify`: called in every layer that does not recompute everything as
                `select(layer, similarity)`, where `similarity` `[B, L]` is the cosine between new and stored values
                (float32 over the full width, NaN where not compared); returns bool `[B, L]`, positions that the layer
                recomputes besides the query, or None for no more.

        Raises:
            ValueError: ids of another shape than the store, or a plan that needs a store with outputs or `select`.
        """
        ...

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """From the final hidden states `[B, L, D]` that a store keeps to the features that `head` takes."""
        ...
