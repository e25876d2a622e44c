"""Runs: what is seen on the way, stopping, leaving, several people at once, and code that makes the same again."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from studio_cases import events, png, shown
from tiny_pipeline import tiny_pipeline

from unidiff.studio import views
from unidiff.studio.runs import EVERY, Failed, Finished, Moment, Run, Worker
from unidiff.studio.session import Form, Studio, sentence
from unidiff.studio.uploads import Sent
from unidiff.studio.visitors import MOST_RECORDS, Visitors


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def studio(pipe):
    made = Studio(pipe, "model")
    yield made
    made.worker.close()


def finished(run: Run) -> Finished:
    run.decode()
    last = list(run.events())[-1]
    assert isinstance(last, Finished), last
    return last


def test_moments_are_the_trajectory_and_the_result_is_the_same_as_without_watching(pipe):
    asked = {"prompt": "a dog", "steps": 4, "generator": 3}
    done = finished(Run(pipe, "text_to_image", asked))
    plain = pipe.text_to_image(**asked, record_trajectory=True)
    assert done.out.ids.equal(plain.ids) and len(done.moments) == len(plain.trajectory.ids)
    for moment, ids, frame in zip(done.moments, plain.trajectory.ids, plain.trajectory.frames, strict=True):
        hidden = ids[0] == pipe.vocabulary.mask_of(1)
        assert moment.open.equal(hidden & moment.targets) and (moment.frame == frame[0].numpy()).all()
        assert moment.ids[~moment.open].equal(ids[0][~moment.open])
    assert not done.moments[0].recomputed.any() and done.moments[1].recomputed.sum() == 16  # whole rows without a cache
    assert done.moments[-1].confidence.equal(plain.confidences[0]) and not done.moments[-1].open.any()


def test_what_the_cache_computed_is_shown(pipe):
    asked = {"prompt": "a dog", "steps": 4, "generator": 3, "cache": "interval"}
    done = finished(Run(pipe, "text_to_image", asked))
    counts = [int(moment.recomputed.sum()) for moment in done.moments]
    assert counts[1] == 16 and 0 < min(counts[2:]) < 16
    fresh, heat = views.recomputed_map(done.moments[2]), views.confidence_map(done.moments[2])
    assert fresh is not None and heat is not None and fresh.size == heat.size == (3, 2)


def test_of_several_candidates_the_way_of_the_best_is_kept(pipe):
    for seed in range(6):
        done = finished(Run(pipe, "text_to_image", {"prompt": "a dog", "num_candidates": 4, "generator": seed}))
        assert done.count == 4 and done.moments[-1].ids.equal(done.out.ids[0])


def test_a_first_moment_comes_with_the_first_pass_and_others_seldom(pipe):
    run = Run(pipe, "text_to_image", {"prompt": "a dog", "steps": 6, "generator": 0})
    run.decode()
    seen = []
    while not run.news.empty():
        seen.append(run.news.get())
    assert isinstance(seen[0], Moment) and seen[0].number == 1 and seen[0].frame is not None
    assert isinstance(seen[-1], Finished) and EVERY > 0


def slowly(pipe, gate: threading.Event, from_pass: int = 1):
    """The pipeline waits for `gate` in every pass from one on."""
    passes = []
    hidden = pipe.transformer.hidden

    def wait(*args, **more):
        passes.append(None)
        if len(passes) > from_pass:
            assert gate.wait(60)
        return hidden(*args, **more)

    pipe.transformer.hidden = wait
    return passes


def test_a_stopped_run_fills_the_rest_in_one_pass_and_its_code_does_the_same(pipe, studio, tmp_path, monkeypatch):
    gate = threading.Event()
    slowly(pipe, gate)
    news = shown(studio, "text_to_image", Form("a dog", steps=6, seed=5))
    for state in news:
        if state.number == 1:
            break
    studio.stop("ann")
    gate.set()
    last = list(news)[-1]
    assert last.record.done.stopped is not None and last.last == last.record.done.stopped + 1 < 6
    assert "stopped after pass" in last.status and not last.record.done.moments[-1].open.any()
    assert run_code(last.code, pipe, tmp_path, monkeypatch, {}).ids.equal(last.record.done.out.ids)


def run_code(code: str, pipe, folder, monkeypatch, files: dict[str, bytes]):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setattr("unidiff.UniDiffPipeline.from_pretrained", lambda name: pipe)
        names: dict = {}
        exec(compile(code, "snippet", "exec"), names)
    return names["out"]


@pytest.mark.parametrize("task", ["text_to_image", "caption", "answer", "inpaint", "generate"])
def test_the_code_makes_the_same_result(task, pipe, studio, tmp_path, monkeypatch, capsys):
    layer = Image.new("RGBA", (72, 48))
    layer.paste("red", (0, 0, 40, 30))
    file = tmp_path / "layer.png"
    layer.save(file)
    words = {"text_to_image": "a dog", "answer": "what is it?", "inpaint": "a <mask> on red", "generate": ""}.get(task)
    sent = (
        Sent(png((72, 48), "blue"), (file.read_bytes(),) if task == "inpaint" else ())
        if task in ("caption", "answer", "inpaint")
        else Sent()
    )
    last = events(studio, task, Form(words, sent, steps=3, cache="auto", seed=11))[-1]
    result = last.record
    assert result is not None, last.status
    files = {name: data for name, data in result.files().items() if name in ("picture.png", "mask.png")}
    out = run_code(result.code, pipe, tmp_path, monkeypatch, files)
    assert out.ids.equal(result.done.out.ids) and out.texts == result.done.out.texts
    assert capsys.readouterr().out.strip() == out.texts[0]
    assert ("picture.png" in result.code) == (task in ("caption", "answer", "inpaint"))
    made = result.files()
    assert made["result.gif"][:4] == b"GIF8" and made["result.png"][:4] == made["filmstrip.png"][:4] == b"\x89PNG"


def test_people_at_once_get_their_own_results(pipe, studio):
    words = {f"person {i}": "a dog" if i % 2 else "two cats" for i in range(6)}
    found: dict = {}

    def ask(name: str, text: str, seed: int) -> None:
        found[name] = events(studio, "text_to_image", Form(text, seed=seed, steps=3), name)[-1].record

    threads = [threading.Thread(target=ask, args=(n, t, i)) for i, (n, t) in enumerate(words.items())]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    for seed, (name, text) in enumerate(words.items()):
        alone = pipe.text_to_image(text, generator=seed, steps=3)
        assert found[name].done.out.ids.equal(alone.ids) and found[name].done.out.texts == [text]
        assert studio.visitors.of(name).records == [found[name]]
    assert studio.show("nobody", 1).stage is None


def test_who_leaves_frees_the_place_and_a_full_line_is_refused(pipe):
    studio, gate = Studio(pipe, "model", worker=Worker(most=2)), threading.Event()
    passes = slowly(pipe, gate, from_pass=0)
    first = shown(studio, "text_to_image", Form("a dog", steps=6), "first")
    next(first)
    while not passes:  # it works, and waits for the gate
        time.sleep(0.01)
    waiting = [shown(studio, "text_to_image", Form("a dog"), f"waiting {i}") for i in range(2)]
    said = [next(one).status for one in waiting]
    assert "one run is before yours" in said[0] and "2 runs are before yours" in said[1]
    refused = events(studio, "text_to_image", Form("a dog"), "late")
    assert "2 people are waiting already" in refused[-1].status and not refused[-1].busy
    waiting[0].close()  # as gradio does when a page is closed
    late = shown(studio, "text_to_image", Form("two cats", steps=2), "late")
    assert "before yours" in next(late).status
    studio.visitors.forget("first")  # the page of a running one is closed: it ends with its pass
    first.close()
    gate.set()
    assert list(late)[-1].record.done.out.texts == ["two cats"]
    assert list(waiting[1])[-1].record is not None
    assert len(passes) <= 1 + 2 * 24 + 2 * 4
    studio.worker.close()


def test_a_new_run_of_the_same_page_ends_the_one_before(pipe, studio):
    gate = threading.Event()
    passes = slowly(pipe, gate, from_pass=0)
    first = shown(studio, "text_to_image", Form("a dog", steps=6))
    next(first)
    while not passes:
        time.sleep(0.01)
    second = shown(studio, "text_to_image", Form("two cats", steps=6))
    next(second)
    gate.set()
    assert list(second)[-1].record.done.out.texts == ["two cats"]
    assert [result.done.out.texts for result in studio.visitors.of("ann").records] == [["two cats"]]


def test_a_run_that_waits_can_be_stopped(pipe, studio):
    gate = threading.Event()
    passes = slowly(pipe, gate, from_pass=0)
    first = shown(studio, "text_to_image", Form("a dog"), "first")
    next(first)
    while not passes:
        time.sleep(0.01)
    second = shown(studio, "text_to_image", Form("a dog"))
    next(second)
    studio.stop("ann")
    assert "stopped before it began" in list(second)[-1].status
    gate.set()
    assert list(first)[-1].record is not None


def test_errors_are_one_sentence_and_faults_of_ours_go_to_the_log(pipe, studio, capfd):
    last = events(studio, "text_to_image", Form("a <mask> dog"))[-1]
    assert 'role="alert"' in last.status and "holes are not filled there" in last.status and not last.busy

    def broken(*args, **more):
        raise KeyError("secret/path")

    pipe.transformer.hidden = broken
    last = events(studio, "text_to_image", Form("a dog"))[-1]
    assert "something went wrong in unidiff itself" in last.status and "secret" not in last.status + str(last)
    assert "secret/path" in capfd.readouterr().err
    assert "Traceback" not in sentence(ValueError("a\nb")) and sentence(ValueError("a\nb")) == "a b"
    run = Run(pipe, "text_to_image", {"prompt": "a dog"})
    run.decode()
    assert isinstance(list(run.events())[-1], Failed)

    def panics(*args, **more):  # as libraries in Rust do
        raise BaseException("a limit is over")

    pipe.transformer.hidden = panics
    last = events(studio, "text_to_image", Form("a dog"))[-1]
    assert "something went wrong in unidiff itself" in last.status and not last.busy


def test_words_are_escaped_everywhere(studio):
    last = events(studio, "text_to_image", Form("<b>&<i>", steps=1))[-1]
    page = "".join(filter(None, (last.stage, last.status, last.cost)))
    assert "<b>" not in page.replace("<b>1</b>", "").replace("<b>2</b>", "") or "&lt;b&gt;" in page
    assert "<i>" not in page


def test_unknown_words_are_noted(pipe):
    pipe.texts.known_words = {"a", "dog"}
    studio = Studio(pipe, "model")
    assert "does not know the word &#x27;zebra&#x27;" in events(studio, "text_to_image", Form("a zebra"))[-1].status
    studio.worker.close()


def test_stepping_back_and_earlier_results(studio):
    for seed in range(3):
        events(studio, "text_to_image", Form("a dog", seed=seed, steps=3))
    assert 'data-pass="1"' in studio.show("ann", 1.0).stage
    assert 'data-pass="3"' in studio.show("ann", 99).stage and 'data-pass="0"' in studio.show("ann", -5).stage
    recalled = studio.recall("ann", 2)
    assert recalled.record is studio.visitors.of("ann").records[2] and "generator=0" in recalled.code
    assert studio.visitors.of("ann").current is recalled.record
    for number in (-1, 3, 10**9):
        assert "gone" in studio.recall("ann", number).status
    assert len(studio.files("ann")) > 100 and studio.files("bob") == ""


def test_what_is_kept_is_bounded(studio, monkeypatch):
    result = events(studio, "text_to_image", Form("a dog", steps=2))[-1].record
    visitor = studio.visitors.of("ann")
    for _ in range(MOST_RECORDS + 5):
        visitor.keep(replace(result))
    assert len(visitor.records) == MOST_RECORDS
    monkeypatch.setattr("unidiff.studio.visitors.MOST_MEMORY", result.memory * 3)
    visitor.keep(replace(result))
    assert len(visitor.records) == 3
    visitors = Visitors(most=2)
    run = Run(studio.pipe, "caption", {})
    visitors.of("a").begins(run)
    visitors.of("b"), visitors.of("a"), visitors.of("c")
    assert len(visitors) == 2 and not run.left
    visitors.of("d")
    assert run.left and len(visitors) == 2


def test_a_character_of_several_tokens_is_shown_whole(pipe):
    done = finished(Run(pipe, "text_to_image", {"prompt": "a 🦄 cat", "generator": 1, "steps": 2}))
    shown = views.pieces(pipe, done.moments[-1])
    assert "".join(piece.text for piece in shown).strip() == done.out.texts[0] == "a 🦄 cat"
    moment = done.moments[-1]
    last = next(
        p
        for p in moment.words.nonzero()[:, 0].tolist()
        if pipe.texts.decode([int(moment.ids[p]) - pipe.vocabulary.text[0]]).endswith("\ufffd")
    )
    opened = moment.open.clone()
    opened[last + 1] = True
    cut = views.pieces(pipe, replace(moment, open=opened))
    assert [piece.open for piece in cut].count(True) == 1 and any(piece.text.endswith("\ufffd") for piece in cut)


def test_pieces_of_a_text(pipe):
    done = finished(Run(pipe, "generate", {"text": "a <mask:2> red", "generator": 1, "steps": 2}))
    for number, moment in enumerate(done.moments):
        shown = views.pieces(pipe, moment, done.moments[number - 1] if number else None)
        assert sum(piece.open for piece in shown) == int((moment.open & moment.words).sum())
    assert "".join(piece.text for piece in shown).strip() == done.out.texts[0]
    assert {piece.confidence is None for piece in shown} == {True, False}
    assert torch.is_tensor(done.moments[0].words)
