"""LLaDA2.0-Uni's image tokenizer as one among the others: codes, drawn pictures, batches, decoders by name, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from released_parts import Payload
from safetensors.torch import load_file, save_file
from siglip_parts import write_image_parts
from tiny_pipeline import GRID, tiny_parts

from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.verify import describe, verify
from unidiff.families.siglip_vq import SIGLIP_VQ, load_decoder, siglip_settings
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.released import load_images
from unidiff.tokens.image.flow import TURBO, FlowSettings
from unidiff.tokens.image.protocols import ImageEncoder, PixelDecoder
from unidiff.tokens.image.siglip_vq import SiglipVQModel
from unidiff.tokens.image.vq import VQImageTokenizer, row_generators

QUICK = FlowSettings(steps=2)
CODES = torch.arange(12).reshape(2, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made: Path = tmp_path_factory.mktemp("uni")
    write_image_parts(made)
    return made


@pytest.fixture
def images(folder) -> VQImageTokenizer:
    made = load_images(folder)
    made.model.choose_decoder("decoder", QUICK)
    return made


def copied(folder: Path, target: Path, *without: str) -> Path:
    """The image tokenizer in a copy of the folder that lacks some parts."""
    shutil.copytree(folder, target)
    for name in without:
        place = target / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    return target / "image_tokenizer"


def test_it_is_an_image_tokenizer(images):
    assert (
        isinstance(images, ImageEncoder)
        and isinstance(images, PixelDecoder)
        and isinstance(images.model, SiglipVQModel)
    )
    assert (images.factor, images.upscale, images.codebook_size, images.draws) == (2, 2, 16, True)
    pixels = torch.rand(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    codes = images.encode(pixels)
    assert codes.shape == (3, 2, 3) and codes.dtype == torch.int64 and len(codes.unique()) > 2
    assert all(torch.equal(images.encode(one[None])[0], row) for one, row in zip(pixels, codes, strict=True))
    drawn = images.decode(codes, 0)
    assert drawn.shape == (3, 3, 8, 12) and drawn.dtype == torch.float32 and 0 <= drawn.min() < drawn.max() <= 1


def test_a_row_is_the_same_in_any_batch_and_follows_its_seed(images):
    for name in images.model.decoders:
        images.model.choose_decoder(name, TURBO if name == "decoder-turbo" else QUICK)
        both = images.decode(CODES, [7, 8])
        assert torch.equal(images.decode(CODES[1:], [8])[0], both[1])
        assert torch.equal(images.decode(CODES.flip(0), torch.tensor([8, 7])).flip(0), both)
        assert not torch.equal(images.decode(CODES, [7, 9])[1], both[1])
        same = images.decode(CODES[:1].expand(2, -1, -1), 3)
        assert not torch.equal(same[0], same[1])  # every row has noise of its own
        assert torch.equal(images.decode(CODES, torch.Generator().manual_seed(3)), images.decode(CODES, 3))
    assert not torch.equal(images.decode(CODES), images.decode(CODES))  # fresh noise where nothing is said


def test_what_says_where_noise_comes_from():
    with pytest.raises(ValueError, match="generator is 3 entries for 2 rows; expected an int"):
        row_generators([1, 2, 3], 2)
    with pytest.raises(ValueError, match="generator lists a str; expected ints"):
        row_generators([1, "2"], 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="generator is a float for 2 rows"):
        row_generators(0.5, 2)  # type: ignore[arg-type]
    own = torch.Generator()
    assert row_generators([own, 4], 2)[0] is own


def test_guidance_and_the_features_matter(images):
    plain = images.decode(CODES, 0)
    images.model.choose_decoder("decoder", FlowSettings(steps=2, guidance_scale=1.0))
    assert not torch.equal(images.decode(CODES, 0), plain)
    other = CODES.clone()
    other[0, 0, 0] += 1
    assert not torch.equal(images.decode(other, 0)[0], images.decode(CODES, 0)[0])
    images.model.choose_decoder("decoder", FlowSettings(steps=2, upscale=4))
    assert images.upscale == 4 and images.decode(CODES, 0).shape == (2, 3, 16, 24)


def test_pictures_on_the_way_are_previews_and_the_last_is_the_result(images):
    images.model.choose_decoder("decoder", FlowSettings(steps=6))
    preview = images.preview(CODES, 0)
    images.model.choose_decoder("decoder", FlowSettings(steps=4, guidance_scale=1.0))
    assert torch.equal(images.decode(CODES, 0), preview)
    images.model.choose_decoder("decoder", FlowSettings(steps=6))
    transformer, _, texts, settings = tiny_parts()
    pipe = UniDiffPipeline(transformer, images, texts, settings)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe.text_to_image("a dog", steps=3, generator=5, record_trajectory=True, output_type="pt")
    frames = drawn.trajectory.frames
    assert torch.equal(frames[-1], (drawn.images * 255 + 0.5).to(torch.uint8).movedim(1, -1))
    assert len(frames) == 4 and not torch.equal(frames[-1], frames[0])  # covered in grey


def test_decoders_by_name(folder, tmp_path):
    images = load_released(folder / "image_tokenizer").images
    model = images.model
    assert model.decoders == ("decoder", "decoder-turbo") and model.flow == FlowSettings() and model.flow.steps == 49
    first = model.decoder()
    assert model.decoder() is first
    model.choose_decoder("decoder-turbo")
    assert model.flow == TURBO and model.decoder() is not first
    with pytest.raises(ValueError, match=r"the decoder is 'fast'; expected one of \['decoder', 'decoder-turbo'\]"):
        model.choose_decoder("fast")
    images.decode_with(steps=3)
    assert model.flow == replace(TURBO, steps=3)
    images.decode_with("decoder")
    assert model.flow == FlowSettings()
    with pytest.raises(
        ValueError, match="a CellVQModel has one way to decode; leave the pixel decoder and its steps out"
    ):
        VQImageTokenizer(tiny_parts()[1]).decode_with("decoder")
    alone = load_released(copied(folder, tmp_path / "turbo", "decoder")).model
    assert alone.decoders == ("decoder-turbo",) and alone.flow == TURBO
    model.decoder()
    images.to(torch.float64)  # what was read moves with the tokenizer
    assert {p.dtype for p in model.decoder().parameters()} == {torch.float64}


def test_weights_that_only_encode(folder, tmp_path):
    place = copied(folder, tmp_path / "bare", "decoder", "decoder-turbo", "vae", "image_tokenizer/sigvq_embedding.pt")
    images = load_released(place).images
    assert images.encode(torch.rand(1, 3, 4, 4)).shape == (1, 2, 2)
    with pytest.raises(
        ValueError, match="these weights only encode pictures: no pixel decoder lies beside them; put decoder"
    ):
        images.decode(CODES)


def test_a_converted_folder_finds_its_decoders(folder, tmp_path):
    place = copied(folder, tmp_path / "uni")
    before = load_released(place).images.decode(CODES[:1], 0)
    shutil.move(place, tmp_path / "theirs")
    convert(tmp_path / "theirs", place)
    shutil.copy(tmp_path / "theirs" / "sigvq_embedding.pt", tmp_path / "uni")
    assert torch.equal(load_released(place).images.decode(CODES[:1], 0), before)
    assert torch.equal(
        VQImageTokenizer.from_pretrained(place).encode(torch.ones(1, 3, 2, 2)),
        load_released(place).images.encode(torch.ones(1, 3, 2, 2)),
    )


def test_information_and_verification(folder):
    said = describe(folder / "image_tokenizer").lines()
    assert said["family"] == "siglip_vq" and said["decoder"] == said["decoder-turbo"]
    decoder = load_decoder(folder)
    size = sum(p.nbytes for p in decoder.parameters())
    assert describe(folder / "image_tokenizer").beside == {"decoder": size, "decoder-turbo": size}
    found = verify(folder / "image_tokenizer")
    assert found.passed and [check.name for check in found.checks][-2:] == ["decoder", "decoder-turbo"]


def test_codes_do_not_depend_on_how_weights_are_stored(folder):
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = load_released(folder / "image_tokenizer", torch.bfloat16)
    rounded = load_released(folder / "image_tokenizer", torch.bfloat16)
    rounded.model.float()
    assert torch.equal(half.images.encode(pixels), rounded.images.encode(pixels))


def test_patches_go_through_the_network_in_groups(tmp_path):
    """With groups of 2 x 2 a picture of one group gives what it gives without; of two, side by side, the order differs."""
    for merge in (1, 2):
        write_image_parts(tmp_path / str(merge), merge_size=merge)
    plain, grouped = (load_released(tmp_path / str(merge) / "image_tokenizer").images for merge in (1, 2))
    pixels = torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.encode(pixels[..., :4]), grouped.encode(pixels[..., :4]))
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(plain.model.patches(pixels)[:, order], grouped.model.patches(pixels))
    with pytest.raises(
        ValueError, match=r"image size 4x6 must be a multiple of 4 \(2 x 2 patches\); resize or crop it"
    ):
        grouped.encode(torch.rand(1, 3, 4, 6))


CONFIG: dict[str, Any] = dict(SIGLIP_VQ.tiny.config)


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("preprocessor_config", None, "its config has no 'preprocessor_config'.*put preprocessor_config.json beside"),
        ("preprocessor_config", {"temporal_patch_size": 2}, "temporal_patch_size = 2; only 1 is supported"),
        ("preprocessor_config", {"merge_size": 0}, "merge_size is 0; expected a whole number from 1 to 64"),
        ("preprocessor_config", {"rescale_factor": 1.0}, "rescale_factor = 1.0; only 1/255 is supported"),
        ("preprocessor_config", {"patch_size": 4}, "patch_size is 4 in preprocessor_config and 2 in vision_config"),
        ("preprocessor_config", {"image_std": [0.5, 0.0, 0.5]}, "no std of 0"),
        ("vision_config", {"spatial_merge_size": 2}, "spatial_merge_size = 2; only 1 is supported"),
        ("vision_config", {"hidden_act": "tanh"}, "hidden_act is 'tanh'; expected one of 'gelu'"),
        ("vision_config", {"num_heads": 3}, "hidden_size 16 must be a multiple of num_heads 3"),
        ("vision_config", {"image_size": 1}, "image_size 1 is smaller than a patch of 2"),
        ("vq_config", {"latent_channels": 8}, "latent_channels 8 of vq_config and hidden_size 16"),
    ],
)
def test_settings_that_are_refused(section, change, said):
    config = {name: dict(values) for name, values in CONFIG.items()}
    if change is None:
        config.pop(section)
    else:
        config[section] |= change
    with pytest.raises(ValueError, match=said):
        SiglipVQModel(**siglip_settings(config))


def test_parts_that_are_missing_or_damaged(folder, tmp_path):
    place = copied(folder, tmp_path / "a", "vae")
    with pytest.raises(
        FileNotFoundError, match=r"vae/config.json does not exist, which .*decoder needs; download it as well"
    ):
        load_released(place)
    place = copied(folder, tmp_path / "b")
    torch.save({"x": Payload(str(tmp_path / "made"))}, place / "sigvq_embedding.pt")
    with pytest.raises(ValueError, match="reading that could run code"):
        load_released(place).images.decode(CODES)
    assert not (tmp_path / "made").exists()
    torch.save({"x": torch.zeros(2, 2)}, place / "sigvq_embedding.pt")
    with pytest.raises(ValueError, match=r"does not hold prior_token_embedding\.weight and prior_projector"):
        load_released(place).images.decode(CODES)
    place = copied(folder, tmp_path / "c")
    weights = load_file(tmp_path / "c" / "decoder" / "model.safetensors")
    save_file({**weights, "more": torch.zeros(1)}, tmp_path / "c" / "decoder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder: .*1 left over \(more\)"):
        load_released(place).images.decode(CODES)
    config = tmp_path / "c" / "decoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "siglip_feat_dim": 4}))
    with pytest.raises(ValueError, match=r"config.json: config has siglip_feat_dim = 4; only None is supported"):
        load_released(place).images.decode(CODES)


def test_sizes_that_the_decoder_cannot_draw(images):
    images.model.choose_decoder("decoder", FlowSettings(steps=1, upscale=1))
    with pytest.raises(ValueError, match="a code is 2 pixels wide, which latent patches of 4 pixels do not divide"):
        images.decode(CODES, 0)
    images.model.choose_decoder("decoder", QUICK)
    with pytest.raises(ValueError, match="64 x 128 codes are too many for the pixel decoder; draw a smaller picture"):
        images.decode(torch.zeros(1, 64, 128, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="decoder steps is 0; expected a whole number from 1 to 1000"):
        FlowSettings(steps=0)


def test_a_pipeline_draws_with_it(images):
    """Rows are drawn from their own seeds; sizes in pixels are those of the drawn picture, twice those of a picture that is read."""
    transformer, _, texts, settings = tiny_parts()
    pipe = UniDiffPipeline(transformer, images, texts, settings)
    pipe.set_progress_bar_config(disable=True)
    height, width = GRID[0] * 4, GRID[1] * 4
    drawn = pipe.text_to_image(
        ["a dog", "two cats"], steps=2, generator=5, output_type="pt", height=height, width=width
    )
    assert drawn.images.shape == (2, 3, height, width)
    assert torch.equal(drawn.images, images.decode(drawn.codes, drawn.seeds))
    alone = pipe.text_to_image("two cats", steps=2, generator=[int(drawn.seeds[1])], output_type="pt")
    assert torch.equal(alone.images[0], drawn.images[1])
    with pytest.raises(ValueError, match=f"draws pictures of {height}x{width} pixels only"):
        pipe.text_to_image("a dog", height=height // 2, width=width // 2)
    assert pipe.image_size == (height // 2, width // 2)  # of pictures that are read
    given = torch.rand(3, *pipe.image_size, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(*pipe.image_size, dtype=torch.bool)
    mask[:, :2] = True
    kept = pipe.inpaint(given, mask, "a dog", steps=2, generator=1, output_type="pt", paste_back=True).images
    assert kept.shape == (1, 3, height, width)
    far = kept[0, :, :, 4:] - given.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :, 4:]
    assert far.abs().mean() < 0.2  # the given picture, enlarged
    told = pipe.caption(given, 3, steps=2, generator=2)
    assert len(told.texts) == 1


def test_a_pipeline_of_ones_own_finds_its_decoders(folder, images, tmp_path):
    """Saved, with the decoder's folders put beside its parts."""
    transformer, _, texts, settings = tiny_parts()
    UniDiffPipeline(transformer, images, texts, settings).save_pretrained(tmp_path / "own")
    bare = UniDiffPipeline.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="these weights only encode pictures"):
        bare.images.decode(CODES, 0)
    for part in ("decoder", "vae"):
        shutil.copytree(folder / part, tmp_path / "own" / part)
    shutil.copy(folder / "image_tokenizer" / "sigvq_embedding.pt", tmp_path / "own" / "image_tokenizer")
    whole = UniDiffPipeline.from_pretrained(tmp_path / "own")
    whole.images.model.choose_decoder("decoder", QUICK)
    assert torch.equal(whole.images.decode(CODES, 0), images.decode(CODES, 0))
