"""Train a finished model on, whole or through low-rank adapters, and save it as a pipeline again.

    python training/finetune.py MODEL [CONFIG.yaml] data.train=TOKENS output=FOLDER [lora.rank=16] [key=value ...]

MODEL is a pipeline folder, `emoji`, a hub name, or a folder with a transformer alone. Its architecture and tokenizers are
taken over; settings are those of training/pretrain.py. Run the same command again to continue from the newest checkpoint.
The averaged weights, adapters folded in, land in OUTPUT/model, and with the model's tokenizers in OUTPUT/pipeline.
Works under torchrun like training/pretrain.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from unidiff.train.config import TrainConfig, read_config
from unidiff.train.run.startup import asks_for_help, exit_status, set_up_process, train

set_up_process(os.environ)


def main(arguments: list[str]) -> int:
    if asks_for_help(arguments, __doc__):
        return 0 if arguments else 2
    name, *rest = arguments
    path = rest.pop(0) if rest and "=" not in rest[0] else None
    return exit_status(lambda: finetune(name, read_config(path, rest)))


def finetune(name: str, config: TrainConfig) -> int:
    from unidiff.hub import locate
    from unidiff.pipelines.folder import check_target, load_tokenizers, read_index
    from unidiff.pipelines.settings import PipelineSettings
    from unidiff.train.finetune import check_vocabulary, finetune_config, open_base

    base = open_base(locate(name))
    config = finetune_config(base, config)
    settings, tokenizers = None, None
    if base.pipeline:  # all that can be wrong with it is said before hours of training
        settings = PipelineSettings.from_dict(read_index(base.folder).get("settings") or {})
        check_target(Path(config.output) / "pipeline")
        tokenizers = load_tokenizers(base.folder)

    def finish() -> None:
        if settings and tokenizers:
            save_pipeline(settings, tokenizers, Path(config.output), config.checkpoint.export_dtype)

    vocabulary = settings.vocabulary if settings else None
    return train(config, os.environ, lambda source: check_vocabulary(base, source, vocabulary), finish)


def save_pipeline(settings, tokenizers, output: Path, dtype: str) -> None:
    """OUTPUT/pipeline: the tokenizers and settings of a pipeline with the weights of OUTPUT/model.

    `unidiff eval emoji --model OUTPUT/pipeline` scores it where it draws emoji scenes.
    """
    from dataclasses import replace

    import torch

    from unidiff.pipeline import UniDiffPipeline
    from unidiff.pipelines.folder import load_transformer
    from unidiff.pipelines.options import DecodeOptions
    from unidiff.pipelines.pack import settings_after

    transformer = load_transformer(output / "model", getattr(torch, dtype))
    settings = settings_after(settings, output / "model")
    if transformer.config.attention == "block_causal":  # decoded block after block, as it was trained
        blocks = DecodeOptions(block_length=transformer.config.block_length)
        samplers = {task: blocks.apply(sampler) for task, sampler in settings.samplers.items()}
        settings = replace(settings, samplers=samplers)
    images, texts = tokenizers
    pipeline = UniDiffPipeline(transformer, images, texts, settings)
    pipeline.save_pretrained(output / "pipeline")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
