"""The page in a browser: everything that a person does, without a look at the clock."""

from __future__ import annotations

import shutil
import socket
import urllib.error
import urllib.request

import pytest
from studio_cases import HOSTILE

from unidiff.worlds.emoji.cases import question_cases
from unidiff.worlds.emoji.demo import picture_of
from unidiff.worlds.emoji.scenes import get_profile

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300_000  # milliseconds; a busy machine is slow, not wrong
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def page_address():
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'unidiff[demo]'")
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.studio.app import build, launch_options
    from unidiff.studio.session import Studio
    from unidiff.world import WORLDS

    pipe = UniDiffPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    studio = Studio(pipe, "emoji")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = build(studio, WORLDS["emoji"].examples(pipe))
    page.launch(**launch_options(port=port), prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}", studio
    page.close()
    studio.worker.close()


@pytest.fixture(scope="module")
def browser():
    play = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install 'unidiff[browser]'")
    if BROWSER is None:
        pytest.skip("no chromium is installed; `make browser` installs it where apt-get may")
    with play.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=QUIET.split())
        yield opened
        opened.close()


@pytest.fixture
def tab(browser, page_address):
    """Opens a page, which asks nobody but the studio."""
    contexts, outside = [], []

    def opened(**options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 1000}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on(
            "request",
            lambda r: outside.append(r.url) if not r.url.startswith((page_address[0], "data:", "blob:")) else None,
        )
        page.goto(page_address[0])
        page.wait_for_selector("#ud-go-text_to_image")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not outside


def test_the_studio_starts_on_a_machine_that_is_slow_to_answer(monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'unidiff[demo]'")
    from unidiff.studio.app import launch_options

    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with gradio.Blocks(analytics_enabled=False) as page:
        gradio.HTML("here")
    page.launch(**launch_options(port=port), prevent_thread_lock=True, quiet=True)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
        assert answer.status == 200
    page.close()


def done(page) -> str:
    """Waits for a result; the words of the page about it."""
    page.wait_for_selector("#ud-files .ud-file")
    return page.inner_text("#ud-stage .ud-words")


def at(page, title: str) -> None:
    page.get_by_role("tab", name=title, exact=True).click()


def test_a_picture_from_words_appears_pass_by_pass_and_back_again(tab):
    page = tab()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => { const s = document.querySelector('#ud-stage .ud-stage');
        if (s && s.dataset.open) window.seen.push([Number(s.dataset.pass), Number(s.dataset.open)]); })
        .observe(document.body, { subtree: true, childList: true, attributes: true }); }"""
    )
    page.fill("#ud-words-text_to_image textarea", "a fox on a green background")
    page.click("#ud-go-text_to_image")
    assert done(page) == "a fox on a green background"
    seen = page.evaluate("window.seen")
    states = sorted({tuple(state) for state in seen})
    assert len(states) >= 3 and states[-1] == (24, 0) and states[0][1] > 0  # intermediate states arrived
    assert page.locator("#ud-stage figure img").count() == 3 and "24" in page.inner_text("#ud-cost")
    assert [link.get_attribute("download") for link in page.locator("#ud-files a").all()] == [
        "result.png", "result.gif", "filmstrip.png",
    ]  # fmt: skip
    page.locator("#ud-pass input[type=number]").fill("3")
    page.locator("#ud-pass input[type=number]").press("Enter")
    page.wait_for_selector('#ud-stage .ud-stage[data-pass="3"]')
    assert "pass 3 of 24" in page.inner_text("#ud-stage")
    page.click("#ud-again-text_to_image")
    page.wait_for_function("document.querySelectorAll('#ud-history .thumbnail-item').length === 2")
    assert page.input_value("#ud-seed input") != "0"


def test_a_brush_and_open_words_are_completed_together(tab, page_address):
    page = tab()
    at(page, "Complete")
    page.locator("#ud-examples-inpaint tbody tr").nth(1).click()
    page.wait_for_function("document.querySelector('#ud-words-inpaint textarea').value.includes('<mask')")
    page.evaluate("window.scrollTo(0, 0)")
    box = page.locator("#ud-picture-inpaint canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y - 90)
    page.mouse.down()
    page.mouse.move(x + 40, y - 90, steps=8)
    page.mouse.up()
    page.click("#ud-go-inpaint")
    words = done(page)
    result = page_address[1].visitors.newest().current
    mask, text = result.arguments["mask_image"], result.arguments["text"]
    white = mask.resize((8, 8)).point(lambda v: 255 * (v > 0))
    assert "<mask" in text and "<mask" not in words and words.startswith(text.partition("<mask")[0].strip())
    assert white.histogram()[255] > 16  # 4 x 4 cells of the example, and those of the stroke
    assert result.done.out.images[0].size == (64, 64) and "mask.png" in page.inner_text("#ud-files")


def test_a_question_about_a_sent_picture(tab, tmp_path):
    page = tab()
    at(page, "Ask")
    profile = get_profile("cpu")
    case = next(case for case in question_cases(8, 7, profile) if case.kind == "colour")
    picture_of(case.scene, profile).save(tmp_path / "scene.png")
    page.locator("#ud-picture-answer input[type=file]").set_input_files(tmp_path / "scene.png")
    page.wait_for_selector("#ud-picture-answer img")
    page.fill("#ud-words-answer textarea", case.question)
    page.click("#ud-go-answer")
    assert done(page) == case.answer


def test_a_run_is_stopped(tab):
    page = tab()
    page.locator("#ud-dial button").first.click()
    page.locator("#ud-steps input[type=number]").fill("64")
    page.locator("#ud-steps input[type=number]").press("Enter")
    page.fill("#ud-words-text_to_image textarea", "a fox on a green background")
    page.click("#ud-go-text_to_image")
    page.wait_for_selector("#ud-stage .ud-stage[data-pass]")
    page.click("#ud-stop")
    done(page)
    assert "stopped after pass" in page.inner_text("#ud-status")
    assert int(page.get_attribute("#ud-stage .ud-stage", "data-pass")) < 64


def test_two_tabs_at_once_keep_their_own(tab):
    words = ["a fox on a green background", "a dog face on a white background"]
    pages = [tab() for _ in words]
    for page, text in zip(pages, words, strict=True):
        page.fill("#ud-words-text_to_image textarea", text)
        page.click("#ud-go-text_to_image")
    assert [done(page) for page in pages] == words
    assert [page.locator("#ud-history .thumbnail-item").count() for page in pages] == [1, 1]


def test_a_closed_tab_frees_its_place(tab, page_address):
    page, studio = tab(), page_address[1]
    before = len(studio.visitors)
    page.fill("#ud-words-text_to_image textarea", "a fox on a green background")
    page.click("#ud-go-text_to_image")
    page.wait_for_selector("#ud-stage .ud-stage[data-pass]")
    assert len(studio.visitors) == before + 1
    page.close()
    other = tab()
    for _ in range(600):
        if len(studio.visitors) <= before:
            break
        other.wait_for_timeout(500)
    assert len(studio.visitors) <= before


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("cut.png", "nothing.png")])
def test_hostile_uploads_are_refused_in_the_page(name, tab, tmp_path):
    page = tab()
    at(page, "Describe")
    make, words = HOSTILE[name]
    file = tmp_path / name
    file.write_bytes(make())
    if name == "large.png":
        with file.open("ab") as more:
            more.truncate(200 * 2**20)
    page.locator("#ud-picture-caption input[type=file]").set_input_files(file)
    said = page.wait_for_selector(".toast-body").inner_text()
    assert words in said or "maximum allowed size of 8.0 Mb" in said or "Invalid file type" in said, said
    assert "Traceback" not in said and page.locator("#ud-picture-caption img").count() == 0


def test_addresses_that_the_studio_does_not_need_are_closed(page_address, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (
        f"file={secret}",
        "file=/etc/passwd",
        "file=pyproject.toml",
        "proxy=http://127.0.0.1/",
        "file=http://127.0.0.1/x",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{page_address[0]}/gradio_api/{path}", timeout=300)
        assert refused.value.code in (403, 404)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_telephone(tab, scheme):
    page = tab(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    for title in ("Draw", "Describe", "Ask", "Complete", "Invent"):
        at(page, title)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, title
