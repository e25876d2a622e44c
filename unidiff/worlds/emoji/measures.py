"""What EmojiEval's numbers are called where people read them."""

from __future__ import annotations

from unidiff.evaluation.report import Measure

_WORDS = {
    "oracle_true": "true scenes read exactly by the oracle",
    "oracle_reconstruction": "objects read in the image tokenizer's reconstructions",
    "oracle_reconstruction_scene": "whole scenes read in reconstructions",
    "reconstruction_psnr": "PSNR of reconstructions, dB",
    "sprite_psnr": "PSNR inside sprites, dB",
    "text_to_image": "mean of the six categories",
    "caption_exact": "captions that are right",
    "answer_accuracy": "answers that are right",
    "answer_baseline": "best constant answer for each kind of question",
    "answers.exists": "\u201cis there a \u2026?\u201d",
    "answers.number": "\u201chow many \u2026 are there?\u201d",
    "answers.colour": "\u201cwhat colour is the background?\u201d",
    "answers.what": "\u201cwhat is in the picture?\u201d",
    "answers.related": "\u201cis the \u2026 left of the \u2026?\u201d",
    "answers.where": "\u201cwhere is the \u2026?\u201d",
    "answers.side": "\u201cwhat is at the top?\u201d",
    "inpainting": "picture and caption right, nothing else touched",
    "inpainting_there": "the named object stands in the hole",
    "inpainting_agrees": "caption agrees with the picture",
    "inpainting_untouched": "what was given is unchanged",
    "joint_agreement": "caption agrees with the picture",
    "joint_distinct": "distinct scenes, as a share of the data's",
    "joint_entropy": "entropy of the objects, as a share of the data's",
    "shuffled_composition": "compositions judged by another prompt (a check of the judge)",
    "caption_nelbo": "NELBO of captions given the picture, nats",
    "caption_entropy": "entropy of captions given the picture, nats: the least that is possible",
    "caption_gap": "NELBO of captions above the entropy, nats",
    "caption_nelbo_words": "NELBO of captions without the end-of-text fill, nats",
    "image_nelbo": "NELBO of pictures given the caption, nats",
    "joint_nelbo": "joint NELBO, nats",
    "readers.second_true": "true scenes read exactly by the second reader",
    "readers.same_judgement": "drawings that both readers judge alike",
    "readers.same_scene": "drawings that both readers read alike",
    "readers.contradiction": "drawings that the readers read differently",
    "readers.only_oracle_reads": "drawings that only the oracle can read",
    "readers.only_second_reads": "drawings that only the second reader can read",
    "readers.oracle_right": "drawings right by the oracle, all facts asked for",
    "readers.second_right": "drawings right by the second reader",
}
_LOWER = ("unreadable.", "shuffled_", "readers.contradiction", "readers.only_", "caption_gap")
_NEITHER = ("answer_baseline", "caption_entropy", "joint_distinct", "joint_entropy")
_HEADLINES = ("text_to_image", "caption_exact", "answer_accuracy", "inpainting", "joint_agreement")


def measure_of(task: str, key: str) -> Measure:
    """How the number of this key, which a task found, is shown."""
    group, _, last = key.rpartition(".")
    plain = last.replace("_", " ")
    words = _WORDS.get(key) or (f"{plain}: pictures that cannot be read" if group == "unreadable" else plain)
    better = "lower" if key.startswith(_LOWER) or "nelbo" in key else "" if key in _NEITHER else "higher"
    return Measure(task, words, key in _HEADLINES, better)
