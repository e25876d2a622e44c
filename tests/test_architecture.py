"""The house: rooms of a bearable size, imports that run downwards, and a prompt that does not wander."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from unidiff.pipeline import UniDiffPipeline

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "unidiff"
MOST_FILES, MOST_LINES, MOST_LINES_IN_ALL = 16, 400, 55_500  # this holds what is reached
MOST_FILES_OF_A_PROMPT, DEEPEST = 22, 10
# from the cellar up; everything else at the root of the package is the cellar
FLOORS = (
    ("tokens", "kernels"),
    ("models", "data", "diffusion"),
    ("decoding",),
    ("families",),
    ("pipeline", "pipelines", "schedulers", "train"),
    ("evaluation", "worlds", "recipes"),
    ("cli", "studio", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS, 1) for room in rooms}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of what a module imports from the package, inside functions as well."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "unidiff":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if module_file(full) else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("unidiff."))


def module_file(name: str) -> Path | None:
    place = ROOT / name.replace(".", "/")
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None


def room_of(name: str) -> str:
    return [*name.split("."), "__init__"][1]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_room_is_crowded_and_no_file_is_long():
    folders = Counter(path.parent for path in modules())
    crowded = {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > MOST_FILES}
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert not crowded
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}
    assert sum(lines.values()) <= MOST_LINES_IN_ALL


def test_imports_run_downwards():
    upwards = [
        f"{name_of(path)} imports {name}"
        for path in modules()
        for name in imports_of(path)
        if room_of(name_of(path)) != "__init__"  # the package itself names what its users import
        and LEVEL.get(room_of(name), 0) > LEVEL.get(room_of(name_of(path)), 0)
    ]
    assert not upwards


def test_imports_make_no_circles():
    edges = {name_of(path): {name for name in imports_of(path) if name != name_of(path)} for path in modules()}
    edges.pop("unidiff")
    state: dict[str, int] = {}
    circles: list[str] = []

    def visit(name: str, way: list[str]) -> None:
        state[name] = 1
        for other in sorted(edges.get(name, ())):
            if state.get(other) == 1:
                circles.append(" -> ".join([*way[way.index(other) :], other]))
            elif other not in state:
                visit(other, [*way, other])
        state[name] = 2

    for name in sorted(edges):
        if name not in state:
            visit(name, [name])
    assert not circles


def test_generic_code_knows_no_world_and_no_recipe():
    rooms = {"worlds", "recipes", "cli"}
    knowing = [
        f"{name_of(path)} imports {name}"
        for path in modules()
        for name in imports_of(path)
        if name.startswith(("unidiff.worlds.", "unidiff.recipes.")) and room_of(name_of(path)) not in rooms
    ]
    assert not knowing


def test_a_class_name_occurs_once():
    places = defaultdict(list)
    for path in modules():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name_of(path))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_tests_read_no_private_names_of_the_package():
    """Imported, patched by their path, or read from an object; what is allowed is of torch, diffusers, os, sys and tuples."""
    private, allowed = (
        re.compile(r"_[a-z]\w*"),
        {"_progress_bar_config", "_forward_hooks", "_exit", "_getframe", "_local_scalar_dense", "_unique2", "_schema"}
        | {"_make_wrapper_subclass", "_disabled_torch_function_impl", "_asdict"},
    )
    reads = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unidiff"):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("unidiff."):
                names = [node.value.split(".")[-1]]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("self", "cls"):
                names = [node.attr]
            found = [
                name for name in names if private.fullmatch(name) and name not in allowed and not name.endswith("__")
            ]
            reads += [f"{path.name}:{node.lineno} {name}" for name in found]
    assert not reads


@pytest.fixture(scope="module")
def prompt_trace() -> tuple[list[str], int, set[str]]:
    """Files in the order in which a prompt reaches them, the deepest nesting, and the functions."""
    pipe = UniDiffPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe.text_to_image("a fox", generator=0)  # what is made at the first use is made
    files: dict[str, None] = {}
    functions: set[str] = set()
    depth = deepest = 0
    inside = str(PACKAGE)

    def watch(frame, event, _):
        nonlocal depth, deepest
        name = frame.f_code.co_filename
        if not name.startswith(inside) or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            depth += 1
            deepest = max(deepest, depth)
            files.setdefault(name[len(inside) + 1 :])
            functions.add(f"{name}:{frame.f_code.co_qualname}")
        elif event == "return":
            depth -= 1

    sys.setprofile(watch)
    try:
        pipe.text_to_image("a fox", generator=0)
    finally:
        sys.setprofile(None)
    return list(files), deepest, functions


def test_a_prompt_crosses_few_files(prompt_trace):
    files, deepest, functions = prompt_trace
    print(f"{len(files)} files, {len(functions)} functions, depth {deepest}:", *files, sep="\n  ")
    assert len(files) <= MOST_FILES_OF_A_PROMPT
    assert deepest <= DEEPEST


def test_the_page_names_what_exists():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [a-z ,;]+ \| ((?:`\w+`(?:, )?)+) \|$", page, re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == [set(rooms) for rooms in reversed(FLOORS)]
    named = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page)
    assert len(named) > 30
    for file, name in named:
        path = next((path for path in (PACKAGE / file, ROOT / file) if path.is_file()), None)
        assert path is not None, file
        node: ast.AST = tree_of(path)
        for part in filter(None, name.split(".")):
            inner = {child.name: child for child in ast.iter_child_nodes(node) if hasattr(child, "name")}
            assert part in inner, f"{file} has no {name}"
            node = inner[part]
