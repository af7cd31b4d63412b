"""Damaged, lying and hostile files: a part of what `python -m soak.fuzz` reads, and who watches it."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, python

from soak import fuzz

WATCHED = """
import json, os, pathlib, sys
from soak import fuzz, kinds
from common import UserError

root = pathlib.Path(sys.argv[1])
(root / "run").mkdir()
(root / "run" / "link").symlink_to(root)
(root / "old").write_text("")
watch = fuzz.Watch(root / "run")

def refuse(message):
    raise UserError(message)

calls = {
    "inside": lambda: (root / "run" / "a").write_text("x"),
    "refused": lambda: kinds.attempt(refuse, "a.png: is\\nwrong"),
    "read": lambda: (root / "old").read_text(),
    "write": lambda: (root / "a").write_text("x"),
    "behind a link": lambda: (root / "run" / "link" / "b").write_text("x"),
    "rename": lambda: os.replace(root / "run" / "a", root / "old"),
    "remove": lambda: (root / "old").unlink(),
    "mkdir": lambda: (root / "c").mkdir(),
    "process": lambda: os.system("true"),
    "exception": lambda: {}["x"],
}
print(json.dumps({name: watch.fault_of(call) for name, call in calls.items()}))
"""


@pytest.mark.slow
def test_the_watch_sees_what_a_reader_must_not_do(tmp_path):
    done = python(WATCHED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    faults = json.loads(done.stdout)
    assert [name for name, fault in faults.items() if fault is None] == ["inside", "refused", "read"]
    assert all(
        faults[name].startswith("outside: ") for name in faults if name not in ("inside", "refused", "read", "exception")
    )
    assert faults["exception"].startswith("KeyError: 'x' at ")


DYING = """
import os, pathlib, sys, time
from soak import fuzz, kinds

calls = {"crash": os.abort, "hang": lambda: time.sleep(99)}
fuzz.KINDS.clear()
fuzz.KINDS |= {kind: lambda draw, place, call=call: draw(kinds.st.just(call)) for kind, call in calls.items()}
if "--work" in sys.argv:
    fuzz.SECONDS = 1
    fuzz.main()
else:
    run = fuzz.subprocess.run
    fuzz.subprocess.run = lambda command, **more: run([command[0], __file__, *command[3:]], **more)
    print(fuzz.json.dumps(fuzz.fuzz({"crash": 1, "hang": 1}, 0, pathlib.Path(sys.argv[1]))))
"""


@pytest.mark.slow
def test_a_crash_and_a_hang_are_counted_and_the_next_part_is_read(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    done = subprocess.run(
        [sys.executable, tmp_path / "dying.py", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    counted = {kind: (row["tried"], row["survived"]) for kind, row in json.loads(done.stdout).items()}
    assert counted == {"crash": (1, 0), "hang": (1, 0)}
    faults = [json.loads(line) for line in (tmp_path / "out" / "faults.jsonl").read_text().splitlines()]
    assert [fault["kind"] for fault in faults] == ["crash", "hang"] and "Timeout" in faults[1]["fault"]


@pytest.mark.slow
def test_some_inputs_of_each_kind_survive(tmp_path):
    for case, count in fuzz.quick(tmp_path).items():
        counts = count()
        assert counts["tried"] == 5 * len(fuzz.KINDS) and counts["survived"] == counts["tried"], (case, counts)
