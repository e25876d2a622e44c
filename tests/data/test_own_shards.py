"""The whole path on a person's own data: photographs that scikit-image and scikit-learn bundle, through the real recipes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
CAPTIONS = {
    "astronaut": "an astronaut in an orange suit",
    "brick": "a brick wall",
    "camera": "a man with a camera",
    "chelsea": "a cat",
    "coffee": "a cup of coffee on a saucer",
    "coins": "old coins",
    "grass": "grass",
    "gravel": "gravel",
    "rocket": "a rocket on its launch pad",
    "china.jpg": "a temple in China",
    "flower.jpg": "a red flower",
}


def photographs():
    """(name, PIL image) of each photograph."""
    from PIL import Image

    skimage_data = pytest.importorskip("skimage.data", reason="scikit-image is a dev dependency")
    sklearn_data = pytest.importorskip("sklearn.datasets", reason="scikit-learn is a dev dependency")
    bundled = sklearn_data.load_sample_images()
    arrays = {Path(name).name: image for name, image in zip(bundled.filenames, bundled.images, strict=True)}
    arrays |= {name: getattr(skimage_data, name)() for name in CAPTIONS if "." not in name}
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def write_photographs(folder):
    """Four crops of every photograph, in the img2dataset layout; one caption is broken on purpose."""
    from unidiff.data.tar import ShardWriter

    with ShardWriter(folder, 16) as writer:
        for number, (name, image) in enumerate(sorted(photographs().items())):
            image.thumbnail((96, 96))
            width, height = image.width // 2, image.height // 2
            for corner, (x, y) in enumerate([(0, 0), (width, 0), (0, height), (width, height)]):
                crop = image.convert("RGB").crop((x, y, x + width, y + height))
                caption = CAPTIONS[name].encode() if (number, corner) != (2, 1) else b"\xff\xfe"
                answer = CAPTIONS[name].split()[-1]
                pairs = {"qa": [["what is it?", answer]], "width": width}
                writer.write(f"{number:04d}{corner:05d}", {"jpg": crop, "txt": caption, "json": pairs})
    return 4 * len(CAPTIONS)


def recipe(path, *arguments):
    result = subprocess.run(
        [sys.executable, str(ROOT / path), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{path}: {result.stderr[-3000:]}"
    return result.stdout + result.stderr


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.training
def test_own_photographs_from_shards_to_samples(tmp_path):
    count = write_photographs(tmp_path / "raw")
    shards = str(tmp_path / "raw" / "{00000..00002}.tar")

    recipe("tokenizers/train_text_tokenizer.py", tmp_path / "text", "--shards", shards, "--vocab-size", 320)
    image_run = {
        "out": str(tmp_path / "image"),
        "data": {"shards": [shards], "image_size": 32, "validation_images": 16},
        "model": {
            "codebook_size": 64, "code_dim": 4, "encoder_width": 32, "encoder_depth": 1,
            "decoder_widths": [32, 16], "decoder_depths": [1, 1],
        },
        "steps": 12, "batch_size": 16, "warmup_steps": 2, "validate_every": 12,
    }  # fmt: skip
    recipe("tokenizers/train_image_tokenizer.py", write_yaml(tmp_path / "image.yaml", image_run))
    image_folder = tmp_path / "image" / "model"

    tokenizers = ("--image-tokenizer", image_folder, "--text-tokenizer", tmp_path / "text")
    sizes = ("--image-size", 32, "--text-length", 16)
    said = recipe("tokenizers/encode_shards.py", tmp_path / "tokens", "--shards", shards, *tokenizers, *sizes)
    assert f"{count - 1} samples, {count - 1} questions" in said
    assert "1 bad_caption" in said and "000200001" in said

    # Pre-tokenised and raw shards of the same layout, mixed three to one.
    run = {
        "output": str(tmp_path / "run"),
        "steps": 6,
        "batch_size": 8,
        "data": {
            "train": f"{tmp_path / 'tokens'}@3::{shards}@1", "validation_rows": 8, "image_size": 32, "text_length": 16,
        },
        "tokenizer": {"image": str(image_folder), "text": str(tmp_path / "text")},
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "rope": "2d"},
        "tasks": {
            "generate": {"weight": 0.4, "loss": "elbo"}, "text_to_image": {"weight": 0.3}, "caption": {"weight": 0.2},
            "answer": {"weight": 0.1},
        },
        "schedule": {"warmup": 2},
        "logging": {"validate_every": 6, "validation_draws": 1, "every": 2, "trackers": [], "progress": False},
    }  # fmt: skip
    said = recipe("training/pretrain.py", write_yaml(tmp_path / "run.yaml", run))
    assert "bad_caption" in said  # the raw set reports its damaged sample too

    draw_and_describe(tmp_path, image_folder)


def draw_and_describe(root, image_folder):
    """Sample text, picture and answer with what the run wrote."""
    from unidiff.data.manifest import TokenManifest
    from unidiff.models.transformer import MaskedTransformer
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.pipelines.settings import PipelineSettings
    from unidiff.tokens import Vocabulary
    from unidiff.tokens.image.vq import VQImageTokenizer
    from unidiff.tokens.text import TextTokenizer

    manifest = TokenManifest.load(str(root / "tokens"))
    vocabulary = Vocabulary.from_dict(json.loads((root / "run" / "model" / "vocabulary.json").read_text()))
    assert vocabulary == Vocabulary.from_dict(manifest.vocabulary)
    pipeline = UniDiffPipeline(
        MaskedTransformer.from_pretrained(root / "run" / "model").float(),
        VQImageTokenizer.from_pretrained(image_folder),
        TextTokenizer.from_pretrained(root / "text"),
        PipelineSettings(vocabulary, manifest.text_length, manifest.grid),
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline.text_to_image("a cat", output_type="pt", generator=[0])
    assert drawn.images.shape == (1, 3, 32, 32) and torch.isfinite(drawn.images).all()
    assert drawn.codes.shape == (1, 4, 4) and drawn.codes.min() >= 0 and drawn.codes.max() < 64
    photograph = photographs()["chelsea"].resize((32, 32))
    described = pipeline.caption(photograph, generator=[0])
    assert isinstance(described.texts[0], str)
    answered = pipeline.answer(photograph, "what is it?", generator=[0])
    assert isinstance(answered.texts[0], str)


def test_shards_of_the_emoji_world_say_their_size(tmp_path):
    from typer.testing import CliRunner

    from unidiff.cli.recipes.emoji import emoji_app
    from unidiff.data.collect import size_of

    result = CliRunner().invoke(emoji_app, ["shards", str(tmp_path / "raw"), "--count", "2"])
    assert result.exit_code == 0, result.output
    assert size_of([str(tmp_path / "raw")]) == (64, 64)
