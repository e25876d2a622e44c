"""Other programs beside ours: how checkouts are known, imported, held against each other and forgotten."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from unidiff.errors import exit_status
from unidiff.evaluation.benchmark.against import Pair, PeerSystem, Sizes, compare, comparison_table, importing
from unidiff.evaluation.benchmark.systems import SYSTEMS

RECIPE = Path(__file__).resolve().parents[2] / "inference" / "benchmark.py"
CPU = torch.device("cpu")
SMALL = Sizes(32, 2, 2, 48, 120, 40, 8, 16, 8, 4, 4, 4)
PROGRAM = "import torch\nfrom helper_of_theirs import add\ndef decode(tokens): return add(tokens, 1)\n"


@pytest.fixture
def checkout(tmp_path):
    """A program of our own in the place of theirs."""
    folder = tmp_path / "theirs"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "program_of_theirs.py").write_text(PROGRAM)
    (folder / "code" / "helper_of_theirs.py").write_text("def add(a, b): return a + b\n")
    return folder


def pairs(folder, sizes, device):
    import program_of_theirs

    tokens = torch.arange(sizes.answer, device=device)
    yield Pair("same", lambda: program_of_theirs.decode(tokens), lambda: tokens + 1)
    yield Pair("other", lambda: program_of_theirs.decode(tokens), lambda: (tokens + 1) * (tokens > 2))
    yield Pair("broken", lambda: 1 / 0, lambda: tokens)
    yield Pair("dull", lambda: tokens * 0, lambda: tokens * 0)
    yield Pair("short", lambda: tokens[1:], lambda: tokens)
    import a_package_that_nobody_has  # noqa: F401


PEER = PeerSystem("Peer", ("code/program_of_theirs.py",), ("code", "elsewhere"), pairs)


def test_pairs_are_held_against_each_other(checkout):
    said: list[str] = []
    name, found = compare(checkout, (*SYSTEMS, PEER), CPU, 2, SMALL, said.append)
    assert name == "Peer" and said == ["Peer: same", "Peer: other", "Peer: broken", "Peer: dull", "Peer: short"]
    same, other, *rest = found
    assert (same.name, same.differing, same.tokens) == ("same", 0, 16) and other.differing == 3
    assert same.theirs > 0 and same.least <= same.times <= same.most
    assert [(c.name, c.skipped) for c in rest] == [
        ("broken", "skipped: ZeroDivisionError: division by zero"),
        ("dull", "skipped: ValueError: their tokens are all the same, which shows nothing"),
        ("short", "skipped: ValueError: their tokens have shape (15,), ours (16,)"),
        ("the rest", "skipped: it needs the package 'a_package_that_nobody_has', which is not installed"),
    ]
    assert not {"program_of_theirs", "helper_of_theirs"} & set(sys.modules)
    assert str(checkout / "code") not in sys.path
    table = comparison_table(name, found, "2 runs")
    cells = [list(column.cells) for column in table.columns]
    assert cells[1][:3] == ["equal", "3 of 16 differ", "skipped: ZeroDivisionError: division by zero"]


def test_what_cannot_be_imported_at_all_is_one_line(checkout):
    (checkout / "code" / "helper_of_theirs.py").unlink()
    _, (only,) = compare(checkout, (PEER,), CPU, 1, SMALL)
    assert only.name == "all" and "needs the package 'helper_of_theirs'" in only.skipped


def test_runs_take_turns(checkout):
    calls: list[str] = []

    def watched(folder, sizes, device):
        note = lambda who: lambda: calls.append(who) or torch.arange(2)  # noqa: E731
        yield Pair("turns", note("theirs"), note("ours"))

    compare(checkout, (PeerSystem("Peer", PEER.marks, (), watched),), CPU, 3, SMALL)
    assert calls[:2] == ["theirs", "ours"]  # the warm-up
    assert calls[2:] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_modules_known_before_stay(checkout):
    with importing([checkout / "code"]):
        import helper_of_theirs
    with importing([checkout / "code"]):
        import helper_of_theirs as again
    assert helper_of_theirs is not again and "torch" in sys.modules


def test_mistakes_are_one_sentence(tmp_path, checkout):
    with pytest.raises(ValueError, match=r"gone' is no folder; give a checkout of Fast-dLLM, .* or diffusers"):
        compare(tmp_path / "gone", SYSTEMS, CPU)
    with pytest.raises(ValueError, match=r"is no checkout of Fast-dLLM, .* or diffusers; none of their files"):
        compare(checkout, SYSTEMS, CPU)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_an_empty_checkout_of_each_is_skipped_with_a_reason(system, tmp_path):
    mark = tmp_path / system.marks[0]
    mark.parent.mkdir(parents=True)
    mark.touch()
    name, found = compare(tmp_path, SYSTEMS, CPU, 1, SMALL)
    assert name == system.name
    assert [c.name for c in found] == ["all"] and found[0].skipped.startswith("skipped: ") and not found[0].tokens


@pytest.fixture
def command(monkeypatch, capsys):
    """The recipe in this process: (exit status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("benchmark_recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
        try:
            status = exit_status(recipe.main)
        except SystemExit as left:
            status = int(left.code or 0)
        return status, *capsys.readouterr()

    return call


def test_the_command_says_that_it_runs_their_code(command, tmp_path):
    status, shown, _ = command("--help")
    said = " ".join(shown.split())
    assert status == 0 and "--against FOLDER" in said
    assert "This runs the code in that folder: name only what you trust" in said
    status, _, said = command("--against", tmp_path)
    assert status == 1 and "is no checkout of" in said
    status, _, said = command("--suite", "smoke")
    assert status == 2 and "give --suite and --json, or --against with a folder" in said
    (tmp_path / "dllm_cache" / "hooks").mkdir(parents=True)
    (tmp_path / "dllm_cache" / "hooks" / "cache_hook_LLaDA.py").touch()
    status, shown, _ = command("--against", tmp_path, "--threads", 1, "--runs", 1)
    assert status == 0 and "dLLM-Cache: float32, 1 threads" in shown and "skipped: it needs the package" in shown


def test_diffusers_pipeline_takes_the_tokens_of_ours():
    """The one system that is installed wherever this package is."""
    import diffusers

    name, found = compare(Path(diffusers.__file__).parents[1], SYSTEMS, CPU, 1, SMALL)
    if found[0].skipped:
        assert "LLaDA2Pipeline" in found[0].skipped  # an older diffusers
        pytest.skip(found[0].skipped)
    assert name == "diffusers" and [c.differing for c in found] == [0, 0] and found[0].tokens == 16
