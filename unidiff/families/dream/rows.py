"""Dream's chat template and its decoding."""

from __future__ import annotations

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import ChatTemplate


def dream_sampler(steps: int = 512, temperature: float = 0.2, top_p: float | None = 0.95) -> SamplerConfig:
    """Upstream's recommended settings: a linear schedule, positions ranked by the entropy of their distribution.

    (Confidences are those of the model here, upstream those after temperature and top_p.)
    """
    text = ModalityDecoding(
        steps=steps,
        rule="quota",
        schedule="linear",
        confidence="entropy",
        temperature=temperature,
        top_p=top_p,
    )
    return SamplerConfig(text=text)


DREAM_CHAT = ChatTemplate(
    marks={"im_start": 151644, "im_end": 151645},
    turn=("<im_start>", "{role}\n{content}", "<im_end>", "\n"),
    answer=("<im_start>", "assistant\n"),
    system="You are a helpful assistant.",
    end="im_end",
    sampler=lambda vocabulary: dream_sampler(),
    spelled={"im_start": "<|im_start|>", "im_end": "<|im_end|>"},
)
