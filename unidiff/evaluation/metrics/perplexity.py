"""Generative perplexity of texts under a judge, always with their entropy: words said over and over score well without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from unidiff.errors import check_regular, reading
from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.networks.folder import load_from_folder
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.resampling import bootstrap, percentile_interval
from unidiff.evaluation.results.base import Results
from unidiff.evaluation.results.captions import read_captions

RESAMPLES = 1000


class JudgedText(NamedTuple):
    """A text: its negative log-likelihood in nats, its tokens, the entropy of its tokens in nats, whether it was cut."""

    nll: float
    tokens: int
    entropy: float
    cut: bool


class LanguageJudge:
    """A causal language model of transformers. Raises `FileNotFoundError` or `ValueError`: no folder of one."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import transformers

        what = "a causal language model of transformers"
        self.model = load_from_folder(transformers.AutoModelForCausalLM, folder, what, use_safetensors=True)
        self.model = self.model.to(device).eval()
        self.tokenizer = load_from_folder(transformers.AutoTokenizer, folder, what)
        config, tokenizer = self.model.config, self.tokenizer
        self.start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.start is None:
            raise ValueError(
                f"the tokenizer in {str(folder)!r} has neither bos nor eos, before which a text could begin"
            )
        self.longest = int(getattr(config, "max_position_embeddings", None) or 1024)
        self.device = device

    @torch.inference_mode()
    def judge(self, texts: Sequence[str]) -> list[JudgedText]:
        """Each token given those before it, the first one given the judge's begin (else end) of text.

        The entropy is that of the text's own tokens, -sum p log p with p their shares, in nats (as in MDLM's evaluation).

        Raises:
            ValueError: a text without tokens.
        """
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        if empty := [number for number, row in enumerate(ids) if not row]:
            raise ValueError(f"text {empty[0]} has no words; perplexity needs some in each")
        rows = [row[: self.longest - 1] for row in ids]
        width = max(map(len, rows)) + 1
        batch = torch.full((len(rows), width), self.start)  # [B, L]; what follows a text is not looked at
        seen = torch.zeros_like(batch)
        for place, row in enumerate(rows):
            batch[place, 1 : len(row) + 1] = torch.tensor(row)
            seen[place, : len(row) + 1] = 1
        logits = self.model(input_ids=batch.to(self.device), attention_mask=seen.to(self.device)).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten().to(self.device), reduction="none"
        ).view(len(rows), -1)
        sums = (nll * seen[:, 1:].to(self.device)).sum(1).tolist()
        return [
            JudgedText(total, len(row), entropy(row), len(row) < len(whole))
            for total, row, whole in zip(sums, rows, ids, strict=True)
        ]


def entropy(tokens: Sequence[Any]) -> float:
    """-sum p log p over the shares p of different tokens, in nats."""
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    shares = counts / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def read_texts(path: Path) -> list[str]:
    """Texts of a file, one a line (.txt), or the captions of any layout of `read_captions`. `ValueError`: none."""
    if path.suffix != ".txt":
        return [text for texts in read_captions(path).values() for text in texts]
    check_regular(path)
    with reading(path, "texts in UTF-8, one a line"):
        texts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{str(path)!r} holds no texts; write one in each line")
    return texts


def perplexity_and_entropy(judged: Sequence[JudgedText], resamples: int = RESAMPLES, seed: int = 0) -> Numbers:
    """exp(nats per token over all texts), with a percentile bootstrap over texts, and the mean entropy of a text."""
    sums = np.array([(text.nll, text.tokens) for text in judged])  # [N, 2]

    def value(*rows: np.ndarray) -> float:
        nll, tokens = (sums[rows[0]] if rows else sums).sum(0)
        return math.exp(min(nll / tokens, 700.0))  # beyond float64

    draws = bootstrap((len(sums),), value, resamples, seed, "perplexity")
    return {
        "perplexity": percentile_interval(value(), draws, len(sums)),
        "entropy": Estimate.mean([text.entropy for text in judged]),
    }


def _perplexity(results: Results) -> Numbers:
    assert isinstance(results.network, str | Path)
    texts = read_texts(results.path("made"))
    judge, judged = LanguageJudge(Path(results.network), results.device), list[JudgedText]()
    results.tick(0, len(texts))
    for start in range(0, len(texts), results.batch_size):
        part = texts[start : start + results.batch_size]
        judged += judge.judge(part)
        results.tick(len(part), len(texts))
    if cut := sum(text.cut for text in judged):
        results.notes.append(f"{cut} texts are longer than the {judge.longest} tokens of this judge and were cut")
    results.keys += [str(number) for number in range(len(texts))]
    resamples = results.about["resamples"] = results.resamples or RESAMPLES
    results.about |= {"network": Path(results.network).name, "tokens": sum(t.tokens for t in judged), "texts_cut": cut}
    return perplexity_and_entropy(judged, resamples, results.seed)


PERPLEXITY = Metric("perplexity", None, _perplexity, "texts of a model", "", "the folder of a causal language model")
