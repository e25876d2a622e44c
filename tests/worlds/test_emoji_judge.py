"""EmojiEval on models whose scores are known."""

from __future__ import annotations

import json

import pytest
from emoji_fakes import BlurredModel, PerfectModel, ShuffledModel

from unidiff.worlds.emoji.cases import CATEGORIES, HELD_OUT
from unidiff.worlds.emoji.judge import EmojiEval, yardstick
from unidiff.worlds.emoji.scenes import get_profile

PROFILE = get_profile("cpu")
N = 21


@pytest.fixture(scope="module")
def perfect() -> dict:
    return EmojiEval(PerfectModel(PROFILE, 4, N), PROFILE, seed=4, n=N).run().to_dict()


def test_a_perfect_model_scores_one(perfect: dict) -> None:
    for key in ("oracle_true", "oracle_reconstruction", "text_to_image", HELD_OUT, "caption_exact", "answer_accuracy"):
        assert perfect[key] == 1.0, key
    assert perfect["categories"] == dict.fromkeys(CATEGORIES, 1.0)
    assert perfect["captions"] == dict.fromkeys(("single", "count", "pair", "group"), 1.0)
    assert perfect["inpainting"] == perfect["joint_agreement"] == 1.0
    assert perfect["joint_distinct"] > 0.9 and 0.9 < perfect["joint_entropy"] < 1.1
    assert perfect["reconstruction_psnr"] == perfect["sprite_psnr"] == 100.0
    assert not any(perfect["unreadable"].values())


def test_controls_are_in_the_report(perfect: dict) -> None:
    assert perfect["shuffled_composition"] <= 0.05
    assert 0.1 < perfect["answer_baseline"] <= 0.5


def test_a_shuffled_model_scores_about_nothing() -> None:
    report = EmojiEval(ShuffledModel(PROFILE, 4, N), PROFILE, seed=4, n=N).run()
    values = report.values
    for category in (*CATEGORIES, HELD_OUT):
        key = category if category == HELD_OUT else f"categories.{category}"
        assert values[key] <= (0.35 if category == "background" else 0.1), category  # one in eight by chance
    assert values["caption_exact"] <= 0.05
    assert values["inpainting"] == 0 and values["joint_agreement"] <= 0.1
    assert values["joint_distinct"] < 0.1 and values["joint_entropy"] < 0.5


def test_a_ruined_reconstruction_is_noticed() -> None:
    report = EmojiEval(BlurredModel(PROFILE, 4, 1), PROFILE, seed=4, n=5).run(["reader"]).values
    assert report["oracle_true"] == 1.0
    assert report["oracle_reconstruction"] < 0.5
    assert report["sprite_psnr"] < report["reconstruction_psnr"] < 25


def test_report_is_json_with_intervals_and_the_hash_of_the_yardstick(perfect: dict) -> None:
    assert json.loads(json.dumps(perfect)) == perfect
    interval = perfect["intervals"]["categories.counting"]
    assert interval["low"] < 1.0 == interval["high"] and interval["n"] == N
    assert perfect["about"]["yardstick"] == yardstick() and len(yardstick()) == 64
    assert perfect["seconds"] > 0


def test_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="unknown task 'singing'"):
        EmojiEval(PerfectModel(PROFILE, 4, 1), PROFILE, n=1).run(["singing"])
