"""CIDEr and BLEU of captions against several references, in the hundredths of published tables.

CIDEr: Vedantam et al. 2015, by pycocoevalcap. BLEU: Papineni et al. 2002, by sacrebleu. Both count `caption_words`, in place
of COCO's tokenizer, which is a Java program; METEOR and SPICE, Java programs too, are left to COCO's own scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unidiff.errors import import_extra
from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.resampling import bootstrap, percentile_interval
from unidiff.evaluation.results.base import Results
from unidiff.evaluation.results.captions import caption_words, paired, read_captions

RESAMPLES = 1000
Pairs = Mapping[str, tuple[str, list[str]]]
"""A caption and its references by picture."""


def cider(pairs: Pairs) -> Estimate:
    """CIDEr-D times 100, the mean over pictures with the normal interval.

    How rare words are is counted in the references of these pictures, so that sets of other pictures are no match.

    Raises:
        ValueError: fewer than 2 pictures: every word would be in all of them.
    """
    library = import_extra("pycocoevalcap.cider.cider", "cider needs pycocoevalcap; install unidiff[eval]")
    if len(pairs) < 2:
        raise ValueError(f"cider needs captions of at least 2 pictures; there are {len(pairs)}")
    made = {name: [" ".join(caption_words(caption))] for name, (caption, _) in pairs.items()}
    against = {name: [" ".join(caption_words(r)) for r in references] for name, (_, references) in pairs.items()}
    _, scores = library.Cider().compute_score(against, made)
    return Estimate.mean(100 * np.asarray(scores))


def bleu(pairs: Pairs, order: int = 4, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Corpus BLEU up to `order` words without smoothing, with the reference nearest in length; percentile bootstrap over pictures."""
    library = import_extra("sacrebleu", "bleu needs sacrebleu; install unidiff[eval]")
    scorer = library.BLEU(tokenize="none", max_ngram_order=order)
    counts = []
    for caption, references in pairs.values():
        words = [" ".join(caption_words(text)) for text in (caption, *references)]
        one = scorer.corpus_score(words[:1], [[reference] for reference in words[1:]])
        counts.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    table = np.array(counts)  # [N, 2 order + 2]

    def score(*rows: np.ndarray) -> float:
        sums = (table[rows[0]] if rows else table).sum(0).tolist()
        found = scorer.compute_bleu(sums[:order], sums[order : 2 * order], *sums[-2:], max_ngram_order=order)
        return float(found.score)

    return percentile_interval(score(), bootstrap((len(table),), score, resamples, seed, f"bleu{order}"), len(table))


def _pairs(results: Results) -> Pairs:
    made = read_captions(_words_of(results.path("made")))
    against = read_captions(results.path("against"))
    pairs = paired(made, against)
    results.keys += pairs
    results.about["references"] = sum(len(references) for _, references in pairs.values())
    if len(against) > len(pairs):
        results.notes.append(f"{len(pairs)} of the {len(against)} pictures with references have a caption")
    return pairs


def _words_of(path: Path) -> Path:
    """The file for COCO's scorer in a folder of `unidiff eval run`, which knows the pictures' numbers; else `path`."""
    found = sorted((path / "scorer").glob("*_results.json")) if path.is_dir() else []
    return found[0] if len(found) == 1 else path


def _cider(results: Results) -> Numbers:
    return {"cider": cider(_pairs(results))}


def _bleu(results: Results) -> Numbers:
    pairs = _pairs(results)
    resamples = results.about["resamples"] = results.resamples or RESAMPLES
    return {f"bleu{order}": bleu(pairs, order, resamples, results.seed) for order in (1, 4)}


CIDER = Metric("cider", None, _cider, "captions of a model", "captions of people")
BLEU = Metric("bleu", None, _bleu, "captions of a model", "captions of people")
