"""The code of docs/studio.md runs, and gives what the studio gives."""

from __future__ import annotations

import pytest
from doc_code import blocks, run


def test_the_page_of_the_studio(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    same, watched, space = blocks("studio.md")
    names: dict = {}
    run(same, "studio.md", names)
    assert names["out"].texts == ["a fox on a green background"] and (tmp_path / "result.png").is_file()
    capsys.readouterr()
    run(watched, "studio.md", names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].endswith("64 codes computed") and "0% open" in lines[-1]
    assert {line.split()[-3] for line in lines} != {"64"}  # the cache leaves some out
    pytest.importorskip("gradio")
    run(space, "studio.md", names)
    assert len(names["page"].fns) > 10 and names["page"].title == "unidiff studio"
