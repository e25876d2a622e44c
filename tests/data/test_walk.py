"""From a folder of pictures to an adapter, by the commands of the installed package alone, outside of the repository."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.training]
TINY = ["batch_size=8", "threads=1", "data.validation_rows=8", "schedule.warmup=2", "logging.trackers=[]"]


def test_pictures_become_a_model_and_an_adapter(tmp_path):
    data = pytest.importorskip("skimage.data", reason="scikit-image is a dev dependency")
    (tmp_path / "pictures").mkdir()
    for name in ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "rocket"):
        image = Image.fromarray(getattr(data, name)())
        for part in range(8):
            left, top = part % 4 * image.width // 4, part // 4 * image.height // 2
            crop = image.crop((left, top, left + image.width // 4, top + image.height // 2))
            crop.save(tmp_path / "pictures" / f"{name}{part}.png")
            (tmp_path / "pictures" / f"{name}{part}.txt").write_text(f"a part of the {name}\nzweite Zeile")
    (tmp_path / "pictures" / "alone.png").write_bytes((tmp_path / "pictures" / "coins0.png").read_bytes())

    def unidiff(*words: object) -> str:
        command = [sys.executable, "-m", "unidiff", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{words}\n{done.stderr[-3000:]}"
        return done.stdout

    said = unidiff(
        "shards", "pictures", "raw", "--size", "48x32", "--fit", "pad", "--background", "grey", "--first-line"
    )
    assert "64 samples" in said and "1 missing_member" in said
    assert "48 x 32: 64" in unidiff("data", "check", "raw")
    unidiff("tokenizer", "text", "words", "--shards", "raw", "--vocab-size", 300)
    network = [
        "codebook_size=32",
        "encoder_width=16",
        "encoder_depth=1",
        "decoder_widths=[16,8]",
        "decoder_depths=[1,1]",
    ]
    unidiff("tokenizer", "image", "own_tokenizer", "out=codes", "data.shards=[raw]", *(f"model.{w}" for w in network),
            "steps=30", "batch_size=8", "warmup_steps=2", "threads=1")  # fmt: skip
    unidiff("encode", "tokens", "--shards", "raw", "--image-tokenizer", "codes/model", "--text-tokenizer", "words")
    manifest = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    assert manifest["grid"] == [4, 6] and manifest["text_length"] == 16
    sizes = ["hidden_size=32", "num_layers=2", "num_heads=2", "ffn_size=64"]
    unidiff("train", "own", "data.train=tokens", "output=run", "steps=40", *TINY, *(f"model.{word}" for word in sizes),
            "logging.sweep_rows=4", "logging.validate_every=20", "logging.sample_every=20")  # fmt: skip
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    assert "joint NELBO" in page and page.count("data:image/png;base64,") == 2 and (run / "model-best").is_dir()
    trials = json.loads((run / "decoding.json").read_text())
    assert len(trials) == 12 and trials[0]["distance"] == min(trial["distance"] for trial in trials)
    unidiff("generate", "a part of the coins", "--model", "run/pipeline", "--out", "drawn.png")
    assert Image.open(tmp_path / "drawn.png").size == (48, 32)
    assert unidiff("caption", "drawn.png", "--model", "run/pipeline").endswith("\n")
    unidiff("finetune", "run/pipeline", "data.train=tokens", "output=lora", "steps=10", *TINY, "lora.rank=4")
    unidiff("generate", "a part of the coins", "--model", "lora/pipeline", "--out", "tuned.png")
    assert "run" in unidiff("runs", ".") and Image.open(tmp_path / "tuned.png").size == (48, 32)
