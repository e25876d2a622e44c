"""LLaDA's chat template and its decoding."""

from __future__ import annotations

from dataclasses import replace

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import ChatTemplate, answer_config
from unidiff.tokens import Vocabulary


def llada_sampler(
    vocabulary: Vocabulary,
    steps: int = 128,
    block_length: int = 32,
    temperature: float = 0.0,
    guidance: float = 0.0,
    threshold: float | None = None,
) -> SamplerConfig:
    """LLaDA's semi-autoregressive decoding, or Fast-dLLM's in parallel.

    Args:
        steps: passes for the whole answer. block_length: tokens per block.
        guidance: upstream `cfg_scale`.
        threshold: commit every token whose confidence reaches it instead of a fixed number per pass.
    """
    config = answer_config(vocabulary, steps, block_length, temperature, guidance)
    if threshold is None:
        return config
    text = ModalityDecoding(
        rule="threshold",
        threshold=threshold,
        temperature=temperature,
        block_length=block_length,
        forbid=config.text.forbid,
    )
    return replace(config, text=text)


LLADA_CHAT = ChatTemplate(
    marks={"bos": 126080, "start_header": 126346, "end_header": 126347, "eot": 126348},
    opening=("<bos>",),
    turn=("<start_header>", "{role}", "<end_header>", "\n\n{content}", "<eot>"),
    answer=("<start_header>", "assistant", "<end_header>", "\n\n"),
    sampler=llada_sampler,
    spelled={
        "bos": "<|startoftext|>",
        "start_header": "<|start_header_id|>",
        "end_header": "<|end_header_id|>",
        "eot": "<|eot_id|>",
    },
)
