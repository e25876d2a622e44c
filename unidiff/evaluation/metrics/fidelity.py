"""Frechet and kernel distances of two sets of pictures, and the Inception score of one, by torch-fidelity.

FID: Heusel et al. 2017; KID: Binkowski et al. 2018; IS: Salimans et al. 2016. The network is the caller's: Inception for
published numbers, any other for one's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidiff.errors import import_extra
from unidiff.evaluation.metrics.base import CaptionedPictures, Metric, Numbers
from unidiff.evaluation.networks.base import FeatureNetwork
from unidiff.evaluation.networks.load import feature_network
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.resampling import bootstrap, spread_interval
from unidiff.evaluation.results.base import Results
from unidiff.evaluation.results.pictures import PictureSet, extract
from unidiff.pipeline import UniDiffPipeline

RESAMPLES, SUBSETS, SUBSET_SIZE, SPLITS = 20, 100, 1000, 10
_T = 2.2621571628540993  # 97.5 % point of Student's t with SPLITS - 1 degrees of freedom


def _library(part: str) -> Any:
    return import_extra(f"torch_fidelity.{part}", f"{part} needs torch-fidelity; install unidiff[eval]")


def frechet_distance(made: Tensor, against: Tensor, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """FID of features float64 `[N, D]` and `[M, D]`, +- 1.96 standard deviations of a bootstrap of both sets.

    The distance of few pictures lies above that of many; the interval is for sets of these sizes.

    Raises:
        ValueError: fewer than 2 pictures in a set.
    """
    library = _library("metric_fid")
    for which, features in (("made", made), ("against", against)):
        if len(features) < 2:
            raise ValueError(f"fid needs at least 2 pictures in each set; {which} has {len(features)}")

    def distance(*rows: Any) -> float:
        parts = [features[i] for features, i in zip((made, against), rows, strict=True)] if rows else [made, against]
        statistics = [library.fid_features_to_statistics(part) for part in parts]
        if made.shape[1] == 1:  # numpy's covariance of one feature has no axes
            statistics = [{**s, "sigma": s["sigma"].reshape(1, 1)} for s in statistics]
        return library.fid_statistics_to_metric(*statistics, False)[library.KEY_METRIC_FID]

    draws = bootstrap((len(made), len(against)), distance, resamples, seed, "fid")
    return spread_interval(max(0.0, distance()), float(draws.std(ddof=1)), len(made), least=0.0)


def kernel_distance(made: Tensor, against: Tensor, subsets: int = SUBSETS, seed: int = 0) -> Estimate:
    """KID with the cubic kernel: the mean over random subsets of at most 1,000 and at most half of the smaller set.

    The interval is the delete-d jackknife's (Shao and Wu 1989): the spread of subsets of m of n, times sqrt(m / (n - m)).

    Raises:
        ValueError: fewer than 4 pictures in a set.
    """
    library = _library("metric_kid")
    n = min(len(made), len(against))
    if n < 4:
        raise ValueError(f"kid needs at least 4 pictures in each set; one has {n}")
    size = min(SUBSET_SIZE, n // 2)
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed % 2**32, "verbose": False}
    found = library.kid_features_to_metric(made, against, **options)
    spread = found[library.KEY_METRIC_KID_STD] * (size / (n - size)) ** 0.5
    return spread_interval(found[library.KEY_METRIC_KID_MEAN], spread, n)


def inception_score(logits: Tensor, seed: int = 0) -> Estimate:
    """IS of logits float64 `[N, C]`: the mean over 10 random parts of the set, with Student's interval of these parts.

    Raises:
        ValueError: fewer than 10 pictures.
    """
    library = _library("metric_isc")
    if len(logits) < SPLITS:
        raise ValueError(f"is needs at least {SPLITS} pictures, one for each part; there are {len(logits)}")
    found = library.isc_features_to_metric(logits, SPLITS, True, seed % 2**32)
    half = _T * found[library.KEY_METRIC_ISC_STD] / (SPLITS - 1) ** 0.5  # of numpy's deviation, over n
    value = found[library.KEY_METRIC_ISC_MEAN]
    return Estimate(value, max(1.0, value - half), value + half, len(logits))


def _network(results: Results) -> FeatureNetwork:
    assert results.network is not None  # `score_results` asks for it
    network = feature_network(results.network, results.device)
    results.about["network"] = network.name
    return network


def _both(results: Results) -> tuple[Tensor, Tensor]:
    """Features of the made pictures and of those that they are compared with."""
    sets = {which: PictureSet.of(getattr(results, which), which) for which in ("made", "against")}
    network, features = _network(results), []
    for which, pictures in sets.items():
        features.append(extract(pictures, network, "features", results.batch_size, results.tick))
        _note(results, which, pictures)
    results.about["features"] = features[0].shape[1]
    return features[0], features[1]


def _note(results: Results, which: str, pictures: PictureSet) -> None:
    results.about[f"{which}_pictures"] = pictures.census()
    results.keys += pictures.names if which == "made" else []
    results.notes += [remark] if (remark := pictures.remark()) else []


def _fid(results: Results) -> Numbers:
    made, against = _both(results)
    if min(len(made), len(against)) <= made.shape[1]:
        results.notes.append(
            f"fid: {len(made)} and {len(against)} pictures for {made.shape[1]} features; with so few its value depends "
            "on their number, so compare only sets of the same sizes"
        )
    resamples = results.about["resamples"] = results.resamples or RESAMPLES
    return {"fid": frechet_distance(made, against, resamples, results.seed)}


def _kid(results: Results) -> Numbers:
    made, against = _both(results)
    subsets = results.about["subsets"] = results.resamples or SUBSETS
    return {"kid": kernel_distance(made, against, subsets, results.seed)}


def _is(results: Results) -> Numbers:
    pictures = PictureSet.of(results.made, "made")
    logits = extract(pictures, _network(results), "logits", results.batch_size, results.tick)
    _note(results, "made", pictures)
    return {"is": inception_score(logits, results.seed)}


def drawn_features(pipe: UniDiffPipeline, cases: CaptionedPictures) -> tuple[Tensor, Tensor]:
    """Features of what a model draws for the captions, and of the world's own pictures of them.

    Raises:
        ValueError: cases of a world without a reader that gives features.
    """
    network = cases.network
    if network is None:
        raise ValueError("this world has no network of features; draw pictures and use `unidiff eval score`")
    made, own = [], []
    for start in range(0, len(cases.captions), cases.batch_size):
        words = list(cases.captions[start : start + cases.batch_size])
        seeds = [cases.seed + start + number for number in range(len(words))]
        drawn = pipe.text_to_image(words, generator=seeds, output_type="pt").images
        made.append(network.features(drawn.float().cpu()).double())
        own.append(network.features(cases.pictures(start, start + len(words))).double())
        cases.tick(len(words))
    return torch.cat(made), torch.cat(own)


def _drawn_fid(pipe: UniDiffPipeline, cases: CaptionedPictures) -> Numbers:
    return {"fid": frechet_distance(*drawn_features(pipe, cases), seed=cases.seed)}


def _drawn_kid(pipe: UniDiffPipeline, cases: CaptionedPictures) -> Numbers:
    return {"kid": kernel_distance(*drawn_features(pipe, cases), seed=cases.seed)}


_PICTURES, _NETWORK = "a folder of pictures", "a network of features"
FID = Metric("fid", _drawn_fid, _fid, _PICTURES, "a folder of real pictures", _NETWORK, rounds=1)
KID = Metric("kid", _drawn_kid, _kid, _PICTURES, "a folder of real pictures", _NETWORK, rounds=1)
IS = Metric("is", None, _is, _PICTURES, "", "a network of classes")
