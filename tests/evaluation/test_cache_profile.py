"""What `unidiff profile-cache` measures, against features computed by hand, and what it makes of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import tiny_pipeline
from torch.nn import functional as F

from unidiff.decoding import DecodeState, Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache.combined import SEGMENTS
from unidiff.decoding.cache.config import CacheConfig
from unidiff.evaluation.benchmark.result import draw_panels
from unidiff.evaluation.cache_profile import (
    FEATURES,
    LONGEST,
    TaskProfile,
    Watcher,
    advise,
    heat_maps,
    pearson,
    profile_pipeline,
    segments_of,
    watch,
    write,
)
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
VARIANTS = {
    "plain": {},
    "grouped, normed": dict(num_kv_heads=2, qk_norm="head"),
    "sandwich": dict(sandwich_norm=True, qk_norm="width", num_kv_heads=1),
}


def make_model(**kwargs) -> MaskedTransformer:
    torch.manual_seed(4)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=4, **kwargs).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return model


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_similarities_are_those_of_the_stored_features(kwargs):
    """The same decode twice: watched, and replayed from its trajectory into a store that keeps every feature."""
    model = make_model(**kwargs)
    spans = [Span.text([3, 5], True), Span.masked_text(4, VOCABULARY), Span.masked_image((2, 3), VOCABULARY)]
    batch = TokenBatch.from_spans([spans, spans])
    config = SamplerConfig(ModalityDecoding(3), ModalityDecoding(3), Guidance(2.0), stop_at_eos=False)
    with watch(model, Watcher(keep=0.9)) as watcher:
        out = Sampler(model, VOCABULARY, config, watcher)(batch, torch.arange(2), record=True)
    profile = watcher.profile()
    assert profile.similarity.shape == (4, 4, 2, 2) and profile.correlation.shape == (2, 4, 2, 2)
    plain = Sampler(model, VOCABULARY, config, NoCache())(batch, torch.arange(2))
    assert torch.equal(out.batch.ids, plain.batch.ids)

    store = model.make_store(batch, StoreOptions(rotated=False, outputs=True))
    kept = []
    for ids in out.trajectory[:-1]:
        model.partial(ids, CachePlan(), store)
        heads = [part[..., :-1, :].transpose(2, 3).flatten(3).clone() for part in (store.key, store.value)]
        outputs = [part[:, :, :-1].clone() for part in (store.outputs[::2], store.outputs[1::2])]
        kept.append(heads + outputs)  # [layers, B, L, D] each
    places = {"text": slice(2, 6), "image": slice(6, 12), "text_prompt": slice(0, 2)}
    for step in range(2):
        cosines = [F.cosine_similarity(a, b, dim=-1) for a, b in zip(kept[step], kept[step + 1], strict=True)]
        for name, place in places.items():
            s = SEGMENTS.index(name)
            for f in range(len(FEATURES)):
                own = cosines[f][:, :, place].flatten(1)  # [layers, n]
                torch.testing.assert_close(profile.similarity[f, s, step], own.mean(1), rtol=1e-4, atol=1e-5)
            moved = (cosines[2][:, :, place].flatten(1) < 0.9).float().mean(1)
            assert torch.equal(profile.moved[s, step], moved)
            for layer in range(2):
                v, a = (1 - cosines[f][layer, :, place].flatten() for f in (1, 2))
                expected = float(torch.corrcoef(torch.stack((v, a)))[0, 1])
                assert float(profile.correlation[0, s, step, layer]) == pytest.approx(expected, abs=2e-3, nan_ok=True)
    assert profile.similarity[:, SEGMENTS.index("image_prompt")].isnan().all()
    assert profile.tokens == {"text": 4, "image": 6, "text_prompt": 2, "image_prompt": 0}
    assert not any(m._forward_hooks for m in model.modules())  # nothing is left behind


def test_rows_that_are_done_do_not_count():
    """A row of one token is ready after one pass; from then on the other row is measured alone."""
    model = make_model()
    short, long = ([Span.text([3, 5], True), Span.masked_text(n, VOCABULARY)] for n in (1, 4))
    config = SamplerConfig(ModalityDecoding(rule="first_hitting"), stop_at_eos=False)
    profiles = []
    for rows, seeds in (([long], [7]), ([short, long], [3, 7])):
        with watch(model, Watcher()) as watcher:
            Sampler(model, VOCABULARY, config, watcher)(TokenBatch.from_spans(rows), torch.tensor(seeds))
        profiles.append(watcher.profile())
    torch.testing.assert_close(profiles[0].similarity, profiles[1].similarity, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert profiles[0].tokens == profiles[1].tokens


def test_one_pass_has_nothing_to_compare():
    model = make_model()
    batch = TokenBatch.from_spans([[Span.masked_text(3, VOCABULARY)]])
    with watch(model, Watcher()) as watcher:
        Sampler(model, VOCABULARY, SamplerConfig(ModalityDecoding(steps=1, rule="quota")), watcher)(
            batch, torch.arange(1)
        )
    with pytest.raises(ValueError, match="at least 2 passes"):
        watcher.profile()


def test_segments_and_correlations():
    batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_image((1, 2), VOCABULARY)]], length=4)
    state = DecodeState.start(batch, {})
    assert segments_of(state)[:, 0].long().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    x = torch.tensor([1.0, 2.0, 4.0])
    assert float(pearson(x, 3 * x + 1)) == pytest.approx(1) and float(pearson(x, -x)) == pytest.approx(-1)
    assert pearson(x[:2], x[:2]).isnan() and pearson(x, torch.ones(3)).isnan()


def made_up(prompt: float, answer: float, moved: float, related: float, tokens=(100, 0, 900, 0)) -> TaskProfile:
    """The same numbers in every pass and layer."""
    similarity = torch.full((4, 4, 5, 8), answer)
    similarity[:, 2:] = prompt
    counts = dict(zip(SEGMENTS, map(float, tokens), strict=True))
    return TaskProfile(similarity, torch.full((2, 4, 5, 8), related), torch.full((4, 5, 8), moved), counts, 0.95)


def test_advice_follows_the_numbers():
    traits = make_model(num_kv_heads=None).traits
    advice = advise(made_up(0.9999, 0.99, 0.12, 0.8), traits)
    passes = int(math.acos(0.95) / math.acos(0.99))
    assert passes == 2
    assert advice.cache.policy == "adaptive" and advice.cache.options["response_interval"] == passes
    assert advice.cache.options["prompt_interval"] == int(math.acos(0.95) / math.acos(0.9999)) == 22
    assert advice.cache.options["ratio"] == pytest.approx(0.15) and advice.bound > 1.2
    assert CacheConfig.of(advice.cache.to_dict()).build()
    unrelated = advise(made_up(1.0, 0.999, 0.12, 0.1), traits)
    assert unrelated.cache.options["ratio"] == 0 and unrelated.cache.options["prompt_interval"] == LONGEST
    restless = advise(made_up(0.9, 0.9, 0.9, 0.8), traits)
    assert restless.cache == CacheConfig("none") and restless.bound == 1 and "does not pay" in restless.reason


def test_a_pipeline_is_profiled_task_by_task(tmp_path):
    pipe = tiny_pipeline()
    said: list[str] = []
    profiles = profile_pipeline(pipe, ["a dog", "two cats"], steps=3, progress=said.append)
    assert list(profiles) == said == ["text_to_image", "caption", "inpaint"]
    assert profiles["text_to_image"].segments == ["image", "text_prompt"]
    assert profiles["caption"].segments == ["text", "text_prompt", "image_prompt"]
    assert profiles["inpaint"].segments == ["image", "text_prompt", "image_prompt"]
    files = write(tmp_path / "out", "tiny", pipe.transformer.traits, profiles)
    assert sorted(f.name for f in files) == sorted(f.name for f in (tmp_path / "out").iterdir()) and len(files) == 9
    data = json.loads(files[0].read_text())
    drawn = data["tasks"]["text_to_image"]
    assert drawn["passes"] == 3 and drawn["layers"] == 1
    assert np.array(drawn["segments"]["image"]["similarity"]["V"]).shape == (2, 1)
    assert -1 <= drawn["segments"]["image"]["mean"]["K"] <= 1
    for task in data["tasks"].values():
        CacheConfig.of(task["recommended"])
        assert task["reason"]
    with Image.open(files[1]) as image:
        assert image.format == "PNG"
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        profile_pipeline(pipe, ["a dog"], tasks=["sing"])
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        profile_pipeline(pipe, ["a dog"], keep=1.5)


def test_the_command(tmp_path, monkeypatch, capsys):
    import sys

    from unidiff import cli

    tiny_pipeline().save_pretrained(tmp_path / "model")
    command = ["unidiff", "profile-cache", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--prompt", "a dog", "--task", "text_to_image"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    out = capsys.readouterr().out
    assert "text_to_image: " in out and str(tmp_path / "out" / "profile.json") in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "profile.json",
        "text_to_image.image.png",
        "text_to_image.text_prompt.png",
    }


def test_charts_say_what_they_cannot_draw():
    values = torch.tensor([[0.0, 1.0], [math.nan, 0.5]])
    one, two = (heat_maps(dict.fromkeys(names, (values, 0.0, 1.0)), "all") for names in (("a",), ("a", "b")))
    assert one.size == two.size and one.tobytes() != two.tobytes()
    with pytest.raises(ValueError, match="low < high"):
        heat_maps({"a": (values, 1.0, 1.0)}, "all")
    with pytest.raises(ValueError, match="logarithmic"):
        draw_panels({"all": {"a": [(0.0, 1.0)]}}, "", "")
    blank = draw_panels({"all": {}}, "", "")
    drawn = draw_panels({"all": {"a": [(1.0, 1.0), (2.0, math.nan), (10.0, 3.0)]}}, "", "")
    assert drawn.size == blank.size and drawn.tobytes() != blank.tobytes()
    assert draw_panels({name: {"a": [(1.0, 1.0)]} for name in "abc"}, "", "").width > drawn.width
