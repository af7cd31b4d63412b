"""The time that a training says before it starts: what is counted, what is measured, and that measuring changes nothing."""

import argparse
import time

import pytest
import torch
from conftest import TINY, distill_args, log

import distill
import models
import step_time
import train_teacher

CPU = torch.device("cpu")


def arguments(**more):
    given = {"out": "runs/x", "steps": 1000, "batch": 4, "grad_accum": 1, "crop": (8, 8), "compile": False, "precision": "fp32"}
    return argparse.Namespace(**{**given, **more})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sup", "cps", "mt", "mgd"])
@pytest.mark.usefixtures("tiny_networks")
def test_measuring_changes_nothing(script, teachers, method, tmp_path, monkeypatch):
    for out, fewest in (("measured", 1), ("not", 100)):
        monkeypatch.setattr(step_time, "FEWEST_STEPS", fewest)
        if method == "mgd":
            code, said, err = script(distill, *distill_args(tmp_path / out, teachers, "--teacher-bn", "train"))
        else:
            run = ["--out", tmp_path / out, "--method", method, "--steps", "4", "--sup-only", "0.5", "--ramp-up", "0.5", *TINY]
            code, said, err = script(train_teacher, *(run if method != "sup" else [*run[:6], *TINY]))
        assert code == 0 and (f"{out}: about 1 min for 4 steps" in said) == (out == "measured"), said + err
    a, b = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("measured", "not"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]) and torch.equal(a["rng"], b["rng"])
    assert log(tmp_path / "measured") == log(tmp_path / "not")


class Slow(torch.nn.Module):
    """Takes 5 ms per image forward, and 10 ms backward."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, images):
        time.sleep(0.005 * len(images))
        logits = self.weight * images[:, :, ::4, ::4]
        if logits.requires_grad:
            logits.register_hook(lambda gradient: time.sleep(0.01 * len(images)))
        return models.Output(logits, logits)


@pytest.mark.parametrize("backward,expected", [(False, 0.005), (True, 0.015)])
def test_the_time_of_an_image_is_measured(backward, expected):
    measured = step_time.seconds_per_image(Slow(), arguments(), CPU, backward)
    assert expected <= measured < 2 * expected


def test_passes_are_counted_from_the_step_on_at_which_they_begin(monkeypatch, capsys):
    monkeypatch.setattr(step_time, "seconds_per_image", lambda network, args, device, backward: 3.0 if backward else 1.0)
    student, teacher = Slow(), Slow()
    passes = [step_time.Pass(student, 4), step_time.Pass(teacher, 6, backward=False, first=400)]
    ended = [*passes, step_time.Pass(teacher, 6, backward=False, end=700)]
    step_time.print_duration(arguments(), CPU, 0, passes)  # 1000 * 12 + 600 * 6 s
    assert capsys.readouterr().out.startswith("runs/x: about 4 h 20 min for 1000 steps, ")
    step_time.print_duration(arguments(), CPU, 800, passes)  # 200 * (12 + 6) s
    assert capsys.readouterr().out.startswith("runs/x: about 1 h 0 min for the 200 steps that are left, ")
    step_time.print_duration(arguments(), CPU, 600, ended)  # 400 * (12 + 6) + 100 * 6 s
    assert capsys.readouterr().out.startswith("runs/x: about 2 h 10 min for the 400 steps that are left, ")
    step_time.print_duration(arguments(), CPU, 800, ended)
    assert capsys.readouterr().out.startswith("runs/x: about 1 h 0 min for the 200 steps that are left, ")
    step_time.print_duration(arguments(), CPU, 950, passes)
    step_time.print_duration(arguments(compile=True), CPU, 0, passes)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given,images", [
    ("--method sup", [(8, True, 0)]),
    ("--method cps", [(8, True, 0), (8, True, 0), (8, True, 40), (8, True, 40), (16, False, 40), (16, False, 40)]),
    ("--method cps --no-cutmix --grad-accum 2",
     [(8, True, 0), (8, True, 0), (8, True, 40), (8, True, 40), (8, False, 40), (8, False, 40)]),
    ("--method mt", [(8, True, 0), (8, True, 40), (24, False, 40)]),
])  # fmt: skip
def test_passes_of_a_training(given, images):
    args = train_teacher.parse_args(["--out", "x", "--steps", "100", *given.split()])
    nets = [Slow() for _ in range(1 + (args.method == "cps"))]
    passes = train_teacher.passes_of_step(args, nets, nets[0])
    assert [each[1:4] for each in passes] == images and {each.network for each in passes} == {*nets}


STUDENT = [(8, True, 0, None), (8, True, 0, 250)]  # the labeled images in all steps, the views in those with teachers


@pytest.mark.parametrize("given,images", [
    ("", [*STUDENT, (32, False, 0, 250), (32, False, 0, 250)]),  # labeled images, both clean views and the mixed ones
    ("--losses sup pixel", [*STUDENT, (24, False, 0, 250), (24, False, 0, 250)]),
    ("--losses sup pixel:labeled", [STUDENT[0], (8, False, 0, 250), (8, False, 0, 250)]),
    ("--mixed-terms clean", [*STUDENT, (24, False, 0, 250), (24, False, 0, 250)]),
    ("--refine 0.2", [STUDENT[0], (8, True, 0, 200), (32, False, 0, 200), (32, False, 0, 200)]),
])  # fmt: skip
def test_passes_of_a_distillation(given, images):
    args = distill.parse_args(["--out", "x", "--deep", "D.pt", "--wide", "W.pt", *given.split()])
    needed = {role: distill.needed_outputs(args.method, args.losses, role) for role in ("T_D", "T_W")}
    passes = distill.passes_of_step(args, Slow(), {role: Slow() for role in needed}, needed)
    assert [each[1:] for each in passes] == images


@pytest.mark.parametrize("seconds,text", [
    (3, "1 min"), (90 * 60 - 1, "1 h 30 min"), (7_800, "2 h 10 min"), (49.6 * 3600, "2 days 2 h"), (47 * 3600, "47 h 0 min"),
])  # fmt: skip
def test_times_as_people_say_them(seconds, text):
    assert step_time.readable(seconds) == text
