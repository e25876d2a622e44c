"""Mixture of experts in the place of a feed-forward: a router sends every token to a few of many small networks.

A token's result depends on that token alone: no expert has a capacity, so none is ever full (Shazeer et al. 2017, arXiv
1701.06538; without dropped tokens as MegaBlocks, Gale et al. 2022, arXiv 2211.15841).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from unidiff.models.config import TransformerConfig
from unidiff.models.parts import FeedForward

ALIGNED = 16
"""Bytes of which a row of weights has to be a multiple for the grouped product on CUDA."""


class Routing(NamedTuple):
    """Where n tokens go.

    experts: int64 `[n, k]`. weights: float32 `[n, k]`, of these experts in the sum. scores: float32 `[n, E]`, of all experts,
    without bias and scale; float64 in a float64 model.
    """

    experts: Tensor
    weights: Tensor
    scores: Tensor


class Router(nn.Linear):
    """Chooses `experts_per_token` experts and their weights, in float32 whatever the dtype of the model.

    Scores are softmax(W x), or sigmoid(W x) each by itself. With groups, contiguous runs of experts, only the
    `router_top_groups` best ones are in the choice; a group's score is the sum of its two best (DeepSeek-V3, arXiv 2412.19437,
    section 2.1.2). `bias`, float32 `[E]`, steers the choice and is not learnt from the loss: of kind "selection" it is not in the
    weights, of kind "weights" it is.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.settings = c = config
        if c.router_bias != "none":
            self.bias = nn.Parameter(torch.zeros(c.num_experts), requires_grad=False)

    def logits(self, x: Tensor) -> Tensor:
        """`[n, D]` to float32 `[n, E]`, float64 in a float64 model."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))

    def forward(self, x: Tensor) -> Routing:  # type: ignore[override]
        c, logits = self.settings, self.logits(x)
        scores = logits.softmax(-1) if c.router == "softmax" else logits.sigmoid()
        ranked = scores if self.bias is None else scores + self.bias.to(scores.dtype)
        chosen = self._in_best_groups(ranked).topk(c.experts_per_token, dim=-1, sorted=False).indices  # [n, k]
        weights = (ranked if c.router_bias == "weights" else scores).gather(-1, chosen)
        if c.router_normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(chosen, weights * c.router_scale, scores)

    def _in_best_groups(self, ranked: Tensor) -> Tensor:
        """-inf for experts outside the best groups."""
        c = self.settings
        if c.router_top_groups == c.router_groups:
            return ranked
        grouped = ranked.unflatten(-1, (c.router_groups, -1))  # [n, G, E / G]
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(c.router_top_groups, dim=-1).indices
        inside = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return torch.where(inside[..., None], grouped, -torch.inf).flatten(-2)


class Experts(nn.Module):
    """E networks down(silu(gate) * up), their weights on top of each other: `up` `[E, 2 I, D]`, gate first; `down` `[E, D, I]`.

    Attributes:
        first: number of the first expert that is here; more than 0 where processes share them.
    """

    def __init__(self, count: int, size: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(count, 2 * inner, size))
        self.down = nn.Parameter(torch.empty(count, size, inner))
        self.count, self.first = count, 0

    def forward(self, x: Tensor, routing: Routing, grouped: bool | None = None) -> Tensor:
        """Weighted sum of the experts that are here: `[n, D]` to `[n, D]`.

        Args:
            grouped: one product for all experts, which asks the device for nothing; None for where it is fused (CUDA).
        """
        dtype = _product_dtype(x)
        up, down = (_local(weight).to(dtype) for weight in (self.up, self.down))
        order = _ByExpert.of(routing.experts, self.first, self.count, len(up))
        rows = x.to(dtype).index_select(0, order.token)  # [n k, D], all tokens of an expert together
        if grouped is None:
            grouped = x.is_cuda and all(w.shape[-1] * w.element_size() % ALIGNED == 0 for w in (up, down))
        if grouped:
            ends = order.sizes.cumsum(0, dtype=torch.int32)
            gate, h = F.grouped_mm(rows, up.transpose(1, 2), offs=ends).chunk(2, -1)
            out = F.grouped_mm(F.silu(gate) * h, down.transpose(1, 2), offs=ends)
        else:
            networks = list(zip(up.unbind(0), down.unbind(0), strict=True))
            out = order.each(rows, lambda expert, own: _swiglu(own, *networks[expert]))
        return order.summed(out, routing.weights, len(up) < self.count).to(x.dtype)


class ListedExperts(nn.ModuleList):
    """The same experts as modules of their own, for what works on linear layers: few bits, adapters, offloading."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """As `Experts.forward`. While gradients are kept every expert runs, also on no token, so that all have one."""
        order = _ByExpert.of(routing.experts, 0, len(self), len(self))
        rows = x.to(_product_dtype(x)).index_select(0, order.token)
        out = order.each(rows, lambda expert, own: self[expert](own), all_run=torch.is_grad_enabled())
        return order.summed(out, routing.weights).to(x.dtype)


class MixtureOfExperts(nn.Module):
    """sum_k w_k expert_k(x), and a shared expert that every token passes. Takes the place of a `FeedForward`.

    Attributes:
        routings: where `recorded_routings` collects what the router decides; None outside of it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        self.router = Router(c)
        self.experts: Experts | ListedExperts = Experts(c.num_experts, c.hidden_size, c.expert_size or 1)
        shared = c.shared_expert_size
        self.shared = FeedForward(c.hidden_size, shared, "swiglu", bias=False) if shared else None
        self.routings: list[Routing] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D]
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        if self.routings is not None:
            self.routings.append(routing)
        out = self.experts(flat, routing).view_as(x)
        return out if self.shared is None else out + self.shared(x)

    @torch.no_grad()
    def reset_experts(self, silent: bool) -> None:
        """Fan-in scaled normals, or outputs of 0 to begin with."""
        assert isinstance(self.experts, Experts)
        for weight in (self.experts.up, self.experts.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        if silent:
            nn.init.zeros_(self.experts.down)


class _ByExpert(NamedTuple):
    """n k pairs of a token and an expert in the order of the experts, those of other processes last."""

    token: Tensor  # int64 [n k]
    place: Tensor  # int64 [n, k], where each pair of a token went
    sizes: Tensor  # int64 [experts here], their tokens

    @classmethod
    def of(cls, experts: Tensor, first: int, count: int, here: int) -> _ByExpert:
        """From int64 `[n, k]`, of `count` experts, of which `here` from `first` on are here."""
        number = ((experts - first) % count if first else experts).flatten()
        order = number.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sizes = torch.zeros(count, dtype=torch.long, device=order.device).scatter_add_(
            0, number, torch.ones_like(number)
        )
        return cls(order.div(experts.shape[1], rounding_mode="floor"), place.view_as(experts), sizes[:here])

    def each(self, rows: Tensor, network: Any, all_run: bool = False) -> Tensor:
        """`network(expert, [m, D])` on the m tokens of each expert: `[n k, D]`, 0 where none is here."""
        sizes = self.sizes.tolist()
        own = rows.split([*sizes, len(rows) - sum(sizes)])
        parts = [network(i, own[i]) for i, size in enumerate(sizes) if size or all_run]
        return torch.cat([*parts, torch.zeros_like(own[-1])])

    def summed(self, out: Tensor, weights: Tensor, shared: bool = False) -> Tensor:
        """Weighted sum over the experts of a token: `[n k, D]` to `[n, D]`."""
        if shared:  # a grouped product leaves rows behind its last group as they were in memory
            there = torch.arange(len(out), device=out.device) < self.sizes.sum()
            out = torch.where(there[:, None], out, 0)
        own = out.index_select(0, self.place.flatten()).view(*self.place.shape, out.shape[-1])  # [n, k, D]
        return torch.bmm(weights[:, None].to(out.dtype), own)[:, 0]


def _swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, h = F.linear(x, up).chunk(2, -1)
    gate = F.silu(gate)
    return F.linear(gate * h if torch.is_grad_enabled() else gate.mul_(h), down)


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which products are worked out."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


# ---------------------------------------------------------------------------------------------------- all of a model


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts of a model, layer by layer; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def idle_weights(model: nn.Module) -> int:
    """How many weights of experts a token does not pass."""
    found = 0
    for mixture in mixtures(model):
        held, c = sum(p.numel() for p in mixture.experts.parameters()), mixture.router.settings
        found += held // c.num_experts * (c.num_experts - c.experts_per_token)
    return found


def list_experts(model: nn.Module) -> None:
    """Make every expert a module of its own, `feed_forward.experts.N`, whose weights share the memory of all. In place."""
    for mixture in mixtures(model):
        if isinstance(stacked := mixture.experts, Experts):
            size, inner = stacked.down.shape[1:]
            with torch.device("meta"):
                listed = [FeedForward(size, inner, "swiglu", bias=False) for _ in range(stacked.count)]
            for network, up, down in zip(listed, stacked.up, stacked.down, strict=True):
                network.up.weight = nn.Parameter(up.detach(), stacked.up.requires_grad)
                network.down.weight = nn.Parameter(down.detach(), stacked.down.requires_grad)
            mixture.experts = ListedExperts(listed).train(mixture.training)


@torch.no_grad()
def stack_experts(model: nn.Module) -> None:
    """The inverse of `list_experts`, for plain weights. In place."""
    for mixture in mixtures(model):
        if isinstance(listed := mixture.experts, ListedExperts):
            first: Any = listed[0]
            with torch.device("meta"):
                stacked = Experts(len(listed), first.down.out_features, first.down.in_features)
            for name in ("up", "down"):
                weights = [getattr(network, name).weight for network in listed]
                setattr(stacked, name, nn.Parameter(torch.stack(weights), weights[0].requires_grad))
            mixture.experts = stacked.train(mixture.training)


@contextmanager
def recorded_routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Inside, what the routers decide in a pass is collected, layer by layer, with its gradients."""
    found: list[Routing] = []
    layers = mixtures(model)
    for layer in layers:
        layer.routings = found
    try:
        yield found
    finally:
        for layer in layers:
            layer.routings = None


def expert_loads(routings: Sequence[Routing], real: Tensor) -> Tensor:
    """How many tokens of bool `[n]` went to each expert: float32 `[layers, E]`."""
    chosen = real[:, None].float()
    return torch.stack(
        [torch.zeros_like(r.scores[0]).index_add_(0, r.experts.flatten(), chosen.expand_as(r.experts).flatten().to(r.scores.dtype))
         for r in routings]
    ).float()  # fmt: skip


def balance_loss(routings: Sequence[Routing], real: Tensor) -> Tensor:
    """E sum_e f_e P_e, averaged over layers; 1 where all experts get as much, E where one gets all (Fedus et al. 2021, arXiv
    2101.03961, eq. 4 to 6).

    f_e is the share of choices that went to expert e, P_e its mean score, of the tokens in bool `[n]`. Scores of a sigmoid are
    divided by their sum first (DeepSeek-V3, eq. 19).
    """
    loads = expert_loads(routings, real)  # [layers, E]
    share = loads / loads.sum(-1, keepdim=True).clamp_min(1)
    weight = real.float() / real.sum().clamp_min(1)
    scores = torch.stack([(r.scores / r.scores.sum(-1, keepdim=True) * weight[:, None]).sum(0) for r in routings])
    return (share * scores).sum(-1).mean() * loads.shape[-1]
