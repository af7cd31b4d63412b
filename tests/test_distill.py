"""Distillation: the choice of losses, the teachers' outputs, and the runs."""

import argparse
import pathlib
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import (
    AVERAGED,
    LEARNING,
    TINY,
    assert_it_learns,
    distill_args,
    errors,
    interrupt_at,
    log,
    resume_equals_uninterrupted,
    same_weights,
    save_mask,
    weights,
)

import backbones
import batches
import common
import datasets
import distill
import distill_losses
import models
import predict
import recipes
import run_folder
import train_teacher
from finite_steps import FiniteSteps

pytestmark = pytest.mark.usefixtures("tiny_networks")


@pytest.mark.parametrize(
    "method,terms",
    [
        ("mgd", ["sup", "pixel_l", "pixel_u", "region"]),
        ("kd", ["sup", "kd"]),
        ("cwd", ["sup", "cwd"]),
    ],
)
def test_distillation_learns(script, few, learned_teachers, tmp_path, method, terms):
    """Forty steps on four labeled and four unlabeled images."""
    teachers = ["--deep", learned_teachers[0], "--wide", learned_teachers[1], "--lambda-region", "10"]
    code, _, err = script(distill, "--out", tmp_path / method, "--method", method, "--data", few, *teachers, *LEARNING)
    assert code == 0, err
    assert_it_learns(tmp_path / method, terms, falls_to=0.5, miou=65)


@pytest.mark.slow
def test_distillation_options_change_the_terms_they_name(script, teachers, tmp_path):
    changes = {
        "--no-cutmix": {"pixel_u", "image", "region", "loss"},
        "--image-reduction mean": {"image", "loss"},
        "--regions 3": {"region", "loss"},
        "--lambda-region 7": {"loss"},
        "--lambda-image 7": {"loss"},
        "--teacher-bn train": {"pixel_l", "pixel_u", "image", "region", "loss"},
        "--mixed-terms clean": {"image", "region", "loss"},
        "--conf-thresh 0.25": {"pixel_l", "pixel_u", "loss"},
        "--soft-labels 2": {"pixel_l", "pixel_u", "loss"},
        "--strong-views": {"pixel_u", "image", "region", "loss"},
    }
    assert script(distill, *distill_args(tmp_path / "plain", teachers))[0] == 0
    plain = log(tmp_path / "plain")[0]
    for i, (options, expected) in enumerate(changes.items()):
        assert script(distill, *distill_args(tmp_path / str(i), teachers, "--steps", "1", *options.split()))[0] == 0
        other = log(tmp_path / str(i))[0]
        assert {key for key in plain if plain[key] != other[key]} == expected, options
    mean = log(tmp_path / "1")[0]
    assert plain["image"] == pytest.approx(6 * mean["image"], rel=1e-5)  # six classes


def test_gradient_norms_are_logged_and_change_nothing(script, teachers, tmp_path):
    for name, flags in (("with", ["--grad-norms"]), ("without", [])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *flags))[0] == 0
    assert same_weights(tmp_path / "with" / "last.pt", tmp_path / "without" / "last.pt")
    norms = log(tmp_path / "with")[0]
    terms = ["sup", "pixel_l", "pixel_u", "image", "region"]
    assert {key for key in norms if key != "step"} == {f"grad_{name}" for name in [*terms, "loss"]}
    assert all(norms[f"grad_{name}"] > 0 for name in terms)
    assert 0 < norms["grad_loss"] < sum(norms[f"grad_{name}"] for name in terms)


EVERYTHING = "sup pixel image:T_D image:T_W region:T_D region:T_W"


@pytest.mark.slow
def test_losses_are_what_they_are_called(script, teachers, tmp_path):
    """Each choice of --losses has the terms it names, of the same value as alone or beside others."""
    both = {"--deep": teachers[0], "--wide": teachers[1]}
    choices = {  # options -> terms, the teachers and losses of the row
        ("", "--deep --wide"): ("sup pixel_l pixel_u image region", "T_D T_W", "sup pixel image:T_D region:T_W"),
        ("", "--deep"): ("sup pixel_l pixel_u image region", "T_D", "sup pixel image:T_D region:T_D"),
        ("", "--wide"): ("sup pixel_l pixel_u image region", "T_W", "sup pixel image:T_W region:T_W"),
        (EVERYTHING, "--deep --wide"): ("sup pixel_l pixel_u image region", "T_D T_W", EVERYTHING),
        ("sup pixel", "--deep --wide"): ("sup pixel_l pixel_u", "T_D T_W", "sup pixel"),
        ("pixel:unlabeled pixel:labeled sup", "--deep"): ("sup pixel_l pixel_u", "T_D", "sup pixel"),
        ("sup pixel:labeled", "--deep --wide"): ("sup pixel_l", "T_D T_W", "sup pixel:labeled"),
        ("sup pixel:unlabeled", "--deep --wide"): ("sup pixel_u", "T_D T_W", "sup pixel:unlabeled"),
        ("sup image:T_D", "--deep"): ("sup image", "T_D", "sup image:T_D"),
        ("sup region:T_W", "--wide"): ("sup region", "T_W", "sup region:T_W"),
    }
    logs = {}
    for i, ((losses, roles), (terms, names, expected)) in enumerate(choices.items()):
        given = [arg for role in roles.split() for arg in (role, both[role])]
        options = [*given, "--steps", "1", *TINY, *(["--losses", *losses.split()] if losses else [])]
        code, _, err = script(distill, "--out", tmp_path / str(i), *options)
        assert code == 0, err
        entry, row = log(tmp_path / str(i))[0], run_folder.load_checkpoint(tmp_path / str(i) / "last.pt")["row"]
        assert {*entry} - {"step", "lr", "loss"} == {*terms.split()}
        assert row["teachers"] == names.split() and row["losses"] == expected.split()
        assert (row["regions"] == 7) == ("region" in terms)
        logs[losses, roles] = entry
    full = logs["", "--deep --wide"]
    deep, wide = logs["", "--deep"], logs["", "--wide"]
    near = {"rel": 1e-4, "abs": 1e-6}
    for name in ("pixel_l", "pixel_u"):
        assert deep[name] + wide[name] == pytest.approx(full[name], **near)
    assert deep["image"] == pytest.approx(full["image"], **near) and wide["region"] == pytest.approx(full["region"], **near)
    assert logs[EVERYTHING, "--deep --wide"]["image"] == pytest.approx(deep["image"] + wide["image"], **near)
    assert logs[EVERYTHING, "--deep --wide"]["region"] == pytest.approx(deep["region"] + wide["region"], **near)
    for entry in logs.values():
        total = sum(entry.get(name, 0.0) for name in ("sup", "pixel_l", "pixel_u"))
        total += 0.002 * entry.get("image", 0.0) + 10 * entry.get("region", 0.0)
        assert entry["loss"] == pytest.approx(total, rel=1e-4) and entry["sup"] == full["sup"]
    for name, key in (("pixel_l", "sup pixel:labeled"), ("pixel_u", "sup pixel:unlabeled")):
        assert logs[key, "--deep --wide"][name] == pytest.approx(full[name], **near)
    assert logs["sup image:T_D", "--deep"]["image"] == pytest.approx(full["image"], **near)
    assert logs["sup region:T_W", "--wide"]["region"] == pytest.approx(full["region"], **near)


def test_labels_alone_need_no_unlabeled_image(script, teachers, folder, tmp_path):
    data = ["--dataset", "folder", "--data", folder, "--part", "1", "--weights", "none", "--steps", "2", *TINY]
    assert script(train_teacher, "--out", tmp_path / "t", "--method", "sup", "--backbone", "r18", *data)[0] == 0
    (folder / "images" / "im08.png").write_bytes(b"broken")  # it has no mask
    options = [*data, "--deep", tmp_path / "t" / "last.pt", "--losses", "sup", "pixel:labeled"]
    code, _, err = script(distill, "--out", tmp_path / "s", *options)
    assert code == 0, err


@pytest.mark.parametrize(
    "options,said",
    [
        ("", "a teacher is needed: give --deep FILE"),
        ("--deep D --losses sup", "uses no teacher; that is train_teacher.py --method sup"),
        ("--deep D --losses pixel", "add sup"),
        ("--deep D --losses sup pixel image:T_W", "'image:T_W' needs that teacher; give --wide FILE"),
        ("--wide D --losses sup region:T_D", "'region:T_D' needs that teacher; give --deep FILE"),
        ("--deep D --wide W --losses sup image:T_D", "uses nothing of T_W; leave --wide out"),
        ("--deep D --losses sup pixel pixel:labeled", "names a loss twice"),
        ("", "(train_teacher.py makes them), or --pseudo-labels DIR"),
        ("--pseudo-labels P --losses sup pixel image:T_D", "'image:T_D' needs that teacher; give --deep FILE"),
        ("--deep D --pseudo-labels P --losses sup image:T_D", "uses nothing of --pseudo-labels; add pixel"),
        ("--deep D --pseudo-labels P --method kd", "--pseudo-labels P: holds labels, but --method kd needs logits"),
        ("--pseudo-labels P --method cwd", "--pseudo-labels P: holds labels, but --method cwd needs logits"),
        ("--pseudo-labels P", "--pseudo-labels P: no such folder"),
        ("--deep D --losses sup texture", "unknown loss 'texture'; choose from sup, pixel"),
        ("--deep D --method kd --losses sup pixel", "--losses: is for --method mgd"),
        ("--deep D --method cwd --temperature 0", "--temperature 0.0: must be above 0"),
        ("--deep D --method kd --kd-weight -1", "--kd-weight -1.0: must be at least 0"),
        ("--deep D --lambda-region -1", "--lambda-region -1.0: must be at least 0"),
        ("--deep D --refine 1", "--refine 1.0: must be at least 0 and below 1"),
        ("--deep D --steps 3 --refine 0.9", "--refine 0.9: leaves none of the 3 steps to the teachers; lower it"),
        ("--deep D --ema-decay 1", "--ema-decay 1.0: must be at least 0 and below 1"),
        ("--deep D --conf-thresh 1.5", "--conf-thresh 1.5: must be at least 0 and at most 1"),
        ("--deep D --soft-labels -1", "--soft-labels -1.0: must be at least 0"),
        ("--deep D --lambda-schedule cosine", "invalid choice: 'cosine'"),
        (
            "--deep D --lambda-relative 1 --losses sup pixel:labeled image:T_D",
            "--lambda-relative: is relative to the pixel level",
        ),
        ("--deep D --lambda-relative 1 --compile", "--lambda-relative: does not work with --compile"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(script, tmp_path, options, said):
    assert said in errors(script, distill, "--out", tmp_path / "x", *TINY, *options.split())


@pytest.mark.parametrize("options,said", [
    ("--losses sup pixel --lambda-image 1", "note: --lambda-image 1.0 has no effect: the losses are sup pixel\n"),
    ("--losses sup image:T_D --lambda-region 0", "note: --lambda-region 0.0 has no effect: the losses are sup image:T_D\n"),
    ("--method kd --lambda-region 2", "note: --lambda-region 2.0 has no effect: the losses are sup kd\n"),
    ("--kd-weight 2", "note: --kd-weight 2.0 has no effect: the losses are sup pixel image:T_D region:T_D\n"),
    ("--losses sup pixel image:T_D --lambda-image 1", ""),
    ("--method cwd --kd-weight 2", ""),
    ("--losses sup pixel", ""),
    ("--lambda-image 1 --lambda-region 2", ""),
    ("--lambda-image 1 --lambda-relative 0.2", "note: --lambda-image 1.0 has no effect beside --lambda-relative\n"),
    ("--losses sup image:T_D --conf-thresh 0.5 --method mgd+",
     "note: --conf-thresh 0.5 has no effect: the losses are sup image:T_D\n"),
    ("--losses sup pixel --lambda-schedule ramp --soft-labels 1",
     "note: --lambda-schedule ramp has no effect: the losses are sup pixel\n"),
    ("--method kd --soft-labels 2 --refine 0.1 --ema-decay 0.9",
     "note: --soft-labels 2.0 has no effect: the losses are sup kd\n"),
    ("--losses sup pixel --method mgd+", ""),
    ("--losses sup pixel:labeled --strong-views", "note: --strong-views has no effect: the losses are sup pixel:labeled\n"),
    ("--losses sup pixel:labeled --no-strong-views",
     "note: --no-strong-views has no effect: the losses are sup pixel:labeled\n"),
])  # fmt: skip
def test_a_weight_of_a_loss_that_is_not_used_is_said(capsys, options, said):
    distill.parse_args(["--out", "x", "--deep", "D", *options.split()])
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("given", ["--conf-thresh 0.5", "--soft-labels 2.0", "--teacher-bn train", "--mixed-terms clean"])
def test_what_needs_a_network_as_the_teacher_has_no_effect_on_files(capsys, given):
    teachers = ["--pseudo-labels", "P"]
    distill.parse_args(["--out", "x", *teachers, *given.split(), "--method", "mgd+"])
    assert capsys.readouterr().err == f"note: {given} has no effect: --pseudo-labels is the only teacher\n"
    distill.parse_args(["--out", "x", *teachers, "--method", "mgd+"])
    distill.parse_args(["--out", "x", *teachers, *given.split(), "--wide", "W"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["kd", "cwd"])
def test_kd_and_cwd_are_trained_and_recorded(script, teachers, tmp_path, method):
    options = ["--method", method, "--temperature", "4", "--kd-weight", "3", "--steps", "1"]
    assert script(distill, *distill_args(tmp_path / method, teachers, *options))[0] == 0
    entry, row = log(tmp_path / method)[0], run_folder.load_checkpoint(tmp_path / method / "last.pt")["row"]
    assert entry["loss"] == pytest.approx(entry["sup"] + 3 * entry[method], rel=1e-4) and entry[method] > 0
    assert row["method"] == method and row["losses"] == ["sup", method] and row["regions"] is None


@pytest.mark.parametrize("teacher_bn", ["eval", "train"])
@pytest.mark.parametrize("mixed_terms", ["mixed", "clean"])
def test_teachers_label_clean_views_and_mix_the_labels(teacher_bn, mixed_terms):
    """A teacher that predicts class 1 for the pixels of an image with a bright corner, wherever CutMix puts them."""
    seen = []

    class Teacher(torch.nn.Module):
        def forward(self, images):
            seen.append(len(images))
            bright = images[:, :1, :1, :1].expand(-1, 1, *images.shape[2:])
            return models.Output(torch.cat([-bright, bright], 1), images)

    images = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    views = torch.tensor([-1.0, 1.0, 1.0, -1.0]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    box = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    box[:, :, :2] = True  # the corner of the mixed view comes from the second view

    def outputs(needed, views=views, box=box):
        ignore_mask = torch.cat([ignore, ignore]) if box is not None else ignore
        batch = batches.Batch(images, label, views, ignore_mask, batches.cutmix(views, box), ignore, box)
        return distill.teacher_outputs(Teacher(), batch, needed, teacher_bn=teacher_bn, mixed_terms=mixed_terms)

    everything = {*distill_losses.TeacherOutputs._fields}
    label, ignore = torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 4, 4, dtype=torch.bool)
    teacher_outputs = outputs(everything)
    runs = 4 if mixed_terms == "mixed" else 3
    assert seen == ([2] * runs if teacher_bn == "train" else [2 * runs])
    assert (
        (teacher_outputs.pseudo_labels_l[0] == 1).all()
        and (teacher_outputs.pseudo_labels_l[1] == 0).all()
        and torch.equal(teacher_outputs.labeled.features, images)
    )
    assert (teacher_outputs.pseudo_labels_u[0, :2] == 1).all() and (teacher_outputs.pseudo_labels_u[0, 2:] == 0).all()
    assert (teacher_outputs.pseudo_labels_u[1, :2] == 0).all() and (teacher_outputs.pseudo_labels_u[1, 2:] == 1).all()
    assert (
        torch.equal(teacher_outputs.mixed.features, batches.cutmix(views, box))
        and (teacher_outputs.mixed.logits[0, 1, :2] == 1).all()
    )
    # by its corner, or each view by its own
    assert (teacher_outputs.mixed.logits[0, 1, 2:] == (1 if mixed_terms == "mixed" else -1)).all()
    # outputs that are not needed are not computed, and the others stay the same
    for field, runs in {
        "pseudo_labels_l": 1,
        "labeled": 1,
        "pseudo_labels_u": 2,
        "mixed": 1 if mixed_terms == "mixed" else 2,
    }.items():
        seen.clear()
        alone = outputs({field})
        assert sum(seen) == 2 * runs and [name for name in everything if getattr(alone, name) is not None] == [field]
        got, expected = getattr(alone, field), getattr(teacher_outputs, field)
        torch.testing.assert_close(
            tuple(got) if isinstance(got, tuple) else got, tuple(expected) if isinstance(expected, tuple) else expected
        )
    label[0, 3], ignore[1, :, 3] = 255, True  # pixels without a label or outside the image are ignored
    masked = outputs(everything)
    assert torch.equal(masked.pseudo_labels_l, teacher_outputs.pseudo_labels_l.masked_fill(label == 255, 255))
    assert torch.equal(masked.pseudo_labels_u, teacher_outputs.pseudo_labels_u.masked_fill(ignore, 255))
    ignore.zero_()
    teacher_outputs = outputs(everything, views[:2], None)
    assert (teacher_outputs.pseudo_labels_u[0] == 0).all() and (teacher_outputs.pseudo_labels_u[1] == 1).all()
    assert torch.equal(teacher_outputs.mixed.features, views[:2])


def test_pseudo_labels_below_the_threshold_are_ignored_and_the_others_as_before():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 4, stride=4)
    views, box = torch.randn(4, 3, 16, 16), torch.rand(2, 1, 16, 16) > 0.5
    images, label = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int64)
    ignore = torch.zeros(2, 16, 16, dtype=torch.bool)
    label[0, 3], ignore[1, 5] = 255, True
    mixed = batches.cutmix(views, box)
    batch = batches.Batch(images, label, views, torch.cat([ignore, ignore]), mixed, ignore, box)

    def teacher(x):
        return models.Output(net(x), net(x))

    def outputs(threshold):
        return distill.teacher_outputs(teacher, batch, {"pseudo_labels_l", "pseudo_labels_u"}, threshold=threshold)

    plain, sure = outputs(0.0), outputs(0.5)

    def probability(maps):
        return F.interpolate(net(maps), (16, 16), mode="bilinear", align_corners=True).softmax(1).amax(1).detach()

    for name, probabilities, ignored in (
        ("pseudo_labels_l", probability(images), label == 255),
        ("pseudo_labels_u", batches.cutmix(probability(views), box), ignore),
    ):
        unsure = (probabilities < 0.5) & ~ignored
        assert 0.1 < unsure.float().mean() < 0.9
        assert torch.equal(getattr(sure, name), getattr(plain, name).masked_fill(unsure, 255))
    # they count for the mean, as pixels without loss
    student = models.Output(torch.randn(2, 3, 4, 4), None)
    valid = torch.tensor([(label != 255).sum() / 1.0, (~ignore).sum() / 1.0])
    terms = distill_losses.mgd_losses(student, student, batch, {"T_D": sure}, valid, losses=["sup", "pixel"], ohem=False)
    full = F.interpolate(student.logits, (16, 16), mode="bilinear", align_corners=True)
    for term, maps, count in (("pixel_l", sure.pseudo_labels_l, valid[0]), ("pixel_u", sure.pseudo_labels_u, valid[1])):
        expected = F.cross_entropy(full, maps, ignore_index=255, reduction="sum") / count
        torch.testing.assert_close(terms[term], expected)


def test_teachers_with_folded_batch_norm_have_the_same_outputs(teachers):
    dataset, args = datasets.Shapes(), argparse.Namespace(image_scale=1.0)
    for path in teachers:
        teacher, _ = distill.load_teacher(path, dataset, args, torch.device("cpu"))
        plain, folded = teacher, models.fold_batch_norm(teacher)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            for a, b in zip(plain(images), folded(images), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            folded = models.fold_batch_norm(teacher, "bf16")
            with torch.autocast("cpu", torch.bfloat16):
                for a, b in zip(plain(images), folded(images), strict=True):
                    torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05 * float(a.abs().max()))


def test_batch_norm_in_training_mode_leaves_the_teachers_statistics_alone(teachers):
    dataset, args = datasets.Shapes(), argparse.Namespace(image_scale=1.0)
    teacher, checkpoint = distill.load_teacher(teachers[0], dataset, args, torch.device("cpu"))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        still = teacher(images).logits
        distill.set_batch_norm_training(teacher)
        moving = teacher(images).logits
    assert not torch.allclose(still, moving)
    assert all(torch.equal(v, checkpoint["model"][k]) for k, v in teacher.state_dict().items())
    with pytest.raises(common.UserError, match=r"--image-scale 1.0, not 0.5"):
        distill.load_teacher(teachers[0], dataset, argparse.Namespace(image_scale=0.5), torch.device("cpu"))


@pytest.mark.slow
def test_what_is_kept_is_the_moving_average_of_the_weights(script, teachers, tmp_path, monkeypatch):
    """Its closed form, from the weights after each step."""
    networks, after = [], []

    def guard(nets, optimizers):
        networks.append(nets[0])
        return FiniteSteps(nets, optimizers)

    monkeypatch.setattr(distill, "FiniteSteps", guard)
    monkeypatch.setattr(
        distill, "save_or_stop", lambda *_: after.append({k: v.double() for k, v in networks[-1].state_dict().items()})
    )
    assert script(distill, *distill_args(tmp_path / "with", teachers, "--ema-decay", "0.2"))[0] == 0
    expected = after[0]
    for t, weights_after in enumerate(after[1:], 1):
        decay = min(0.2, (1 + t) / (10 + t))
        expected = {k: decay * v + (1 - decay) * weights_after[k] for k, v in expected.items()}
    kept = weights(tmp_path / "with" / "last.pt")
    for key, value in kept.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-7)
    assert script(distill, *distill_args(tmp_path / "without", teachers))[0] == 0
    assert all(torch.equal(v.double(), after[3][k]) for k, v in weights(tmp_path / "without" / "last.pt").items())
    assert not same_weights(tmp_path / "with" / "last.pt", tmp_path / "without" / "last.pt")
    losses = [[entry for entry in log(tmp_path / name) if "miou" not in entry] for name in ("with", "without")]
    assert losses[0] == losses[1]


OFF = {
    "logit_adjustment": 0,
    "ema_decay": 0,
    "conf_thresh": 0,
    "soft_labels": 0,
    "refine": 0,
    "lambda_schedule": "constant",
    "lambda_relative": 0,
}


def as_flags(values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@pytest.mark.slow
def test_what_is_switched_off_changes_nothing(script, teachers, tmp_path):
    """Also of MGD+, which is MGD with other defaults."""
    assert recipes.OF_METHOD["mgd+"].keys() <= OFF.keys()
    off = as_flags(OFF)
    for name, options in (("plain", []), ("off", off), ("plus off", ["--method", "mgd+", *off])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *options, "--steps", "2"))[0] == 0
        assert same_weights(tmp_path / "plain" / "last.pt", tmp_path / name / "last.pt")
    plain, off = log(tmp_path / "plain")[0], log(tmp_path / "off")[0]
    assert {key: off[key] for key in plain} == plain
    for name, options in (("mgd", as_flags(recipes.OF_METHOD["mgd+"])), ("mgd+", ["--method", "mgd+"])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *options, "--steps", "2"))[0] == 0
        assert run_folder.load_checkpoint(tmp_path / name / "last.pt")["row"]["method"] == name
    assert same_weights(tmp_path / "mgd" / "last.pt", tmp_path / "mgd+" / "last.pt")
    assert not same_weights(tmp_path / "mgd" / "last.pt", tmp_path / "plain" / "last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mgd", "kd"])
def test_refine_ends_on_the_ground_truth_alone(script, teachers, tmp_path, method, monkeypatch):
    """Its first steps, and the learning rate, are those of a run without it; then no teacher runs and no view is drawn."""
    calls, draws = [], []
    run_teacher, batches_of = distill.teacher_outputs, distill.step_batches
    monkeypatch.setattr(distill, "teacher_outputs", lambda *args, **more: calls.append(args) or run_teacher(*args, **more))
    monkeypatch.setattr(distill, "step_batches", lambda *args: draws.append(args[4] is not None) or batches_of(*args))
    for name, options in (("whole", []), ("refined", ["--refine", "0.4"])):  # 4 steps: the last 1.6, rounded
        calls.clear(), draws.clear()
        code, out, err = script(distill, *distill_args(tmp_path / name, teachers, "--method", method, *options))
        assert code == 0, err
        assert ("the ground truth alone after step 2" in out) == (name == "refined")
    assert len(calls) == 4 and draws == [True, True, False, False]
    whole, refined = log(tmp_path / "whole"), log(tmp_path / "refined")
    assert refined[:2] == whole[:2] and [entry["lr"] for entry in refined[:4]] == [entry["lr"] for entry in whole[:4]]
    assert refined[2]["sup"] == whole[2]["sup"]  # of the same weights
    assert all(entry.keys() == {"step", "lr", "sup", "loss"} and entry["sup"] == entry["loss"] for entry in refined[2:4])
    assert not same_weights(tmp_path / "whole" / "last.pt", tmp_path / "refined" / "last.pt")


@pytest.mark.slow
def test_the_weights_of_the_levels_follow_their_schedule(script, teachers, tmp_path):
    """Every step's loss is Eq. 7 with its own λ1 and λ2; steps of --refine are not of the schedule."""
    options = ["--lambda-schedule", "decay", "--lambda-image", "0.5", "--lambda-region", "3", "--refine", "0.2"]
    assert script(distill, *distill_args(tmp_path / "x", teachers, *options, "--steps", "5"))[0] == 0
    for entry, factor in zip(log(tmp_path / "x")[:4], [1, 3 / 4, 1 / 2, 1 / 4], strict=True):
        assert entry["lambda_image"] == pytest.approx(0.5 * factor) and entry["lambda_region"] == pytest.approx(3 * factor)
        total = entry["sup"] + entry["pixel_l"] + entry["pixel_u"]
        total += 0.5 * factor * entry["image"] + 3 * factor * entry["region"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_relative_weights_are_in_the_log_and_in_the_loss(script, teachers, tmp_path):
    assert script(distill, *distill_args(tmp_path / "x", teachers, "--lambda-relative", "0.5"))[0] == 0
    entries = log(tmp_path / "x")[:4]
    assert entries[0]["lambda_image"] == entries[0]["lambda_region"] == 0
    for entry in entries[1:]:
        assert entry["lambda_image"] > 0 and entry["lambda_region"] > 0
        total = entry["sup"] + entry["pixel_l"] + entry["pixel_u"]
        total += entry["lambda_image"] * entry["image"] + entry["lambda_region"] * entry["region"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_the_plan_counts_soft_labels(script, teachers, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(distill, "print_plan", lambda *args: needed.append(args[4]))
    for i, options in enumerate(([], ["--soft-labels", "1"], ["--soft-labels", "1", "--losses", "sup", "region:T_W"])):
        given = distill_args(tmp_path / str(i), teachers, *options, "--steps", "1")
        given = given if i < 2 else [word for word in given if word not in ("--deep", teachers[0])]
        assert script(distill, *given)[0] == 0
    whole = 4 * 2 * 6 * 48 * 48  # bytes of a map of two images and six classes
    assert needed[1] - needed[0] >= 2 * 2 * whole * 0.9 and needed[2] == needed[0]
    files = ["--pseudo-labels", maps_of_shapes(tmp_path / "maps")]
    for name, options in (("hard", []), ("soft", ["--soft-labels", "1"])):  # files have none
        assert script(distill, "--out", tmp_path / name, *TINY, "--steps", "1", *files, *options)[0] == 0
    assert needed[3] == needed[4]


@pytest.mark.slow
def test_resume_of_mgd_plus_with_all_flags_equals_an_uninterrupted_run(script, teachers, tmp_path):
    """The resume point lies before the steps of --refine."""
    more = ["--method", "mgd+", "--lambda-relative", "0.3", "--conf-thresh", "0.2", "--refine", "0.3", *AVERAGED]
    arguments = ["--deep", teachers[0], "--wide", teachers[1], *TINY, "--steps", "6", "--save-every", "3", *more]
    resume_equals_uninterrupted(script, distill, arguments, tmp_path)


def test_a_flag_that_switches_off_is_one_that_is_left_out():
    """So a run can be resumed with either, and both stand in one row of a table."""
    plain = ["--out", "out", "--deep", "deep.pt", "--wide", "wide.pt"]
    off = [
        "--logit-adjustment",
        "0",
        "--ema-decay",
        "0",
        "--conf-thresh",
        "0",
        "--soft-labels",
        "0",
        "--refine",
        "0",
        "--no-strong-views",
    ]
    off += ["--lambda-relative", "0", "--lambda-schedule", "constant"]
    assert distill.parse_args(plain + off) == distill.parse_args(plain)
    assert distill.parse_args([*plain, "--method", "mgd+", *off]).logit_adjustment is None


@pytest.mark.slow
def test_a_run_is_resumed_in_its_steps_of_refine(script, teachers, tmp_path, monkeypatch):
    arguments = ["--method", "mgd+", "--lambda-relative", "0.3", "--refine", "0.5", "--save-every", "1", *AVERAGED]
    assert script(distill, *distill_args(tmp_path / "whole", teachers, *arguments))[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, distill, 3)
        assert script(distill, *distill_args(tmp_path / "cut", teachers, *arguments))[0] == 130
    assert script(distill, *distill_args(tmp_path / "cut", teachers, *arguments, "--resume"))[0] == 0
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


@pytest.mark.slow
def test_resume_of_distillation_equals_an_uninterrupted_run(script, teachers, tmp_path):
    arguments = ["--deep", teachers[0], "--wide", teachers[1], *TINY, "--steps", "6", "--save-every", "3"]
    resume_equals_uninterrupted(script, distill, arguments, tmp_path)


def test_a_student_does_not_go_on_with_teachers_trained_anew(script, teachers, tmp_path, monkeypatch):
    teacher = run_folder.load_checkpoint(teachers[0])
    run_folder.save_checkpoint(tmp_path / "teacher.pt", teacher)
    arguments = ["--out", tmp_path / "x", "--deep", tmp_path / "teacher.pt", *TINY, "--steps", "2", "--save-every", "1"]
    interrupt_at(monkeypatch, distill, 1)
    assert script(distill, *arguments)[0] == 130
    teacher["row"]["miou"] += 1
    run_folder.save_checkpoint(tmp_path / "teacher.pt", teacher)
    code, _, err = script(distill, *arguments, "--resume")
    assert code == 2 and "resume.pt: was trained with different teachers than --deep and --wide" in err
    assert (tmp_path / "x" / "resume.pt").exists()


def test_a_teacher_is_called_by_the_flag_it_is_given_under(script, teachers, tmp_path):
    """Whatever it was trained as."""
    assert script(distill, *distill_args(tmp_path / "x", teachers[::-1], "--steps", "1"))[0] == 0
    row = run_folder.load_checkpoint(tmp_path / "x" / "last.pt")["row"]
    assert row["teachers"] == ["T_D", "T_W"] and row["teacher_roles"] == ["teacher_wide", "teacher_deep"]


# ---- pseudo labels of files ----


class NoFlip(np.random.Generator):
    """Never below a half, at which an image is mirrored."""

    def random(self):
        return 0.9


def test_files_that_a_teacher_predicted_are_that_teacher(script, few, learned_teachers, tmp_path, monkeypatch):
    """Where the crop is the whole image at scale 1, not mirrored, in float32."""
    wanted = ["--window", "whole", "--precision", "fp32"]
    code, _, err = script(predict, "--ckpt", learned_teachers[0], "--images", few / "images", "--out", tmp_path / "p", *wanted)
    assert code == 0, err
    monkeypatch.setattr(np.random, "default_rng", lambda seed: NoFlip(np.random.PCG64(seed)))
    arguments = ["--data", few, *LEARNING, "--steps", "3", "--losses", "sup", "pixel"]
    given = {"network": ["--deep", learned_teachers[0]], "files": ["--pseudo-labels", tmp_path / "p" / "masks"]}
    for name, teacher in given.items():
        code, _, err = script(distill, "--out", tmp_path / name, *arguments, *teacher)
        assert code == 0, err
    network, files = (log(tmp_path / name) for name in given)
    for ours, theirs in zip(files, network, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert network[0]["pixel_l"] > 0 and network[0]["pixel_u"] > 0
    row = run_folder.load_checkpoint(tmp_path / "files" / "last.pt")["row"]
    assert row["teachers"] == ["pseudo labels"] and row["teacher_labels"] == "unknown" and row["teacher_methods"] == []
    assert row["losses"] == ["sup", "pixel"] and len(row["pseudo_labels"]) == 12
    code, _, err = script(distill, "--out", tmp_path / "both", *arguments, *given["network"], *given["files"])
    both = log(tmp_path / "both")
    assert code == 0 and both[0]["sup"] == pytest.approx(network[0]["sup"])
    for term in ("pixel_l", "pixel_u"):
        assert both[0][term] == pytest.approx(2 * network[0][term], rel=1e-4)
    row = run_folder.load_checkpoint(tmp_path / "both" / "last.pt")["row"]
    assert row["teachers"] == ["T_D", "pseudo labels"] and row["teacher_methods"] == ["sup"]


def maps_of_shapes(folder) -> pathlib.Path:
    """Maps of one image in eight."""
    data = datasets.Shapes()
    for name in data.train:
        if int(name[-4:]) % 8 == 1:
            save_mask(folder / f"{name}.png", data.mask(name))
    return folder


def test_a_student_does_not_go_on_with_other_files(script, tmp_path, monkeypatch):
    maps = maps_of_shapes(tmp_path / "maps")
    arguments = ["--out", tmp_path / "x", *TINY, "--steps", "2", "--save-every", "1"]
    interrupt_at(monkeypatch, distill, 1)
    assert script(distill, *arguments, "--pseudo-labels", maps)[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr(backbones, "build_backbone", tiny.tiny_backbone)
    shutil.copytree(maps, tmp_path / "other")
    said = errors(script, distill, *arguments, "--resume", "--pseudo-labels", tmp_path / "other")
    assert f"resume.pt: was trained with --pseudo-labels {maps}, not {tmp_path / 'other'}" in said
    (maps / "train-0001.png").unlink()
    said = errors(script, distill, *arguments, "--resume", "--pseudo-labels", maps)
    assert re.search(r"resume.pt: was trained with pseudo labels \w{12}, not \w{12} \(the files in .*maps have changed\)", said)
    shutil.copy(tmp_path / "other" / "train-0001.png", maps)
    assert script(distill, *arguments, "--resume", "--pseudo-labels", maps)[0] == 0


@pytest.mark.slow
def test_resume_with_files_and_strong_views_equals_an_uninterrupted_run(script, teachers, tmp_path):
    maps = maps_of_shapes(tmp_path / "maps")
    arguments = ["--deep", teachers[0], "--pseudo-labels", maps, "--strong-views"]
    resume_equals_uninterrupted(script, distill, [*arguments, *TINY, "--steps", "6", "--save-every", "3"], tmp_path)


def test_a_student_learns_from_files_alone(script, few, tmp_path):
    """Of the unlabeled images, whose masks no training opens."""
    shutil.copytree(few / "masks", tmp_path / "maps")
    arguments = ["--data", few, *LEARNING, "--pseudo-labels", tmp_path / "maps", "--strong-views"]
    code, _, err = script(distill, "--out", tmp_path / "x", *arguments, "--losses", "sup", "pixel:unlabeled")
    assert code == 0, err
    assert_it_learns(tmp_path / "x", ["sup", "pixel_u"], falls_to=0.5, miou=65)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_twice_and_workers_change_nothing(script, teachers, tmp_path):
    for name, more in (("a", []), ("b", ["--workers", "1"]), ("c", ["--seed", "1"])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *more))[0] == 0
    assert log(tmp_path / "a") == log(tmp_path / "b") != log(tmp_path / "c")
