"""FID, KID, IS and CLIPScore: closed forms, the libraries' own direct calls, and what must not matter."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unidiff.evaluation.metrics.fidelity import frechet_distance, inception_score, kernel_distance
from unidiff.evaluation.networks.base import NETWORKS, FeatureNetwork
from unidiff.evaluation.networks.load import feature_network
from unidiff.evaluation.results.pictures import PictureSet, extract
from unidiff.evaluation.scoring import score_results

fidelity = pytest.importorskip("torch_fidelity")


def colours(pictures: torch.Tensor) -> torch.Tensor:
    """Mean colours of the two halves, `[B, 6]`: a network that anyone can compute by hand."""
    left, right = pictures.chunk(2, -1)
    return torch.cat([left.mean((2, 3)), right.mean((2, 3))], 1)


def write(folder: Path, count: int, seed: int, shift: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        pixels = (rng.integers(0, 200, (8, 8, 3)) + shift).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return write(folder / "a", 40, 0), write(folder / "b", 30, 1, shift=30)


def gaussian(n: int, mean: list[float], deviation: list[float], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(mean), generator=generator, dtype=torch.float64) * torch.tensor(deviation) + torch.tensor(
        mean
    )


def pair(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return gaussian(n, [0.0, 0.0], [1.0, 1.0], 2 * seed), gaussian(n, [1.0, 0.0], [1.0, 1.5], 2 * seed + 1)


def test_fid_of_gaussians_is_the_closed_form():
    one, other = gaussian(20_000, [0.0, 1.0], [1.0, 2.0], 0), gaussian(20_000, [1.0, 1.0], [3.0, 0.5], 1)
    truth = 1.0 + (1 - 3) ** 2 + (2 - 0.5) ** 2  # |mu|^2 + sum (s1 - s2)^2 where the covariances commute
    found = frechet_distance(one, other)
    assert abs(found.value - truth) < 0.15
    assert found.low < truth < found.high and found.high - found.low < 0.4


def test_fid_intervals_hold_the_expected_value():
    """Of 200 pairs of small samples about 95 % of the intervals hold the mean of FID at that size."""
    found = [frechet_distance(*pair(60, seed), resamples=40, seed=seed) for seed in range(200)]
    mean = np.mean([e.value for e in found])
    assert 0.88 <= np.mean([e.low < mean < e.high for e in found]) <= 0.99


def test_kid_intervals_hold_the_truth():
    found = [kernel_distance(*pair(80, seed), subsets=60, seed=seed) for seed in range(200)]
    mean = np.mean([e.value for e in found])  # unbiased at every size
    assert 0.88 <= np.mean([e.low < mean < e.high for e in found]) <= 0.99


def test_distances_are_the_libraries_own():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    one, other = gaussian(50, [0.0, 1.0, 2.0], [1.0, 2.0, 1.0], 0), gaussian(40, [1.0, 1.0, 2.0], [2.0, 0.5, 1.0], 1)
    network = nn.Identity()  # torchmetrics' own class, given features for pictures
    network.num_features = 3
    direct = FrechetInceptionDistance(feature=network, normalize=False).set_dtype(torch.float64)
    direct.update(one, real=True)
    direct.update(other, real=False)
    assert frechet_distance(one, other).value == pytest.approx(float(direct.compute()), rel=1e-6)
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    kid = kid_features_to_metric(one, other, kid_subsets=100, kid_subset_size=20, rng_seed=5, verbose=False)
    found = kernel_distance(one, other, seed=5)
    assert found.value == kid["kernel_inception_distance_mean"]
    assert found.high - found.value == pytest.approx(1.96 * kid["kernel_inception_distance_std"], rel=1e-3)  # m = n / 2
    rng = np.random.default_rng(0)
    means = [float(poly_mmd(one[rng.permutation(50)[:20]], other[rng.permutation(40)[:20]])) for _ in range(2000)]
    assert found.value == pytest.approx(np.mean(means), abs=5 * np.std(means) / math.sqrt(100))
    isc = isc_features_to_metric(one, 10, True, 7)
    assert inception_score(one, seed=7).value == isc["inception_score_mean"]


def test_inception_score_by_hand():
    sure = torch.full((40, 4), -100.0, dtype=torch.float64)
    sure[torch.arange(40), torch.arange(40) % 4] = 100.0
    with_all = inception_score(sure[torch.arange(40) // 10 * 4])  # one class only
    assert with_all.value == pytest.approx(1.0)
    found = inception_score(sure)
    assert 2.0 < found.value <= 4.0 and found.low < found.value < found.high


def test_the_same_folder_has_fid_0_and_order_and_batches_do_not_matter(sets, tmp_path):
    one, other = sets
    assert score_results("fid", one, one, colours).values["fid"] == pytest.approx(0, abs=1e-6)
    whole = score_results("fid", one, other, colours)
    files = sorted(one.iterdir())
    random.Random(0).shuffle(files)
    for file in files:  # written in another order
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for batch_size in (1, 7, 64):
        for metric in ("fid", "kid", "is"):
            against = None if metric == "is" else other
            first = score_results(metric, one, against, colours, seed=3)
            again = score_results(metric, tmp_path, against, colours, seed=3, batch_size=batch_size)
            assert first.values[metric] == pytest.approx(again.values[metric], rel=1e-5, abs=1e-9)
            assert first.about["yardstick"] == again.about["yardstick"]
    shown = [Image.open(path) for path in sorted(one.iterdir())]  # pictures in memory
    assert score_results("fid", shown, other, colours).values == whole.values
    assert whole.values["fid"] > 0.01 and "fewer" not in whole.about["notes"]


def test_unusual_pictures_are_converted_and_counted(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    Image.new("L", (8, 8), 100).save(folder / "grey.png")
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(folder / "clear.png")
    (folder / "b").mkdir()
    Image.new("RGB", (6, 8), (9, 9, 9)).save(folder / "b" / "small.jpg", quality=95)
    (folder / "notes.txt").write_text("a note")
    pictures = PictureSet.of(folder, "made")
    assert pictures.names == ["b/small.jpg", "clear.png", "grey.png"]
    features = extract(pictures, feature_network(colours), "features", 2, lambda more, total: None)
    assert features[1].tolist() == [1.0] * 6  # transparent is white
    assert features[2].tolist() == pytest.approx([100 / 255] * 6)
    census = pictures.census()
    assert census["modes"] == {"L": 1, "RGB": 1, "RGBA (transparent)": 1} and census["other_files"] == 1
    assert (census["smallest"], census["largest"]) == ("6x8", "8x8")
    assert "2 are no plain RGB" in pictures.remark() and "1 other files" in pictures.remark()
    sized = FeatureNetwork("sized", lambda x: x.flatten(1), size=(4, 4))
    assert extract(PictureSet.of(folder, "made"), sized, "features", 3, lambda more, total: None).shape == (3, 48)


@pytest.mark.parametrize(
    "metric, made, against, network, sentence",
    [
        ("fid", "a", None, "emoji", "needs a folder of real pictures"),
        ("fid", "a", "b", None, "needs a network of features"),
        ("is", "a", "b", "emoji", "takes no --against"),
        ("fid", "a", "none", "emoji", "'none' does not exist"),
        ("fid", "a", "b", "inception.pth", "is no file, no folder and none of emoji"),
        ("fid", "a", "b", "a", "is no folder of a transformers model"),
        ("fid", "a", "b", "a/000.png", "is no torch file"),
        ("fid", "a", "b", "emoji", "reads pictures of 64 x 64 or 128 x 128"),
        ("fidd", "a", "b", "emoji", "did you mean 'fid'"),
        ("likelihood", "a", "b", "emoji", "is measured on a model"),
    ],
)
def test_what_is_missing_is_one_sentence(sets, monkeypatch, metric, made, against, network, sentence):
    monkeypatch.chdir(sets[0].parent)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        score_results(metric, made, against, network)
    assert "\n" not in str(error.value)


def test_networks_that_do_not_fit_are_one_sentence(sets):
    one, other = sets
    with pytest.raises(ValueError, match="training mode"):
        score_results("fid", one, other, nn.Sequential(nn.Flatten(), nn.Dropout()))
    with pytest.raises(ValueError, match=r"expected \[B, D\]"):
        score_results("fid", one, other, lambda x: x)
    with pytest.raises(ValueError, match="not finite"):
        score_results("fid", one, other, lambda x: x.flatten(1) / 0)
    with pytest.raises(ValueError, match="knows no classes"):
        score_results("is", one, None, FeatureNetwork("plain", colours))
    with pytest.raises(ValueError, match="at least 10 pictures"):
        score_results("is", [Image.new("RGB", (4, 4))] * 3, None, colours)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        score_results("fid", [Image.new("RGB", (4, 4))], other, colours)


def test_a_network_in_a_file_is_inception(sets, tmp_path, monkeypatch):
    """Random weights in the library's own layout: the same features as the library gives, and no pickled code is run."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    torch.manual_seed(0)
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    blank = library.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=_saved({})
    )
    monkeypatch.undo()
    torch.save(blank.state_dict(), tmp_path / "inception.pth")
    pictures = PictureSet.of(sets[0], "made")
    batch = next(pictures.batches(2))
    network = feature_network(tmp_path / "inception.pth")
    features, logits = blank((batch * 255).round().byte())
    assert torch.equal(network.features(batch), features) and torch.equal(network.logits(batch), logits)
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights of Inception") as error:
        feature_network(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


def _saved(state: dict) -> object:
    import io

    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return content


def test_transformers_folders(sets, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8, num_labels=3
    )  # fmt: skip
    transformers.ViTForImageClassification(config).eval().save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    network = feature_network(str(tmp_path))
    batch = next(PictureSet.of(sets[0], "made").batches(4))
    assert network.features(batch).shape == (4, 16) and network.logits(batch).shape == (4, 3)
    assert score_results("is", sets[0], None, str(tmp_path)).about["network"].startswith("vit")
    assert score_results("fid", sets[0], sets[1], tmp_path).values["fid"] > 0


def test_the_emoji_reader_is_a_network():
    from unidiff.world import WORLDS

    draw = lambda start: [WORLDS["emoji"].pictures("cpu", (1, 1, 1, 1), seed=0)(start + i) for i in range(24)]  # noqa: E731
    pil = lambda rows: [Image.fromarray((p * 255).round().byte().movedim(0, -1).numpy()) for p in rows]  # noqa: E731
    assert "emoji" in NETWORKS
    one, other, blank = pil(draw(0)), pil(draw(500)), [Image.new("RGB", (64, 64))] * 24
    near = score_results("fid", one, other, "emoji").values["fid"]
    assert near < score_results("fid", one, blank, "emoji").values["fid"]
    assert score_results("is", one, None, "emoji").values["is"] > score_results("is", blank, None, "emoji").values["is"]
