"""CIDEr, BLEU, VQA, POPE, MMMU and perplexity: numbers by hand, the libraries' own direct calls, and every layout."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from unidiff.evaluation.metrics.answers import (
    CONTRACTIONS,
    normalise_answer,
    pope_numbers,
    says_yes,
    vqa_accuracy,
)
from unidiff.evaluation.metrics.captions import bleu
from unidiff.evaluation.metrics.mmmu import chosen_letter, open_is_right
from unidiff.evaluation.metrics.perplexity import LanguageJudge, entropy
from unidiff.evaluation.results.captions import caption_words, paired, read_captions
from unidiff.evaluation.scoring import score_results

LETTERS = "abcdefgh"
MADE = {"1": "A man rides a wave.", "2": "two cats, on a red sofa", "3": "a dog in the snow"}
AGAINST = {
    "1": ["a man riding a wave on a surfboard", "A surfer rides a big wave"],
    "2": ["two cats lying on a sofa", "a pair of cats sleeping on a red couch", "two cats on a red sofa"],
    "3": ["a black dog runs through deep snow", "a dog playing in the snow"],
}


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    results = [{"image_id": int(name), "caption": words} for name, words in MADE.items()]
    notes = [{"image_id": int(name), "id": 0, "caption": words} for name, all_ in AGAINST.items() for words in all_]
    images = [{"id": int(name), "file_name": f"COCO_{name}.jpg"} for name in AGAINST]
    coco = {"images": images, "annotations": notes}
    return write(tmp_path / "made.json", results), write(tmp_path / "against.json", coco)


@pytest.mark.parametrize(
    "text, words",
    [
        ("A man's dog doesn't like the black-and-white cat.", "a man 's dog does n't like the black-and-white cat"),
        (
            "The dogs' bowls aren't here; it's 2.5 feet, 3,000 lbs!",
            "the dogs bowls are n't here it 's 2.5 feet 3,000 lbs",
        ),
        (
            "A man in the U.S. at 5:30 p.m. - “cannot” see (it)",
            "a man in the u.s. at 5:30 p.m. can not see -lrb- it -rrb-",
        ),
        ("two-way street's sign, t-shirt...1980's 80s", "two-way street 's sign t-shirt 1980 's 80s"),
    ],
)  # what COCO's own tokenizer makes of them
def test_words_of_captions(text, words):
    assert " ".join(caption_words(text)) == words


def test_cider_and_bleu_are_the_libraries_own(files):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    pytest.importorskip("sacrebleu")
    from pycocoevalcap.bleu.bleu import Bleu

    words = lambda texts: [" ".join(caption_words(text)) for text in texts]  # noqa: E731
    against, made = {k: words(v) for k, v in AGAINST.items()}, {k: words([v]) for k, v in MADE.items()}
    mean, single = cider.Cider().compute_score(against, made)
    report = score_results("cider", *files)
    assert report.values["cider"] == pytest.approx(100 * mean)
    assert report.intervals["cider"].cases[0] == pytest.approx(100 * single)
    found = score_results("bleu", *files)
    (one, _, _, four), _ = Bleu(4).compute_score(against, made, verbose=0)
    assert found.values["bleu1"] == pytest.approx(100 * one) and found.values["bleu4"] == pytest.approx(100 * four)
    for key in ("bleu1", "bleu4"):
        interval = found.intervals[key]
        assert interval.low <= interval.value <= interval.high and interval.n == 3


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    pairs = {"a": ("a cat sat here", ["a cat sat there", "the cat"])}
    assert bleu(pairs, 1, 10).value == pytest.approx(75.0)  # 3 of 4 words, as long as the nearest reference
    short = {"a": ("a cat", ["a cat sat there"])}
    assert bleu(short, 1, 10).value == pytest.approx(100 * math.exp(1 - 4 / 2))


def test_captions_in_every_layout(files, tmp_path):
    pytest.importorskip("pycocoevalcap")
    made, against = files
    expected = score_results("cider", made, against).values
    lines = [json.dumps({"file_name": f"COCO_{name}.jpg", "text": words}) for name, words in MADE.items()]
    random.Random(0).shuffle(lines)
    (tmp_path / "made.jsonl").write_text("\n".join(lines))
    write(tmp_path / "plain.json", AGAINST)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, texts in AGAINST.items():
        (folder / f"{name}.txt").write_text("\n".join(texts))
    write(tmp_path / "names.json", MADE)
    for one, other in (("made.jsonl", "against.json"), ("names.json", "plain.json"), ("names.json", "texts")):
        assert score_results("cider", tmp_path / one, tmp_path / other).values == expected
    more = {**AGAINST, "9": ["a bus"]}
    report = score_results("cider", tmp_path / "names.json", write(tmp_path / "more.json", more))
    assert report.values == expected and report.about["notes"] == ["3 of the 4 pictures with references have a caption"]
    with pytest.raises(ValueError, match="1 pictures have captions and no references: 2"):
        paired(
            read_captions(tmp_path / "names.json"), read_captions(write(tmp_path / "less.json", {"1": "a", "3": "b"}))
        )


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The Dog.", "dog"),
        ("two cats", "2 cats"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("yes, it is", "yes it is"),
        ("t-shirt", "t shirt"),
        ("black - white", "black white"),
        ("1,000", "1000"),
        ("2.5 ft.", "2.5 ft"),
        ("none", "0"),
        ("twas", "'twas"),
        ("red/white\n", "red white"),
    ],
)
def test_answers_are_normalised_as_the_official_scorer_does(answer, normal):
    assert normalise_answer(answer) == normal


def test_contractions():
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["somebody'd"] == "somebodyd" and len(CONTRACTIONS) == 114


@pytest.mark.parametrize(
    "answer, people, accuracy",
    [
        ("cat", ["cat"] * 10, 1.0),
        ("cat", ["cat"] * 3 + ["dog"] * 7, 0.9),  # 3 times 2/3, 7 times 1
        ("cat", ["cat"] * 2 + ["dog"] * 8, 0.6),  # 2 times 1/3, 8 times 2/3
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("T shirt.", ["t-shirt"] * 5 + ["shirt"] * 5, 1.0),  # marks go where people differ
        ("t-shirt", ["t-shirt"] * 10, 1.0),
        ("T shirt", ["t-shirt"] * 10, 0.0),  # and stay where they agree, as in the official scorer
    ],
)
def test_vqa_accuracy_leaves_each_person_out(answer, people, accuracy):
    assert vqa_accuracy(answer, people) == pytest.approx(accuracy)


def test_vqa_accuracy_with_every_answer_normalised():
    assert vqa_accuracy("Yes.", ["yes"] * 10) == 0 and vqa_accuracy("Yes.", ["yes"] * 10, always=True) == 1


def test_vqa_files(tmp_path):
    people = lambda said: [{"answer": one, "answer_id": i} for i, one in enumerate(said)]  # noqa: E731
    notes = [
        {"question_id": 1, "image_id": 1, "answer_type": "yes/no", "answers": people(["yes"] * 10)},
        {"question_id": 2, "image_id": 1, "answer_type": "other", "answers": people(["cat"] * 3 + ["dog"] * 7)},
        {"question_id": 3, "image_id": 2, "answer_type": "number", "answers": people(["2"] * 10)},
    ]
    against = write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    run = tmp_path / "run" / "scorer"
    run.mkdir(parents=True)
    answers = [
        {"question_id": 2, "answer": "A cat."},
        {"question_id": 1, "answer": "yes"},
        {"question_id": 3, "answer": "three"},
    ]
    write(run / "v2_x_unidiff_results.json", answers)
    report = score_results("vqa", tmp_path / "run", against)
    assert report.values["vqa_accuracy"] == pytest.approx(1.9 / 3)
    assert report.values["vqa_answer_type.yes_no"] == 1 and report.values["vqa_answer_type.number"] == 0
    part = score_results("vqa", write(tmp_path / "part.json", answers[:2]), against)
    assert part.about["notes"] == ["2 of the 3 questions of the annotations are answered"]
    for bad, sentence in (
        ([{"question_id": 7, "answer": "a"}], "not in the annotations: 7"),
        ([*answers, answers[0]], "answered twice"),
        ([{"question_id": "1", "answer": "a"}], "no 'question_id' of kind int"),
        ([], "is empty"),
    ):
        with pytest.raises(ValueError, match=sentence):
            score_results("vqa", write(tmp_path / "bad.json", bad), against)


@pytest.mark.parametrize(
    "answer, yes",
    [("Yes.", True), ("No, there is none", False), ("There is not a dog.", False), ("no", False), ("nothing", True),
     ("Yes, a dog. No cat.", True), ("NO", True)],
)  # fmt: skip
def test_pope_reads_as_its_scorer_does(answer, yes):
    assert says_yes(answer) is yes


def test_pope_by_hand(tmp_path):
    said, true = [True] * 6 + [False] * 4, [True] * 4 + [False] * 2 + [True] * 1 + [False] * 3
    found = pope_numbers(said, true, 500)
    assert found["pope_accuracy"].value == 0.7 and found["pope_yes"].value == 0.6
    assert found["pope_precision"].value == pytest.approx(4 / 6) and found["pope_precision"].n == 6
    assert found["pope_recall"].value == pytest.approx(4 / 5)
    assert found["pope_f1"].value == pytest.approx(8 / 11) and found["pope_f1"].low < 8 / 11 < found["pope_f1"].high
    lines = lambda rows: "\n".join(map(json.dumps, rows))  # noqa: E731
    asked = [
        {"question_id": i, "image": "x.jpg", "text": f"q{i}", "label": "yes" if t else "no"} for i, t in enumerate(true)
    ]
    answers = [{"question": f"q{i}", "answer": "yes" if s else "no."} for i, s in enumerate(said)]
    (tmp_path / "coco_pope_random.json").write_text(lines(asked))
    (tmp_path / "answers.jsonl").write_text(lines(answers))
    report = score_results("pope", tmp_path, tmp_path / "coco_pope_random.json", resamples=500)
    assert report.values == {key: e.value for key, e in found.items()}
    (tmp_path / "answers.jsonl").write_text(lines(answers[::-1]))
    with pytest.raises(ValueError, match="answer 1 is to another question"):
        score_results("pope", tmp_path, tmp_path / "coco_pope_random.json")
    with pytest.raises(ValueError, match="no answer is yes"):
        pope_numbers([False, False], [True, False])


@pytest.mark.parametrize(
    "response, letter",
    [("B", "B"), ("(A) or (C)", "C"), ("The answer is B.", "B"), ("A dog", "A"), ("it is surely a red car in there", "B"),
     ("a red car", None), ("", None), ("B A", "A"), ("(B) but A", "B")],
)  # fmt: skip
def test_mmmu_letters(response, letter):
    options = {"A": "a blue bus", "B": "a red car", "C": "nothing"}
    assert chosen_letter(response, list(options), options) == letter


@pytest.mark.parametrize(
    "response, answer, right",
    [("The answer is 12.50", "12.5", True), ("x = 1,000", "1000", True), ("So it is a Dog.", ["dog", "cat"], True),
     ("dogs", "dog", True), ("the value is xy", "x", False), ("the value is x", "x", True), ("It could be 3 or 4", "4", True), ("2e3", "2000", True)],
)  # fmt: skip
def test_mmmu_open_answers(response, answer, right):
    assert open_is_right(response, answer) is right


def test_mmmu_folder(tmp_path):
    choices = {"all_choices": ["A", "B", "C", "D"], "index2ans": dict(zip("ABCD", "wxyz", strict=True))}

    def row(number: int, **more: object) -> dict:
        return {
            "id": f"validation_Art_{number}",
            "question_type": "multiple-choice",
            **choices,
            **more,
        }

    rows = [row(1, answer="B", response="B"), row(2, answer="A", response="(C)"), row(3, answer="A", response="what?")]
    free = {"question_type": "short-answer", "all_choices": [], "index2ans": {}, "answer": "7", "response": "it is 7"}
    (tmp_path / "scorer" / "Art").mkdir(parents=True)
    (tmp_path / "scorer" / "Math").mkdir()
    write(tmp_path / "scorer" / "Art" / "output.json", rows)
    write(tmp_path / "scorer" / "Math" / "output.json", [{**row(4), **free}])
    report = score_results("mmmu", tmp_path)
    assert report.values["mmmu_accuracy"] == pytest.approx((1 + 0 + 0.25 + 1) / 4)
    assert report.values["mmmu_category.Math"] == 1 and report.about["unread"] == 1
    write(tmp_path / "scorer" / "Math" / "output.json", [{**row(4), **free, "answer": "?"}])
    with pytest.raises(ValueError, match="has no right answer in its file"):
        score_results("mmmu", tmp_path)


def judge_folder(folder: Path) -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "<|end|>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=12, initializer_range=1.0
    )
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder)
    return folder


def test_perplexity_is_transformers_own_and_comes_with_entropy(tmp_path):
    import transformers

    folder = judge_folder(tmp_path / "judge")
    texts = ["a b c d", "a a a a a a", "h", "e f g a b c d e f g h a b c d"]
    (tmp_path / "made.txt").write_text("\n".join(texts))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    nll = tokens = 0.0
    for text in texts:  # the library's own loss, one text at a time
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"][:11]]])
        with torch.no_grad():
            nll += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    reports = [score_results("perplexity", tmp_path / "made.txt", None, folder, batch_size=size) for size in (1, 3, 8)]
    for report in reports:
        assert report.values["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert report.values["entropy"] == pytest.approx((math.log(4) + 0 + 0 + entropy(list("efgabcdefgh"))) / 4)
        assert report.about["tokens"] == tokens and "1 texts are longer than the 12 tokens" in report.about["notes"][0]
        interval = report.intervals["perplexity"]
        assert interval.low <= interval.value <= interval.high
    assert entropy(list("aabb")) == pytest.approx(math.log(2)) and entropy(list("aaaa")) == 0
    with pytest.raises(ValueError, match="text 0 has no words"):
        LanguageJudge(folder).judge([""])
    with pytest.raises(FileNotFoundError, match="no folder of a causal language model"):
        score_results("perplexity", tmp_path / "made.txt", None, tmp_path)


def test_clipscore_is_torchmetrics_own(tmp_path):
    pytest.importorskip("torchmetrics", minversion="1.8")  # takes a model that is loaded
    import numpy as np
    from PIL import Image
    from torchmetrics.multimodal.clip_score import CLIPScore

    model, processor = clip_folder(tmp_path / "clip")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng, words = np.random.default_rng(0), ["a b", "c d e", "f", "a b c d e f g h a b c d e f g h"]
    for number, text in enumerate(words):
        Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(text)
    report = score_results("clipscore", pictures, None, str(tmp_path / "clip"))
    for number, text in enumerate(words[:3]):  # the last one is cut, of which the library only warns
        direct = CLIPScore(model_name_or_path=lambda: (PlainFeatures(model), processor))
        pixels = torch.from_numpy(np.array(Image.open(pictures / f"{number}.png"))).movedim(-1, 0)
        assert report.intervals["clipscore"].cases[0][number] == pytest.approx(direct(pixels, text).item(), abs=1e-3)
    assert report.about["captions_cut"] == 1 and "were cut" in report.about["notes"][0]
    one = score_results("clipscore", pictures, None, str(tmp_path / "clip"), batch_size=1)
    assert one.values["clipscore"] == pytest.approx(report.values["clipscore"], abs=1e-4)
    lines = [json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(words)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    again = score_results("clipscore", pictures, tmp_path / "metadata.jsonl", str(tmp_path / "clip"))
    assert again.values == report.values
    (pictures / "2.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 pictures have no caption: 2\.png"):
        score_results("clipscore", pictures, None, str(tmp_path / "clip"))


class PlainFeatures(torch.nn.Module):
    """torchmetrics expects tensors, where newer versions of transformers return objects."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(ids, mask).pooler_output


def clip_folder(folder: Path) -> tuple[object, object]:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[UNK]", "<s>", "</s>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).eval()
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), fast)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
