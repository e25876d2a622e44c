"""The kinds of folders that `test_hostile_files` damages: tiny, of random weights, one per format that unidiff reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import muddit_parts
import torch
from diffusers import VQModel
from hostile_cases import Kind
from released_parts import tiny_weights, write_tiny
from released_pipelines import write_chat
from shard_samples import MeanColourTokenizer, write_samples
from tiny_pipeline import tiny_pipeline

from unidiff.data.encode import EncodeSettings, encode_shards
from unidiff.data.report import SkipReport
from unidiff.data.token_set import PAIRS, TokenSet
from unidiff.families.checkpoint.convert import convert, save_shards
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.verify import answer
from unidiff.families.family import FAMILIES
from unidiff.models.trained_on import TrainedOn, read_trained_on
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.conv import ConvVQModel, LFQModel
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.run.checkpoint import RunCheckpoint, load_checkpoint, save_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"
SENTENCE = "a red fox"


# -------------------------------------------------------------------------------------------------- released families


def _released(family: str) -> Kind:
    def load(folder: Path) -> Any:
        found = load_released(folder, vocabulary=FAMILIES[family].tiny.vocabulary)
        state = found.state_dict()
        return answer(found.model if found.images is None else found.images, found.vocabulary), sorted(state)

    return Kind(
        family, lambda folder: _nothing(write_tiny(folder, family)), load, ("config.json",), ("model.safetensors",)
    )


def _nothing(*_: Any) -> None:
    pass


def _sharded() -> Kind:
    def write(folder: Path) -> None:
        write_tiny(folder, "llada")
        (folder / "model.safetensors").unlink()
        save_shards(tiny_weights("llada"), folder, "model", "8KB")

    index = "model.safetensors.index.json"
    return Kind("sharded", write, _released("llada").load, (index,), ("model-00002-of-00004.safetensors",))


def _torch_file(zipped: bool) -> Kind:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(FAMILIES["llada"].tiny.config))
        content = {"model": tiny_weights("llada"), "step": 3}
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    name = "torch file" if zipped else "old torch file"
    return Kind(name, write, _released("llada").load, (), ("pytorch_model.bin",))


def _yaml() -> Kind:
    def write(folder: Path) -> None:
        write_tiny(folder, "unidisc")
        (folder / "config.json").rename(folder / "config.yaml")

    return Kind("yaml", write, _released("unidisc").load, ("config.yaml",), ("config.yaml",))


def _converted(family: str) -> Kind:
    def write(folder: Path) -> None:
        write_tiny(folder.parent / f"{folder.name}-source", family)
        convert(folder.parent / f"{folder.name}-source", folder, vocabulary=FAMILIES[family].tiny.vocabulary)

    blobs = (WEIGHTS, *(("constants.safetensors",) if FAMILIES[family].constants else ()))
    return Kind(f"converted {family}", write, _released(family).load, ("released.json", "config.json"), blobs)


# ------------------------------------------------------------------------------------------------------ whole pipelines


def _pipeline() -> Kind:
    texts = (
        "model_index.json",
        "transformer/config.json",
        "image_tokenizer/config.json",
        "text_tokenizer/tokenizer.json",
        "text_tokenizer/tokenizer_config.json",
    )

    def load(folder: Path) -> Any:
        pipe = UniDiffPipeline.from_pretrained(folder)
        codes = torch.arange(6).reshape(1, 2, 3)
        ids = pipe.texts.encode(SENTENCE)
        model = answer(pipe.transformer, pipe.settings.vocabulary)
        return model, pipe.images.decode(codes), ids, pipe.texts.decode(ids), pipe.settings.to_dict()

    blobs = (f"transformer/{WEIGHTS}", f"image_tokenizer/{WEIGHTS}", "text_tokenizer/tokenizer.json")
    return Kind("pipeline", lambda folder: tiny_pipeline().save_pretrained(folder), load, texts, blobs)


def _chat(family: str) -> Kind:
    def load(folder: Path) -> Any:
        pipe = UniDiffPipeline.from_pretrained(folder)
        model = answer(pipe.transformer, pipe.vocabulary)
        return model, pipe.texts.encode(SENTENCE), pipe.texts.specials()

    def write(folder: Path) -> None:
        write_chat(folder, family)

    texts = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return Kind(f"chat {family}", write, load, texts)


def _muddit() -> Kind:
    texts = ("transformer", "text_encoder", "vqvae")
    tokens = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")

    def load(folder: Path) -> Any:
        pipe = UniDiffPipeline.from_pretrained(folder / "512")
        ids = torch.tensor(pipe.text_tokenizer("a b", padding="max_length", max_length=6).input_ids)[None]
        features, layout = pipe.layout.encoder(ids), pipe.layout
        image = pipe.images.decode(torch.arange(16).reshape(1, 4, 4))
        said = str((layout.config, layout.told, layout.marks))
        return answer(pipe.transformer, layout.vocabulary), features.sequence, features.pooled, image, said

    return Kind(
        "muddit folder",
        lambda folder: muddit_parts.write_folder(folder / "512"),
        load,
        (
            *(f"512/{name}/config.json" for name in texts),
            "512/scheduler/scheduler_config.json",
            *(f"512/{t}" for t in tokens),
        ),
        ("512/text_encoder/model.safetensors", "mask_token_embedding.pth", f"512/vqvae/{WEIGHTS}"),
    )


# -------------------------------------------------------------------------------------------------------------- parts


def _images(name: str, make: Any) -> Kind:
    def load(folder: Path) -> Any:
        tokenizer = VQImageTokenizer.from_pretrained(folder)
        return answer(tokenizer, None), tokenizer.factor, tokenizer.codebook_size

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        make().save_pretrained(folder)

    return Kind(name, write, load, ("config.json",), (WEIGHTS,))


def _denoiser() -> Kind:
    def load(folder: Path) -> Any:
        model = MaskedTransformer.from_pretrained(folder)
        ids = torch.arange(8)[None]
        positions = torch.zeros(1, 8, 3, dtype=torch.long)
        return model.head(model.hidden(ids, torch.zeros_like(ids), positions, None))

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        MaskedTransformer(12, 16, 1, 2, rope="1d", tie_head=True).save_pretrained(folder)

    return Kind("denoiser", write, load, ("config.json",), (WEIGHTS,))


def _text() -> Kind:
    def load(folder: Path) -> Any:
        texts = TextTokenizer.from_pretrained(folder)
        ids = texts.encode(SENTENCE)
        return ids, texts.decode(ids), texts.size, texts.specials()

    def write(folder: Path) -> None:
        TextTokenizer.train(["a red fox on a hill", "two owls"], 280).save_pretrained(folder)

    names = ("tokenizer.json", "tokenizer_config.json")
    return Kind("text tokenizer", write, load, names, names)


# -------------------------------------------------------------------------------------------------- data and training


def _token_shards() -> Kind:
    """Token shards by their list; damage to the tars themselves is counted (`tests/data`), not refused."""

    def write(folder: Path) -> None:
        raw = folder.parent / f"{folder.name}-raw"
        write_samples(raw, 4, 4)
        texts = TextTokenizer.train([f"caption {n} which?" for n in range(50)], 300)
        settings = EncodeSettings(image_size=16, text_length=24, batch_size=4, samples_per_shard=4, workers=0)
        encode_shards(str(raw), MeanColourTokenizer(), texts, folder, settings)

    def load(folder: Path) -> Any:
        account = SkipReport()
        tokens = TokenSet.open(str(folder), 0, account, PAIRS)
        rows = [tokens.draw(number) for number in range(4)]
        return [row.codes for row in rows], [row.caption for row in rows], tokens.layout.layout()

    return Kind("token shards", write, load, ("tokens.json",))


def _checkpoint() -> Kind:
    """A flipped bit or a cut is noticed by the checksums, wherever it is."""

    def write(folder: Path) -> None:
        weights = {"w": torch.arange(64.0).view(8, 8)}
        save_checkpoint(folder, RunCheckpoint(weights, weights, weights, {"step": 1, "samples": 4, "config": {}}), 2)

    def load(folder: Path) -> Any:
        found = load_checkpoint(folder, "config", False, "--fallback")
        return None if found is None else (found.model["w"], found.ema["w"], found.optimiser["w"], found.state)

    step = "step-00000001"
    return Kind("checkpoint", write, load, (f"{step}/state.json",), (f"{step}/model.safetensors", f"{step}/SHA256SUMS"))


def _record() -> Kind:
    def write(folder: Path) -> None:
        folder.mkdir()
        TrainedOn((2, 3), 10, ("text_to_image", "caption")).save(folder)

    return Kind("record of training", write, lambda folder: str(read_trained_on(folder)), ("trained_on.json",))


def _all() -> list[Kind]:
    levels = {
        "encoder_multipliers": (1, 1),
        "encoder_depths": (1, 1),
        "decoder_multipliers": (1, 1),
        "decoder_depths": (1, 1),
    }
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return [
        *map(_released, FAMILIES),
        _sharded(),
        _torch_file(True),
        _torch_file(False),
        _yaml(),
        *map(_converted, ("llada", "mdlm", "magvit")),
        _pipeline(),
        _chat("llada"),
        _chat("dream"),
        _muddit(),
        _images("CellVQModel", lambda: CellVQModel(8, 16, 4, 16, 1, (16,), (1,))),
        _images("ConvVQModel", lambda: ConvVQModel(12, 4, 32, z_channels=8, decoder_channels=32, **levels)),
        _images("LFQModel", lambda: LFQModel(4, 32, decoder_channels=32, **levels)),
        _images(
            "VQModel", lambda: VQModel(block_out_channels=(4, 4), num_vq_embeddings=16, norm_num_groups=2, **blocks)
        ),
        _denoiser(),
        _text(),
        _token_shards(),
        _checkpoint(),
        _record(),
    ]


KINDS = {kind.name: kind for kind in _all()}
