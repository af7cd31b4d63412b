"""--tensorboard: the log's entries as curves, and panels of val images."""

import json
import sys
import types

import pytest
import torch
from conftest import TINY, distill_args, errors, interrupt_at, log, same_weights

import datasets
import distill
import events
import train_teacher

pytest.importorskip("torch.utils.tensorboard", reason="pip install tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.usefixtures("tiny_networks")
SUP = ["--method", "sup", *TINY, "--steps", "6", "--val-every", "2"]


def read(out):
    """({tag: [(step, value)]}, {tag: [step]} of the pictures)"""
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    tags = found.Tags()
    curves = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags["scalars"]}
    return curves, {tag: [event.step for event in found.Images(tag)] for tag in tags["images"]}


def curves_of_the_log(out, names):
    """{tag: [(step, value)]}: what the log says, names being {key of an entry: tag}."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {tag: [(entry["step"], entry[key]) for entry in entries if key in entry] for key, tag in names.items()}


@pytest.mark.slow
def test_the_curves_are_those_of_the_log_and_training_is_unchanged(script, teachers, tmp_path):
    """Of a student: losses, weights and the log are equal with and without; the curves hold every number of the log."""
    arguments = [*distill_args(tmp_path / "with", teachers), "--val-every", "2", "--grad-norms", "--tensorboard"]
    assert script(distill, *arguments)[0] == 0
    without = [*distill_args(tmp_path / "without", teachers), "--val-every", "2", "--grad-norms"]
    assert script(distill, *without)[0] == 0
    assert log(tmp_path / "with") == log(tmp_path / "without") and not (tmp_path / "without" / "tensorboard").exists()
    assert same_weights(tmp_path / "with" / "last.pt", tmp_path / "without" / "last.pt")
    terms = ("sup", "pixel_l", "pixel_u", "image", "region", "loss")
    names = {"lr": "lr", "images_per_s": "speed/images_per_s", "data_wait": "speed/data_wait", "miou": "val/miou"}
    names |= {term: f"loss/{term}" for term in terms} | {f"grad_{term}": f"gradient_norm/{term}" for term in terms}
    curves, pictures = read(tmp_path / "with")
    expected = curves_of_the_log(tmp_path / "with", names)
    assert curves.keys() == expected.keys() and pictures == {"val": [2, 4]}
    for tag, points in expected.items():
        assert points and curves[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], tag


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cps", "mt"])
def test_teachers_train_as_without(script, tmp_path, method):
    """The panels leave the mode, the statistics and the random numbers of the networks as they are."""
    options = ["--method", method, *TINY, "--steps", "4", "--val-every", "1", "--sup-only", "0.5", "--ramp-up", "0.5"]
    for out, more in (("with", ["--tensorboard"]), ("without", [])):
        assert script(train_teacher, "--out", tmp_path / out, *options, *more)[0] == 0
    assert log(tmp_path / "with") == log(tmp_path / "without")
    assert same_weights(tmp_path / "with" / "last.pt", tmp_path / "without" / "last.pt")


@pytest.mark.slow
def test_a_resumed_run_continues_the_curve(script, tmp_path, monkeypatch):
    """Interrupted after step 5, resumed after step 3: every step is there once, with the value of the log."""
    arguments = ["--out", tmp_path / "x", *SUP, "--save-every", "3", "--tensorboard"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, train_teacher, 5)
        assert script(train_teacher, *arguments)[0] == 130
    assert [step for step, _ in read(tmp_path / "x")[0]["loss/sup"]] == [1, 2, 3, 4, 5]  # before the run ends
    assert script(train_teacher, *arguments, "--resume")[0] == 0
    curves, pictures = read(tmp_path / "x")
    assert curves["speed/images_per_s"] == [
        (step, pytest.approx(value, rel=1e-6)) for step, value in curves_of_the_log(tmp_path / "x", {"images_per_s": "x"})["x"]
    ]
    assert [step for step, _ in curves["loss/sup"]] == [1, 2, 3, 4, 5, 6] and pictures == {"val": [2, 4, 6]}
    assert [step for step, _ in curves["val/miou"]] == [2, 4, 6]


def test_without_the_package_there_is_one_line_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it could not be imported
    monkeypatch.setattr(datasets, "open_training_data", None)  # is never reached
    for module, more in ((train_teacher, []), (distill, ["--deep", "T.pt"])):
        said = errors(script, module, "--out", tmp_path / "x", "--tensorboard", *more)
        assert "--tensorboard: needs its package" in said and said.strip().endswith("; pip install tensorboard")
    assert not (tmp_path / "x").exists()


def test_only_the_first_rank_writes(script, tmp_path, monkeypatch):
    monkeypatch.setattr(events, "rank_and_size", lambda: (1, 2))
    assert script(train_teacher, "--out", tmp_path / "x", *SUP, "--tensorboard")[0] == 0
    assert not (tmp_path / "x" / "tensorboard").exists()


def test_an_entry_is_on_the_disk_at_once(tmp_path):
    """A run that is killed then shows what its log holds."""
    args = types.SimpleNamespace(tensorboard=True, out=tmp_path)
    board = events.Events(args, datasets.Shapes(), torch.device("cpu"), 0)
    board.entry({"step": 1, "sup": 0.5})
    assert read(tmp_path)[0] == {"loss/sup": [(1, 0.5)]}
    board.close()


def test_a_file_in_the_way_is_one_line(script, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "tensorboard").write_text("")
    said = errors(script, train_teacher, "--out", tmp_path / "x", *SUP, "--tensorboard")
    assert "--tensorboard" in said and "cannot be written to" in said
