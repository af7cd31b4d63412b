"""Trainings are killed and their disk fails, in a small part of `make soak`; and what `make soak` compares can fail."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from soak import long_run, trainings

soak = importlib.import_module("soak.__main__")


def run_soak(root, work, *arguments):
    """`python -m soak --quick` of the code in `root`: (exit code, what it said, {case: row})."""
    command = [sys.executable, "-m", "soak", "--quick", "--json", work / "rows.json", "--work", work, *arguments]
    env = {**os.environ, "MGD_OPS": "torch"}
    done = subprocess.run([*map(str, command)], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    rows = json.loads((work / "rows.json").read_text())["rows"]
    return done.returncode, done.stdout + done.stderr, {row["case"]: row for row in rows}


@pytest.mark.slow
def test_a_training_survives_kills_and_faults_of_the_disk(tmp_path):
    code, said, rows = run_soak(ROOT, tmp_path, "--parts", "kills", "faults")
    assert code == 0, said
    assert rows["kill: sup, 1 process"]["tried"] == 3
    assert len(rows) == (6 if "file system full: not run" not in said else 5), said
    for row in rows.values():
        assert row["tried"] == row["survived"] > 0 and row["differing"] == row["lost"] == 0, said
    assert json.loads((tmp_path / "done.json").read_text()) == []  # the next command begins again


@pytest.mark.slow
def test_a_resume_that_is_not_exact_is_noticed(tmp_path):
    """In a copy of the code whose sampler ignores the step that it is to start at."""
    for source in ROOT.glob("*.py"):
        shutil.copy(source, tmp_path)
    shutil.copytree(ROOT / "soak", tmp_path / "soak")
    text, right = (tmp_path / "batches.py").read_text(), "for step in range(self.start, self.steps)"
    assert right in text
    (tmp_path / "batches.py").write_text(text.replace(right, "for step in range(0, self.steps)"))
    code, said, rows = run_soak(tmp_path, tmp_path / "work", "--parts", "kills")
    row = rows["kill: sup, 1 process"]
    assert code == 1 and row["differing"] == row["tried"] > 0, said


def test_values_of_checkpoints_are_compared_bit_by_bit():
    one = {"a": [torch.tensor([1.0, torch.nan])], "b": torch.tensor(0.0), "c": 1}
    assert trainings.same(one, {"a": [torch.tensor([1.0, torch.nan])], "b": torch.tensor(0.0), "c": 1})
    assert not trainings.same(one, {**one, "b": torch.tensor(-0.0)})
    assert not trainings.same(one, {**one, "b": torch.tensor(0)})
    assert not trainings.same(one, {**one, "a": one["a"] * 2})
    assert not trainings.same(one, {**one, "d": 1})


def watched(memory=lambda step: 1e9, files=lambda step: 50, rate=lambda step: 100.0):
    """The row of a long run whose memory, open files and rate are functions of the step."""
    samples = [(step, memory(step), files(step), 2) for step in range(50, 10_001, 50)]
    return long_run.judged(samples, [{"step": step, "lr": 0.1, "images_per_s": rate(step)} for step in range(50, 10_001, 50)])


def test_a_long_run_may_not_grow_or_slow_down():
    assert watched()["survived"] == 1
    assert watched(memory=lambda step: 1e9 + 5e8 * (step < 900))["survived"] == 1  # the first 1,000 steps warm up
    assert watched(memory=lambda step: 1e9 + 1e4 * step)["survived"] == 0
    assert watched(memory=lambda step: 1e9 + 3e7 * (4000 <= step < 5000))["survived"] == 0
    assert watched(files=lambda step: 50 + step // 5000)["survived"] == 0
    slow = watched(rate=lambda step: 100.0 if step <= 9000 else 94.0)
    assert slow["survived"] == 0 and slow["speed_percent"] == -6.0


def test_a_row_replaces_the_one_of_its_case(tmp_path, monkeypatch):
    monkeypatch.setenv("MGD_OPS", "torch")
    path, row = (
        tmp_path / "rows.json",
        {"case": "kill: a", "tried": 2, "survived": 1, "differing": 0, "lost": 0, "seconds": 1.0},
    )
    for each in (row, {**row, "case": "kill: b"}, {**row, "survived": 2}):
        soak.put_row(path, each)
    result = json.loads(path.read_text())
    assert [(each["case"], each["survived"]) for each in result["rows"]] == [("kill: a", 2), ("kill: b", 1)]
    assert result["what"] == "reliability" and result["seconds"] == 2.0
    table = soak.table(result["rows"])
    assert "| kill: a | 2 | 2 | 0 | 0 | 1 |" in table and "| **kill: all** | 4 | 3 | 0 | 0 | 2 |" in table


def test_the_document_shows_the_rows_of_the_result_file():
    path = ROOT / "results" / "reliability.json"
    if not path.exists():
        pytest.skip("make soak has not run")
    assert soak.table(json.loads(path.read_text())["rows"]) in (ROOT / "docs" / "reliability.md").read_text()
