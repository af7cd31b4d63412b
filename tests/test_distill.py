"""Distillation: the choice of losses, the teachers' outputs, and the runs."""

import argparse

import pytest
import torch
from conftest import (
    LEARNING,
    TINY,
    assert_it_learns,
    distill_args,
    errors,
    interrupt_at,
    log,
    resume_equals_uninterrupted,
    same_weights,
    weights,
)

import batches
import common
import datasets
import distill
import distill_losses
import models
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
        ("--deep D --losses sup texture", "unknown loss 'texture'; choose from sup, pixel"),
        ("--deep D --method kd --losses sup pixel", "--losses: is for --method mgd"),
        ("--deep D --method cwd --temperature 0", "--temperature 0.0: must be above 0"),
        ("--deep D --method kd --kd-weight -1", "--kd-weight -1.0: must be at least 0"),
        ("--deep D --lambda-region -1", "--lambda-region -1.0: must be at least 0"),
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
])  # fmt: skip
def test_a_weight_of_a_loss_that_is_not_used_is_said(capsys, options, said):
    distill.parse_args(["--out", "x", "--deep", "D", *options.split()])
    assert capsys.readouterr().err == said


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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_twice_and_workers_change_nothing(script, teachers, tmp_path):
    for name, more in (("a", []), ("b", ["--workers", "1"]), ("c", ["--seed", "1"])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *more))[0] == 0
    assert log(tmp_path / "a") == log(tmp_path / "b") != log(tmp_path / "c")
