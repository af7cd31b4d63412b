"""Every stage as a user runs it, small."""

import json
import pathlib
import subprocess

import pytest
import torch
from conftest import TINY
from PIL import Image

import common
import distill
import evaluate
import train_teacher

ROOT = pathlib.Path(common.__file__).parent


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Checkpoints of a deep and a wide teacher on `shapes`, hardly trained."""
    out = tmp_path_factory.mktemp("teachers")
    monkeypatch = pytest.MonkeyPatch()
    for role, backbone in (("deep", "r18"), ("wide", "mbv2")):
        argv = ["train_teacher.py", "--out", str(out / role), "--role", f"teacher_{role}", "--backbone", backbone,
                "--steps", "4", "--sup-only", "0.5", "--ramp-up", "0.5", *TINY]  # fmt: skip
        monkeypatch.setattr("sys.argv", argv)
        train_teacher.main()
    monkeypatch.undo()
    return out / "deep" / "last.pt", out / "wide" / "last.pt"


def distill_args(out, teachers, *more):
    return ["--out", out, "--deep", teachers[0], "--wide", teachers[1], "--steps", "4", *TINY, *more]


def log(out):
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("images_per_s", "data_wait")} for e in entries]


def same_weights(a, b):
    a, b = (torch.load(p, weights_only=True)["model"] for p in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("student", ["r18", "mbv2"])
def test_distil_and_evaluate(script, teachers, tmp_path, student, monkeypatch):
    before = [torch.load(path, weights_only=True)["model"] for path in teachers]
    frozen = []
    original = distill.load_teacher

    def load_teacher(*args):
        frozen.append(original(*args))
        return frozen[-1]

    monkeypatch.setattr(distill, "load_teacher", load_teacher)
    code, out, err = script(distill, *distill_args(tmp_path / "mgd", teachers, "--student", student))
    assert code == 0, err
    assert out.index("T_D cps resnet18") < out.index("T_W cps mobilenetv2") < out.index("mgd 1/4")
    for (teacher, _), state in zip(frozen, before, strict=True):
        after = teacher.state_dict()
        assert all(torch.equal(after[key], state[key]) for key in state)  # weights and batch-norm statistics

    ckpt = tmp_path / "mgd" / "last.pt"
    code, out, err = script(
        evaluate, "--ckpt", ckpt, "--compare", *teachers, "--json", tmp_path / "r.json", "--panels", tmp_path / "p.png"
    )
    assert code == 0, err
    assert f"MGD {common.load_checkpoint(ckpt)['row']['backbone']}" in out and str(tmp_path / "p.png") in out
    result = json.loads((tmp_path / "r.json").read_text())
    row = result["rows"][0]
    assert {"dataset", "partition", "partition_hash", "labeled", "method", "role", "backbone", "head_width", "weights", "crop",
            "seed", "steps", "seconds", "teachers", "teacher_labels", "losses", "regions", "gmacs_backbone", "gmacs_model",
            "miou", "iou"} <= row.keys()  # fmt: skip
    assert row["teachers"] == ["resnet18", "mobilenetv2"] and row["teacher_labels"] == "partition" and row["steps"] == 4
    assert row["miou"] == common.load_checkpoint(ckpt)["row"]["miou"]  # evaluation and training agree to the last digit
    assert Image.open(tmp_path / "p.png").size[0] > 400


@pytest.mark.parametrize("options", [["--no-cutmix"], ["--teacher-bn", "train", "--image-reduction", "mean"]])
def test_distillation_options_change_the_terms_they_name(script, teachers, tmp_path, options):
    assert script(distill, *distill_args(tmp_path / "a", teachers))[0] == 0
    assert script(distill, *distill_args(tmp_path / "b", teachers, *options))[0] == 0
    first, other = log(tmp_path / "a")[0], log(tmp_path / "b")[0]
    changed = {key for key in first if first[key] != other[key]}
    if options == ["--no-cutmix"]:
        assert changed == {"pixel_u", "image", "region"}
    else:
        assert {"image", "pixel_l"} <= changed and not changed & {"sup", "lr"}


def test_batch_norm_in_training_mode_leaves_the_teachers_statistics_alone(teachers):
    dataset = distill.datasets.Shapes()
    teacher, checkpoint = distill.load_teacher(teachers[0], dataset, torch.device("cpu"))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        still = teacher(images).logits
        distill.set_batch_norm_training(teacher)
        moving = teacher(images).logits
    assert not torch.allclose(still, moving)
    assert all(torch.equal(v, checkpoint["model"][k]) for k, v in teacher.state_dict().items())


def interrupt_at(monkeypatch, module, step):
    original = module.poly_lr

    def poly_lr(now, *rest):
        if now == step:
            raise KeyboardInterrupt
        return original(now, *rest)

    monkeypatch.setattr(module, "poly_lr", poly_lr)


def resume_equals_uninterrupted(script, module, arguments, tmp_path):
    assert script(module, "--out", tmp_path / "whole", *arguments)[0] == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_at(monkeypatch, module, 5)
        assert script(module, "--out", tmp_path / "cut", *arguments)[0] == 130
    assert (tmp_path / "cut" / "resume.pt").exists() and not (tmp_path / "cut" / "last.pt").exists()
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--steps", "7", "--resume")
    assert code == 2 and "--steps 6, not 7" in err
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--part", "1/4", "--resume")
    assert code == 2 and "--part 1/8, not 1/4" in err
    assert script(module, "--out", tmp_path / "cut", *arguments, "--resume")[0] == 0
    assert not (tmp_path / "cut" / "resume.pt").exists()
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


@pytest.mark.parametrize("sup_only", [0, 0.8])  # the last steps' unlabeled images start after the resume, or before it
def test_resume_of_cps_equals_an_uninterrupted_run(script, tmp_path, sup_only):
    arguments = ["--backbone", "r18", *TINY, "--steps", "6", "--save-every", "3", "--sup-only", sup_only, "--ramp-up", sup_only]
    resume_equals_uninterrupted(script, train_teacher, arguments, tmp_path)


def test_resume_of_distillation_equals_an_uninterrupted_run(script, teachers, tmp_path):
    arguments = ["--deep", teachers[0], "--wide", teachers[1], *TINY, "--steps", "6", "--save-every", "3"]
    resume_equals_uninterrupted(script, distill, arguments, tmp_path)


def test_the_same_seed_gives_the_same_losses_twice_and_workers_change_nothing(script, teachers, tmp_path):
    for name, more in (("a", []), ("b", ["--workers", "1"]), ("c", ["--seed", "1"])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *more))[0] == 0
    assert log(tmp_path / "a") == log(tmp_path / "b") != log(tmp_path / "c")


def test_cps_keeps_its_first_network_and_its_terms(script, tmp_path):
    arguments = ["--out", tmp_path / "cps", "--backbone", "r18", *TINY, "--steps", "4"]
    assert script(train_teacher, *arguments, "--sup-only", "0.5", "--ramp-up", "0.5")[0] == 0
    entries = log(tmp_path / "cps")
    assert ["cps" in e for e in entries[:4]] == [False, False, True, True]
    assert "peer" not in torch.load(tmp_path / "cps" / "last.pt", weights_only=True)
    row = common.load_checkpoint(tmp_path / "cps" / "last.pt")["row"]
    assert row["method"] == "cps" and row["labeled"] == 64 and row["losses"] == ["sup", "cps"]


def test_folder_data_from_training_to_evaluation_without_the_unlabeled_masks(script, folder, tmp_path):
    part = distill.datasets.partition(distill.datasets.Folder(folder), "1/4")
    for name in part.unlabeled:
        (folder / "masks" / f"{name}.png").unlink(missing_ok=True)
    data = ["--dataset", "folder", "--data", folder, "--part", "1/4", "--weights", "none", "--steps", "2", *TINY]
    assert script(train_teacher, "--out", tmp_path / "t", "--backbone", "r18", *data)[0] == 0
    teachers = (tmp_path / "t" / "last.pt",) * 2
    assert script(distill, *distill_args(tmp_path / "s", teachers), *data)[0] == 0
    code, out, _ = script(evaluate, "--ckpt", tmp_path / "s" / "last.pt")
    assert code == 0 and all(name in out for name in ("road", "tree", "car"))
    row = common.load_checkpoint(tmp_path / "s" / "last.pt")["row"]
    assert row["labeled"] == 3 and row["partition_hash"] == part.hash


def errors(script, module, *arguments):
    code, _, err = script(module, *arguments)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


def test_bad_input_is_one_line_and_exit_code_2(script, teachers, folder, tmp_path):
    run = ["--out", tmp_path / "x", *TINY, "--steps", "2"]
    mine = ["--dataset", "folder", "--data", folder, "--weights", "none"]
    assert "absent: no such folder" in errors(script, train_teacher, *run, "--dataset", "folder", "--data", tmp_path / "absent")
    assert "--data DIR" in errors(script, train_teacher, *run, "--dataset", "folder")
    assert "unknown backbone 'vgg'" in errors(script, train_teacher, *run, "--backbone", "vgg")
    assert "--stem" in errors(script, train_teacher, *run, "--stem", "odd")
    assert "--batch 1" in errors(script, train_teacher, *run, "--batch", "1")
    assert "--steps 0" in errors(script, train_teacher, *run, "--steps", "0")
    assert "--part 2/3" in errors(script, train_teacher, *run, "--part", "2/3")
    assert "no unlabeled image" in errors(script, train_teacher, *run, "--part", "1")
    assert "6 classes, but the data set has 3" in errors(script, distill, *distill_args(tmp_path / "x", teachers), *mine)
    assert "no such checkpoint" in errors(script, distill, *distill_args(tmp_path / "x", ("absent.pt", "absent.pt")))
    assert "unknown backbone" in errors(script, distill, *distill_args(tmp_path / "x", teachers, "--student", "vgg"))
    assert "--regions 0" in errors(script, distill, *distill_args(tmp_path / "x", teachers, "--regions", "0"))
    assert "no such checkpoint" in errors(script, evaluate, "--ckpt", tmp_path / "absent.pt")
    assert "not finite" in errors(script, train_teacher, "--out", tmp_path / "x", "--method", "sup", *TINY, "--steps", "9",
                                  "--lr", "1e30")  # fmt: skip
    assert not (tmp_path / "x" / "last.pt").exists()
    (folder / "images" / "im00.png").unlink()
    assert "im00" in errors(script, train_teacher, *run, *mine)


def make(*arguments):
    done = subprocess.run(["make", "--no-print-directory", "-n", "VENV=", "PYTHON=python", *arguments], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.splitlines()


def test_make_distil_trains_missing_teachers_first(tmp_path):
    lines = make("distill", "PART=1/8", "STUDENT=mbv2", f"DATA={tmp_path}/mine", "DATASET=folder", "SEED=2")
    assert [line.split()[1] for line in lines] == ["train_teacher.py", "train_teacher.py", "distill.py"]
    assert "--out runs/mine/1-8/teacher-deep-s2" in lines[0] and "--role teacher_deep" in lines[0]
    assert "--out runs/mine/1-8/mgd-mbv2-s2" in lines[2] and "--student mbv2" in lines[2] and "--part 1/8" in lines[2]
    assert "--deep runs/mine/1-8/teacher-deep-s2/last.pt --wide runs/mine/1-8/teacher-wide-s2/last.pt" in lines[2]


def test_make_passes_arguments_on():
    lines = make(
        "compare", "DATA=/x/new", "DATASET=folder", "ARGS=--lr 1", "TEACHER_ARGS=--sup-only 0", "STUDENT_ARGS=--regions 3"
    )
    train = [line for line in lines if "train_teacher.py" in line]
    assert len(train) == 4 and all("--lr 1" in line for line in train)
    assert ["--sup-only 0" in line for line in train if "--role teacher" in line] == [True, True]
    assert [line for line in lines if "--regions 3" in line] == [line for line in lines if "distill.py" in line]
