"""The pages, the README and the site: links lead somewhere, code runs and prints what the page says, names exist."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from doc_code import DOCS, Block, blocks, run

from unidiff.decoding.cache.config import CACHES

ROOT = DOCS.parent
PAGES = sorted(path for path in DOCS.rglob("*.md"))
MARKDOWN = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
README = "../README.md"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    """Anchors of headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_relative_to(DOCS) or page.parent == ROOT, f"{page.name}: the site has no {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {path.name} has no heading {anchor}"


def test_the_site_lists_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
    settings = yaml.safe_load(text)
    assert settings["theme"]["font"] is False and "site_url" not in settings


def test_nobody_is_sent_to_the_package_of_the_same_name():
    """PyPI's `unidiff` parses diffs; extras of an installed unidiff are fine."""
    for page in MARKDOWN:
        for line in page.read_text(encoding="utf-8").splitlines():
            bare = re.search(r"pip install '?unidiff(?![\[-])|^\s*unidiff\[[\w,-]+\]\s*$", line)
            assert not bare, f"{page.name}: {line}"


def printed(block: Block, name: str) -> str | None:
    """The text block that follows a block at once: what it prints."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    end = block.line + block.text.count("\n")  # the closing fence
    following = [line for line in lines[end + 1 : end + 3] if line]
    if not following or following[0] != "```text":
        return None
    start = lines.index("```text", end)
    return "\n".join(lines[start + 1 : lines.index("```", start)]) + "\n"


@pytest.mark.parametrize("name", ["concepts/objective.md", "concepts/passes.md"])
def test_concepts_print_what_they_say(name, capsys):
    space: dict = {}
    checked = 0
    for block in blocks(name):
        run(block, name, space)
        said = capsys.readouterr().out
        if (expected := printed(block, name)) is not None:
            assert said == expected, f"{name}, line {block.line}"
            checked += 1
    assert checked >= 3 and checked == sum(b.language == "text" for b in blocks(name, "text"))


@pytest.mark.golden
def test_the_toy_of_the_page_is_the_stored_one(capsys):
    """The joint, the NELBO of both forms and the variances, against an independent computation in exact fractions."""
    from golden import golden_root
    from toy_table import ToyExample

    path = golden_root() / "toy_exact" / "two_tokens" / "toy_exact.json"
    if not path.is_file():
        pytest.skip("golden set toy_exact is absent")
    toy, space = ToyExample.load(path), {}
    for block in blocks("concepts/objective.md"):
        run(block, "concepts/objective.md", space)
    assert {x: str(p) for x, p in space["P"].items()} == toy.data["joint"]
    for x, stored in toy.data["exact"]["per_x0"].items():
        for form in ("hidden_form", "visible_form"):
            assert space["integral"](space[form], x) == pytest.approx(stored["nelbo"], abs=1e-8)


def test_start_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in blocks("index.md"):
        run(block, "index.md", space)
    assert (tmp_path / "fox.png").is_file() and (tmp_path / "joint.gif").is_file()
    assert "owl" in capsys.readouterr().out


def test_the_readme_is_short_and_its_pictures_small():
    assert len(TEXT.split()) < 700
    before_code = TEXT[: TEXT.index("```")]
    assert re.search(r"!\[[^\]]{20,}\]\(docs/assets/demo\.png\)", before_code)
    pictures = {name: (ROOT / name).stat().st_size for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT)}
    assert pictures["docs/assets/demo.png"] < 400_000 and pictures["docs/assets/joint.gif"] < 300_000
    for path in (DOCS / "assets").glob("*.gif"):
        assert path.stat().st_size < 300_000, path.name


def test_the_badges_are_true():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = {"python": project["requires-python"], "licence": project["license"], "typing": "typed"}
    said["pytorch"] = next(entry for entry in project["dependencies"] if entry.startswith("torch>=")).removeprefix(
        "torch"
    )
    shown = re.findall(r"!\[([^\]]+)\]\(docs/assets/badge-(\w+)\.svg\)", TEXT)
    assert {name for _, name in shown} == set(said)
    for alt, name in shown:
        value = said[name].removeprefix(">=") + ("+" if said[name].startswith(">=") else "")
        picture = (DOCS / "assets" / f"badge-{name}.svg").read_text(encoding="utf-8")
        assert f">{value}<" in picture and value.lower() in alt.lower(), name
    assert "Typing :: Typed" in project["classifiers"] and (ROOT / "unidiff" / "py.typed").is_file()
    assert not re.search(r"!\[[^\]]*\]\(http", TEXT)  # nothing that another server draws


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in blocks(README):
        run(block, README, space)
    said = capsys.readouterr().out.splitlines()
    assert "owl" in said[0] and "cactus" in said[0] and said[1] == "['owl', 'yellow']"
    assert said[2].startswith("an owl to the left of ") and len(said) == 3
    assert (tmp_path / "owl.png").is_file() and (tmp_path / "joint.gif").is_file()


def test_the_readme_counts_right():
    assert (
        f"{['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine'][len(CACHES) - 1]}, by name"
        in TEXT
    )
    for target in ("demo", "test", "docs"):
        assert f"make {target}" in TEXT and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def commands(name: str) -> list[str]:
    text = "".join(block.text for block in blocks(name, "bash"))
    return [
        line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("unidiff ")
    ]


@pytest.mark.slow
def test_the_training_of_the_readme_runs(tmp_path):
    """With fewer pictures and steps."""
    smaller = (
        ("--count 1000", "--count 600"),
        ("steps=200", "steps=4 warmup_steps=1"),
        ("steps=300", "steps=4 data.validation_rows=16"),
    )
    ran = []
    for line in commands(README):
        for old, new in smaller:
            line = line.replace(old, new)
        words = [sys.executable, "-m", "unidiff", *shlex.split(line)[1:]]
        subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=900)
        ran.append(line)
    assert len(ran) == 6 and (tmp_path / "fox.png").is_file()


REFERENCE = [
    (page.stem, name)
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
]


def resolve(name: str) -> object:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def documented(text: str) -> list[str]:
    """Names before a colon, of the lines at the depth of the section's first one."""
    found = []
    for section in re.findall(
        r"^ *Args:\n((?:(?: +.*)?\n)+?)(?=\n? *[A-Z][a-z]+:\n|\Z)", inspect.cleandoc(text) + "\n", re.M
    ):
        depth = len(section) - len(section.lstrip())
        for line in section.splitlines():
            if named := re.match(rf" {{{depth}}}([a-z_]\w*(?:, [a-z_]\w*)*): ", line):
                found += named[1].split(", ")
    return found


@pytest.mark.parametrize(("page", "name"), REFERENCE, ids=[name for _, name in REFERENCE])
def test_the_reference_describes_what_is_there(page, name):
    """The object exists, has a docstring, and every argument that docstrings describe is one."""
    thing = resolve(name)
    assert inspect.getdoc(thing), name
    things = [thing]
    if inspect.isclass(thing):
        things += [value for key, value in vars(thing).items() if not key.startswith("_") and inspect.isfunction(value)]
    for one in things:
        described = documented(one.__doc__ or "")
        if described:
            taken = set(inspect.signature(one).parameters)
            assert set(described) <= taken | {"options", "inputs"}, (
                f"{getattr(one, '__qualname__', one)}: {set(described) - taken}"
            )


class Loaded(HTMLParser):
    """Addresses that a browser would load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        for name in ("src", "srcset", "poster", "data"):
            self.found.append(values.get(name) or "")
        if tag == "link":
            self.found.append(values.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("material", "mkdocstrings_handlers", "latex2mathml"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # what the theme says of other versions
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [a for a in loaded.found if "//" in a and not a.startswith("data:")], page.name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\"' ]*(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
    page = (tmp_path / "concepts" / "objective" / "index.html").read_text(encoding="utf-8")
    assert page.count("<math") > 20 and "arithmatex" not in page
    assert not (tmp_path / "scripts").exists()
