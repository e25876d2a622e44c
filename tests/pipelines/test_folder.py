"""Folders: saved and loaded bit for bit, written whole or not at all, and refused when anything is off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipeline import GRID, TEXT_LENGTH, tiny_parts, tiny_pipeline

from unidiff.decoding import ModalityDecoding, SamplerConfig
from unidiff.hub import locate
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.owned import write_folder
from unidiff.pipelines.pack import pack_pipeline
from unidiff.pipelines.settings import PipelineSettings

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**data, **changes}.items() if v is not None}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_round_trip_gives_the_same_pictures_and_settings(saved, tmp_path):
    pipe = tiny_pipeline()
    loaded = UniDiffPipeline.from_pretrained(saved)
    assert loaded.settings == pipe.settings
    assert loaded.transformer.dtype == torch.float32 and not loaded.transformer.training
    first, second = (p.text_to_image(["a dog", "an owl"], generator=0) for p in (pipe, loaded))
    assert torch.equal(first.ids, second.ids)
    assert [i.tobytes() for i in first.images] == [i.tobytes() for i in second.images]
    loaded.save_pretrained(tmp_path / "again")
    for file in (f.relative_to(saved) for f in saved.rglob("*") if f.is_file()):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes(), file
    assert not list(tmp_path.glob(".*"))
    written = b"".join(f.read_bytes() for f in (tmp_path / "again").rglob("*.json"))
    assert str(saved).encode() not in written and str(tmp_path).encode() not in written


def test_sampler_settings_travel_with_the_model(tmp_path):
    transformer, image, text, settings = tiny_parts()
    mine = SamplerConfig(image=ModalityDecoding(steps=2, top_p=0.5))
    settings = PipelineSettings(settings.vocabulary, TEXT_LENGTH, GRID, samplers={"text_to_image": mine})
    UniDiffPipeline(transformer, image, text, settings).save_pretrained(tmp_path / "m")
    loaded = UniDiffPipeline.from_pretrained(str(tmp_path / "m"))
    assert loaded.settings.sampler("text_to_image") == mine
    assert loaded.text_to_image("a dog", generator=0).nfe == 2


def test_dtype_argument(saved):
    assert UniDiffPipeline.from_pretrained(saved, dtype="bfloat16").transformer.dtype == torch.bfloat16
    pipe = UniDiffPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.image_tokenizer.dtype == torch.float32  # rounded weights would move codes
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        UniDiffPipeline.from_pretrained(saved, dtype="int8")


def test_pack_stores_the_transformer_in_half_precision_and_loads_it_as_float32(tmp_path):
    transformer, image, text, settings = tiny_parts()
    for part, name in ((transformer, "t"), (image, "i"), (text, "x")):
        part.save_pretrained(tmp_path / name)
    out = tmp_path / "packed"
    parts = (tmp_path / "t", tmp_path / "i", tmp_path / "x", out)
    pack_pipeline(*parts, text_length=TEXT_LENGTH, image_size=(GRID[0] * 8, GRID[1] * 8))
    assert {v.dtype for v in load_file(out / "transformer" / WEIGHTS).values()} == {torch.bfloat16}
    assert {v.dtype for v in load_file(out / "image_tokenizer" / WEIGHTS).values()} == {torch.float32}
    pipe = UniDiffPipeline.from_pretrained(out)
    assert pipe.settings == settings and pipe.transformer.dtype == pipe.image_tokenizer.dtype == torch.float32
    expected = transformer.embed_tokens.weight.to(torch.bfloat16).float()
    assert torch.equal(pipe.transformer.embed_tokens.weight, expected)
    with pytest.raises(ValueError, match="multiple of the factor 8"):
        pack_pipeline(*parts, image_size=(20, 24))


def test_saving_replaces_a_pipeline_but_nothing_else(copy, tmp_path):
    tiny_pipeline(1).save_pretrained(copy)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.png").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no pipeline"):
        tiny_pipeline().save_pretrained(other)
    assert [p.name for p in other.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match="is a file"):
        tiny_pipeline().save_pretrained(other / "a.png")


def test_a_failed_save_leaves_the_old_folder(copy, tmp_path):
    before = {f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.is_file()}

    def fail(folder: Path) -> None:
        (folder / "model_index.json").write_text("{}")
        raise OSError("disk full")

    for target in (copy, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            write_folder(target, fail)
    assert {f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


DAMAGE = {
    "another family": (
        lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "describes a StableDiffusionPipeline, not a UniDiffPipeline",
    ),
    "index is no JSON": (
        lambda f: (f / "model_index.json").write_text("{"),
        "cannot be read as an index of a pipeline",
    ),
    "no settings": (lambda f: edit_json(f / "model_index.json", settings=None), "settings lacks"),
    "unknown settings": (
        lambda f: edit_json(
            f / "model_index.json",
            settings={**json.loads((f / "model_index.json").read_text())["settings"], "tex_length": 3},
        ),
        "pipeline settings has unknown settings ['tex_length']",
    ),
    "another transformer": (
        lambda f: edit_json(f / "transformer" / "config.json", _class_name="UNet2DModel"),
        "UNet2DModel, not a MaskedTransformer",
    ),
    "unknown config": (lambda f: edit_json(f / "transformer" / "config.json", layers=3), "unknown keys ['layers']"),
    "missing weight": (
        lambda f: edit_weights(f / "transformer", lambda w: w.pop("embed_tokens.weight")),
        "1 missing (embed_tokens.weight)",
    ),
    "unexpected weight": (
        lambda f: edit_weights(f / "transformer", lambda w: w.update(extra=torch.zeros(1))),
        "1 unexpected (extra)",
    ),
    "misshaped weight": (
        lambda f: edit_weights(f / "transformer", lambda w: w.update({"final_norm.weight": torch.zeros(3)})),
        "1 misshaped (final_norm.weight)",
    ),
    "NaN in the transformer": (
        lambda f: edit_weights(f / "transformer", lambda w: w["final_norm.weight"].fill_(torch.nan)),
        "NaN or infinit",
    ),
    "NaN in the image tokenizer": (
        lambda f: edit_weights(f / "image_tokenizer", lambda w: w["codebook"].fill_(torch.nan)),
        "NaN or infinit",
    ),
    "another image tokenizer": (
        lambda f: edit_json(f / "image_tokenizer" / "config.json", _class_name="AutoencoderKL"),
        "holds a 'AutoencoderKL'",
    ),
    "damaged weights": (lambda f: (f / "transformer" / WEIGHTS).write_bytes(b"12345"), "weight file is damaged"),
    "another codebook": (
        lambda f: shutil.rmtree(f / "image_tokenizer") or _other_codebook(f / "image_tokenizer"),
        "the image tokenizer has 8 codes, but the model 16",
    ),
}


def _other_codebook(folder: Path) -> None:
    from unidiff.tokens.image.vq import CellVQModel

    CellVQModel(8, 8, 4, 16, 1, (16,), (1,)).save_pretrained(folder)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(copy, name):
    damage, words = DAMAGE[name]
    damage(copy)
    with pytest.raises(ValueError) as caught:
        UniDiffPipeline.from_pretrained(copy)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["model_index.json", "transformer", "image_tokenizer", "text_tokenizer"])
def test_a_missing_part_is_named(copy, part):
    target = copy / part
    target.unlink() if target.is_file() else shutil.rmtree(target)
    with pytest.raises(FileNotFoundError, match=part.split(".")[0]):
        UniDiffPipeline.from_pretrained(copy)


def test_names_that_look_like_paths_never_reach_the_network(tmp_path, monkeypatch):
    def network(*args, **kwargs):
        raise AssertionError("looked up on the network")

    monkeypatch.setattr("unidiff.hub.snapshot_download", network)
    for name in (tmp_path / "none", "./none", "../a/b", "a/b/c", "none", ""):
        with pytest.raises(FileNotFoundError, match=r"does not exist|holds no"):
            UniDiffPipeline.from_pretrained(name)
    with pytest.raises(AssertionError, match="network"):
        locate("someone/model")
    with pytest.raises(TypeError, match="revison"):
        locate("someone/model", revison="main")


def test_an_unreachable_hub_name_is_one_sentence(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("unidiff.hub.snapshot_download", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/model' is neither a folder nor a reachable hub model: no route$"
    ):
        locate("someone/model")


def test_parts_that_do_not_fit(saved):
    transformer, image, text, settings = tiny_parts()
    data = settings.to_dict()
    bad = {
        "the transformer has": {**data, "vocabulary": {**data["vocabulary"], "size": 999}},
        "text_length is 2": {**data, "text_length": 2},
        "grid is": {**data, "grid": [0, 2]},
        "unknown tasks": {**data, "samplers": {"paint": {}}},
        "no special token 'cap'": {**data, "task_tokens": {**data["task_tokens"], "caption": "cap"}},
        "settings lacks": None,
    }
    for words, changed in bad.items():
        with pytest.raises(ValueError, match=words):
            UniDiffPipeline(transformer, image, text, changed)


REFUSED = {
    "safe_serialization": False,
    "push_to_hub": True,
    "use_flashpack": True,
    "save_function": print,
    "is_main_process": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_read_is_not_written(tmp_path, name):
    pipe = tiny_pipeline()
    for part in (pipe, pipe.transformer, pipe.image_tokenizer):
        with pytest.raises(ValueError, match=f"save_pretrained cannot take {name}="):
            part.save_pretrained(tmp_path / "new", **{name: REFUSED[name]})
    assert not (tmp_path / "new").exists()


def test_options_that_change_nothing_are_fine_and_unknown_ones_are_named(tmp_path):
    pipe = tiny_pipeline()
    for part, out in ((pipe, "a"), (pipe.transformer, "b")):
        part.save_pretrained(tmp_path / out, safe_serialization=True, variant=None, push_to_hub=False)
        with pytest.raises(ValueError, match=r"unknown argument 'max_shards_size'; did you mean 'max_shard_size'"):
            part.save_pretrained(tmp_path / "new", max_shards_size="1GB")
        for size in (
            0,
            -1,
            "0GB",
            "big",
            "5 GB please",
            "",
            float("nan"),
            1.5,
            True,
            "-5GB",
            b"5GB",
            [1],
            "1" * 30 + "GB",
        ):
            with pytest.raises(ValueError, match="max_shard_size is"):
                part.save_pretrained(tmp_path / "new", max_shard_size=size)
    assert UniDiffPipeline.from_pretrained(tmp_path / "a") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [1, 9_000, "20KB", "1MB", "1.5KB", "5GB"])
def test_weights_in_several_files_are_read_back(tmp_path, size):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "m", max_shard_size=size)
    again = UniDiffPipeline.from_pretrained(tmp_path / "m")
    for part in ("transformer", "image_tokenizer"):
        state, read = (getattr(p, part).state_dict() for p in (pipe, again))
        assert all(torch.equal(value, read[name]) for name, value in state.items())
    assert again.text_to_image("a dog", generator=0).ids.equal(pipe.text_to_image("a dog", generator=0).ids)


def test_weights_without_values_are_not_saved(tmp_path):
    for damage, words in (
        (lambda p: p.transformer.final_norm.weight.data.fill_(torch.nan), "NaN or infinity"),
        (lambda p: p.image_tokenizer.codebook.data.fill_(torch.inf), "NaN or infinity"),
        (lambda p: p.transformer.to("meta"), "on the meta device"),
        (
            lambda p: setattr(
                p.transformer.embed_tokens,
                "weight",
                torch.nn.Parameter(p.transformer.embed_tokens.weight.data.to_sparse(), requires_grad=False),
            ),
            "is sparse",
        ),
    ):
        pipe = tiny_pipeline()
        damage(pipe)
        with pytest.raises(ValueError, match=words):
            pipe.save_pretrained(tmp_path / "m")
        assert not list(tmp_path.iterdir())


def test_a_pipeline_from_the_parts_of_another(tmp_path):
    pipe = tiny_pipeline()
    mine = SamplerConfig(image=ModalityDecoding(steps=2, top_p=0.5))
    own = PipelineSettings(pipe.settings.vocabulary, TEXT_LENGTH, GRID, samplers={"text_to_image": mine})
    for first in (pipe, UniDiffPipeline(pipe.transformer, pipe.images, pipe.texts, own)):
        for again in (UniDiffPipeline.from_pipe(first), UniDiffPipeline(**first.components)):
            again.set_progress_bar_config(disable=True)
            assert again is not first and again.transformer is first.transformer and again.settings == first.settings
            results = [p.text_to_image("a dog", generator=0).ids for p in (first, again)]
            assert torch.equal(*results)
            again.save_pretrained(tmp_path / "m")
            assert UniDiffPipeline.from_pretrained(tmp_path / "m").settings == first.settings
    changed = UniDiffPipeline.from_pipe(pipe, settings=own)
    assert changed.settings == own and pipe.settings != own
    half = tiny_pipeline().to(torch.bfloat16)
    assert UniDiffPipeline.from_pipe(half).transformer.dtype == torch.bfloat16  # the weights are shared: not cast back
    with pytest.raises(TypeError, match=r"has no argument 'transformers'; did you mean 'transformer'"):
        UniDiffPipeline.from_pipe(pipe, transformers=1)
    with pytest.raises(ValueError, match="got a dict; expected a UniDiffPipeline"):
        UniDiffPipeline.from_pipe({})


def test_a_dtype_changes_without_a_word_about_an_empty_list(caplog):
    for part in (tiny_pipeline(), tiny_pipeline().transformer, tiny_pipeline().images):
        part.to(torch.bfloat16)
        part.to(dtype=torch.float32)
    assert "kept in float32" not in caplog.text
