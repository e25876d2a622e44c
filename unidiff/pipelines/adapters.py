"""Adapters of a pipeline's transformer: loaded beside each other, weighed, folded in, taken out, by peft and diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin

from unidiff.hub import Sought, locate
from unidiff.models.experts import list_experts, stack_experts
from unidiff.schema import check_value
from unidiff.weights.adapter import ADAPTER_FILES, peft_for, read_adapter
from unidiff.weights.model import CheckedModel

_ADAPTER = Sought(
    "adapter", f"a folder or a hub model 'owner/name' with {' and '.join(ADAPTER_FILES)}", ADAPTER_FILES,
    "load_lora_weights", embedded=False,
)  # fmt: skip


class PipelineAdapters(LoraBaseMixin):  # type: ignore[misc]
    """`load_lora_weights`, `set_adapters`, `fuse_lora`, `unload_lora_weights` and the rest of diffusers' names.

    Adapters add to the weights: of several active ones, `set_adapters(names, weights)` adds the weighted sum of their
    changes (B A alpha / rank each), so that halves of two are the mean of both changes. They also work where the weights
    beneath are stored in few bits; only `fuse_lora` does not.
    """

    _lora_loadable_modules = ["transformer"]  # noqa: RUF012 (as diffusers declares it)
    transformer: Any

    def load_lora_weights(
        self, name: str | Path, adapter_name: str | None = None, subfolder: str | None = None, **hub_options: Any
    ) -> None:
        """Put an adapter on the transformer; it alone is active then, and `set_adapters` chooses others.

        Args:
            name: a folder, or hub model, with `adapter_config.json` and `adapter_model.safetensors`.
            adapter_name: what to call it; "default_0", "default_1", ... where left out.
            hub_options: as in `from_pretrained`.

        Raises:
            FileNotFoundError: nothing there. ValueError: peft is not installed, a name in use, or an adapter that does not
                fit this model.
        """
        check_value(adapter_name, str | None, "adapter_name")
        peft_for("adapters are to be loaded")
        if not isinstance(self.transformer, CheckedModel):
            raise ValueError(
                f"{type(self.transformer).__name__} takes no adapters; they go onto a transformer of blocks"
            )
        folder = locate(name, _ADAPTER, **hub_options) / (subfolder or "")
        config, weights = read_adapter(folder, self.transformer, self._ready_for)
        with warnings.catch_warnings(
            action="ignore"
        ):  # that there are several, and that few bits cannot be folded into
            self.transformer.load_lora_adapter(
                weights, prefix=None, adapter_name=adapter_name, metadata=config, _pipeline=self
            )
        self.transformer.eval().requires_grad_(False)

    def _ready_for(self, names: Iterable[str]) -> None:
        """Adapters of experts go onto layers of their own."""
        if any(".experts." in name for name in names):
            list_experts(self.transformer)

    def unload_lora_weights(self) -> None:
        """Take all adapters off again."""
        super().unload_lora_weights()
        if all(type(p.data).__name__ == "Tensor" and not p.is_meta for p in self.transformer.parameters()):
            stack_experts(self.transformer)

    def fuse_lora(self, components: Sequence[str] = ("transformer",), **options: Any) -> None:
        """Fold the active adapters into the weights; `unfuse_lora` undoes it, `unload_lora_weights` then keeps their effect.

        Raises:
            ValueError: weights in few bits, or two fusions on top of each other with NaN under `safe_fusing`.
        """
        kinds = {type(p.data).__name__ for n, p in self.transformer.named_parameters() if "base_layer" in n}
        if kinds - {"Tensor"}:
            raise ValueError(f"adapters cannot be folded into weights of few bits ({kinds.pop()}); leave them beside")
        super().fuse_lora(components=list(components), **options)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **options: Any) -> None:
        """Take folded adapters out of the weights again."""
        super().unfuse_lora(components=list(components), **options)
