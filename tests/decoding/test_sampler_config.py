"""Sampler settings: JSON round trip, unknown keys and bad values refused in one sentence."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig


def test_round_trip_through_json() -> None:
    config = SamplerConfig(
        text=ModalityDecoding(rule="factor", factor=1.5, block_length=8, forbid=(3, 4)),
        image=ModalityDecoding(
            schedule="linear", top_p=0.9, remask="confidence", remask_threshold=0.3, remask_budget=4
        ),
        guidance=Guidance(3.0, mode="window", window=(0.1, 0.8), image_scale=2.0),
        order="text_first",
        stop_at_eos=False,
    )
    assert SamplerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SamplerConfig.from_dict({}) == SamplerConfig()


def test_settings_of_one_modality_leave_the_other_alone() -> None:
    config = SamplerConfig.from_dict({"image": {"steps": 7}})
    assert config.image.steps == 7 and config.text == SamplerConfig().text


def test_works_as_part_of_a_yaml_schema() -> None:
    assert OmegaConf.to_object(OmegaConf.structured(SamplerConfig)) == SamplerConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 3}, "sampler has unknown settings.*stepz"),
        ({"text": {"temp": 1}}, "sampler text has unknown settings.*temp"),
        ({"guidance": {"weight": 1}}, "sampler guidance has unknown settings.*weight"),
        ({"image": 5}, "sampler image is 5"),
        ({"order": "both"}, "order is 'both'; expected one of together"),
    ],
)
def test_bad_data_is_refused(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig.from_dict(data)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(rule="best"), "rule is 'best'; expected one of ancestral"),
        (dict(schedule="sine"), "schedule is 'sine'"),
        (dict(confidence="max"), "confidence is 'max'"),
        (dict(block_order="spiral"), "block_order is 'spiral'"),
        (dict(remask="all"), "remask is 'all'"),
        (dict(steps=0), "steps is 0; expected a whole number from 1"),
        (dict(steps=2.5), "steps is 2.5"),
        (dict(top_k=0), "top_k is 0"),
        (dict(top_p=0.0), "top_p is 0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(block_length=0), "block_length is 0"),
        (dict(remask_budget=-1), "remask_budget is -1"),
        (dict(remask_cap=1.1), "remask_cap is 1.1"),
        (dict(remask="remdm"), "remask='remdm' keeps the law of rule='ancestral' only"),
        (dict(rule="ancestral", remask="confidence"), "use remask='remdm'"),
        (dict(rule="ancestral", schedule="fixed"), "needs a schedule of times"),
        (dict(rule="threshold", confidence="random"), "confidence is 'random'"),
        (dict(rule="credit", confidence="random"), "confidence is 'random'"),
        (dict(credit_decay=1.5), "credit_decay is 1.5"),
        (dict(flight_share=-0.1), "flight_share is -0.1"),
        (dict(blocks_in_flight=0), "blocks_in_flight is 0"),
        (dict(blocks_in_flight=2), "there is one block; set block_length"),
        (dict(blocks_in_flight=2, block_length=4, rule="first_hitting"), "does not look at the model"),
        (dict(blocks_in_flight=2, block_length=4, confidence="random"), "does not look at the model"),
    ],
)
def test_bad_modality_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalityDecoding(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(scale=-1.0), "guidance scale is -1.0"),
        (dict(mode="sometimes"), "guidance mode is 'sometimes'"),
        (dict(hide="nothing"), "guidance hide is 'nothing'"),
        (dict(window=(0.8, 0.2)), "guidance window is"),
        (dict(text_scale=-2.0), "guidance text_scale is -2.0"),
    ],
)
def test_bad_guidance_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**values)
