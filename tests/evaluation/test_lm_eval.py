"""lm-evaluation-harness with a unidiff model: its own program, its Python interface, its caches."""

from __future__ import annotations

import json
import math

import pytest
from harness_tasks import one, run_program, samples, write_task
from released_pipelines import write_chat
from tiny_pipeline import SIZE, tiny_pipeline
from torchvision.transforms.functional import to_pil_image

from unidiff.evaluation.harness import TASK_FILE
from unidiff.evaluation.harness.asked import Context
from unidiff.pipeline import UniDiffPipeline

pytest.importorskip("lm_eval")

ROWS = [
    {"asked": "a red", "choices": ["fox", "owls on a hill"], "right": 0},
    {"asked": "two", "choices": ["fox on a hill", "owls"], "right": 1},
    {"asked": "a", "choices": ["red fox", "hill"], "right": 1},
]
TOLD = {"until": ["o"], "max_gen_toks": 8, "do_sample": False}


def metrics(*names):
    return [{"metric": name} for name in names]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of text alone and a task of every kind of request."""
    home = tmp_path_factory.mktemp("home")
    write_chat(home / "llada", "llada")
    common = {"doc_to_text": "{{asked}}", "doc_to_target": "{{right}}"}
    choice = {**common, "doc_to_choice": "{{choices}}", "metric_list": metrics("acc", "acc_norm")}
    told = {**common, "doc_to_target": "{{choices[right]}}", "generation_kwargs": TOLD}
    tasks = [
        write_task(home, "tiny_choice", "multiple_choice", ROWS, **choice),
        write_task(home, "tiny_text", "generate_until", ROWS, **told, metric_list=metrics("exact_match")),
        write_task(
            home,
            "tiny_rolling",
            "loglikelihood_rolling",
            ROWS,
            doc_to_text="",
            doc_to_target="{{asked}} {{choices[right]}}",
            metric_list=metrics("word_perplexity", "bits_per_byte"),
        ),
    ]
    return home, tasks


def the_pipelines_own(pipe, seed, draws):
    """Log-likelihoods, texts and the log-likelihood of whole texts, by direct calls."""
    scores, texts, whole = [], [], []
    for row in ROWS:
        key, count = Context(row["asked"]).seed(seed), len(row["choices"])
        said = [f" {choice}" for choice in row["choices"]]
        found = pipe.score(texts=said, prompt=row["asked"], samples=draws, generator=[key] * count)
        scores.append(found.log_prob.tolist())
        out = pipe.complete(row["asked"], 8, temperature=0.0, generator=[key])
        texts.append(pipe.texts.decode(out.text_ids[0]).split("o")[0])
        line = f"{row['asked']} {row['choices'][row['right']]}"
        whole.append(float(pipe.score(texts=line, samples=draws, generator=[Context(line).seed(seed)]).log_prob))
    return scores, texts, whole


@pytest.mark.slow
@pytest.mark.parametrize("way", ["its own program", "unidiff eval lm-eval"])
def test_the_command_line_gives_what_direct_calls_give(place, way, tmp_path):
    (home, tasks), out = place, tmp_path / "out"
    given = ("--model_args", f"pretrained={home / 'llada'},draws=4,seed=3", "--output_path", out, "--log_samples")
    if way == "its own program":
        start, names = ("lm_eval", "--model", "unidiff"), ",".join(map(str, (TASK_FILE, *tasks)))
        assert run_program(home, "unidiff", "eval", "lm-eval", "--task-file").strip() == str(TASK_FILE)
    else:
        start, names = ("unidiff", "eval", "lm-eval"), ",".join(map(str, tasks))
    shown = run_program(home, *start, *given, "--tasks", names, "--batch_size", 2 if "unidiff" in start else "auto")
    assert "95 % intervals of log-likelihoods" in shown
    scores, texts, whole = the_pipelines_own(UniDiffPipeline.from_pretrained(home / "llada"), 3, 4)
    for sample, own in zip(samples(out, "tiny_choice"), scores, strict=True):
        found = [float(pair[0][0]) for pair in sample["resps"]]
        assert found == pytest.approx(own, abs=1e-4)
    assert [sample["resps"][0][0] for sample in samples(out, "tiny_text")] == texts
    assert [float(s["resps"][0][0]) for s in samples(out, "tiny_rolling")] == pytest.approx(whole, abs=1e-4)
    results = json.loads(one(out, "results_*.json").read_text())
    right = [own.index(max(own)) == row["right"] for own, row in zip(scores, ROWS, strict=True)]
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    lines = [f"{row['asked']} {row['choices'][row['right']]}" for row in ROWS]
    bits = -sum(whole) / math.log(2) / sum(len(line.encode()) for line in lines)
    assert results["results"]["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    config = results["config"]
    assert (
        config["family"] == "llada" and config["seed"] == 3 and config["draws"] == 4 and config["mean_half_width"] > 0
    )


@pytest.mark.slow
def test_chat_templates_few_shot_examples_and_caches_of_answers(place, tmp_path):
    (home, tasks), out = place, tmp_path / "out"
    given = ["--model_args", f"pretrained={home / 'llada'},draws=4,cache=dual,block_length=4", "--batch_size", 2]
    given += ["--tasks", ",".join(map(str, (TASK_FILE, *tasks[:2]))), "--num_fewshot", 1, "--apply_chat_template"]
    given += [
        "--output_path",
        out,
        "--log_samples",
        "--use_cache",
        tmp_path / "answers",
        "--system_instruction",
        "Say it.",
    ]
    run_program(home, "lm_eval", "--model", "unidiff", *given)
    pipe = UniDiffPipeline.from_pretrained(home / "llada")
    for sample in samples(out, "tiny_text"):
        context = sample["arguments"]["gen_args_0"]["arg_0"]
        assert context.startswith("<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nSay it.<|eot_id|>")
        ids, key = pipe.layout.spelled_ids(context), Context(context).seed(0)
        own = pipe.chat([ids], 8, temperature=0.0, generator=[key], cache="dual", block_length=4)
        assert sample["resps"][0][0] == pipe.texts.decode(own.text_ids[0]).split("o")[0]
    assert "Requests remaining: 0" in run_program(home, "lm_eval", "--model", "unidiff", *given)


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_sentence(place):
    home, tasks = place
    shown = run_program(
        home, "unidiff", "eval", "lm-eval", "--model_args", "pretrained=x,drwas=3", "--tasks", tasks[0], fails=True
    )
    assert shown.splitlines()[-1] == "unidiff: --model_args has no 'drwas'; did you mean 'draws'?"


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def test_pictures_are_asked_about(tmp_path):
    import torch

    from unidiff.evaluation.harness.lm_eval import UniDiffLM

    pipe = tiny_pipeline()
    lm = UniDiffLM(pipe, draws=4, batch_size=2)
    assert lm.MULTIMODAL and lm.get_model_info()["family"] == pipe.layout.family
    shown = [to_pil_image(torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(n))) for n in range(2)]
    wish = {"until": ["\n"], "max_gen_toks": 4}
    told = lm.generate_until([request("generate_until", "<image>a dog?", wish, {"visual": [p]}) for p in shown])
    seeds = [Context("a dog?", (p,)).seed(0) for p in shown]
    assert told == pipe.answer(shown, "a dog?", 4, temperature=0.0, generator=seeds).texts
    asked = [request("loglikelihood", "a dog?", " two", {"visual": [p]}) for p in shown]
    values = [value for value, _ in lm.loglikelihood(asked)]
    assert values[0] != values[1] and max(values) < 0
    with pytest.raises(ValueError, match="the task gives audio"):
        lm.generate_until([request("generate_until", "a", wish, {"audio": []})])


def test_arguments_go_before_defaults_of_the_harness(tmp_path):
    from unidiff.evaluation.harness.lm_eval import UniDiffLM

    write_chat(tmp_path, "mdlm")
    defaults = {"batch_size": "1", "max_batch_size": None, "device": "cuda:0"}
    lm = UniDiffLM.create_from_arg_string(f"pretrained={tmp_path},device=cpu,batch_size=3,dtype=bfloat16", defaults)
    assert lm.model.settings.batch_size == 3 and str(lm.device) == "cpu" and not lm.MULTIMODAL
    assert str(next(lm.model.pipe.transformer.parameters()).dtype) == "torch.bfloat16"
    assert "/" not in lm.tokenizer_name
    assert lm.loglikelihood_rolling([request("loglikelihood_rolling", "two owls")])[0] < 0
    with pytest.raises(ValueError, match="mdlm has no chat template here"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="one chat template and none called 'tools'"):
        lm.chat_template("tools")
