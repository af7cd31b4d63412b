"""Every stage as a user runs it, small."""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, NO_GPU, ROOT, TINY
from PIL import Image

import common
import datasets
import distill
import evaluate
import models
import train_teacher

# for several processes on a small machine
ONE_THREAD = {**os.environ, **NO_GPU, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights(path):
    return torch.load(path, weights_only=True)["model"]


# Batch norm in evaluation mode, so that a share's images do not depend on the others; one step of plain descent, so that
# the weights tell the gradient; two val images.
ALONE = """
import sys, torch, datasets, {script}
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
datasets.Shapes.__init__.__defaults__ = (512, 2)
{script}.main()
"""


@pytest.mark.parametrize("script_name,options", [
    ("train_teacher", ["--backbone", "r18", "--sup-only", "0", "--ramp-up", "0", "--threshold", "0.17"]),
    ("train_teacher", ["--backbone", "r18", "--sup-only", "0", "--ramp-up", "0", "--method", "mt"]),
    ("distill", []), ("distill", ["--method", "kd"]), ("distill", ["--losses", "sup", "pixel:unlabeled", "region:T_W"]),
])  # fmt: skip
def test_any_number_of_ranks_and_shares_gives_the_gradient_of_the_joined_batch(teachers, tmp_path, script_name, options):
    """Crops larger than the images, so that shares differ in their valid pixels."""
    if script_name == "distill":
        options = ["--deep", teachers[0], "--wide", teachers[1], *options]
    program = tmp_path / "program.py"
    program.write_text(ALONE.format(script=script_name))
    # Mean Teacher's average is the network itself at the first step
    schedule = ["--steps", "2", "--lr", "0.1", "--log-every", "2"] if "mt" in options else ["--steps", "1", "--lr", "1"]
    arguments = [*TINY, *options, "--batch", "12", "--crop", "72", "--precision", "fp32", *schedule]
    logs = {}
    more = [(1, 3), (3, 1)] if "--threshold" in options or not options[4:] else []
    for ranks, parts in [(1, 1), (2, 2), *more]:
        out = tmp_path / f"{ranks}-{parts}"
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launch, program, *map(str, [*arguments, "--out", out, "--accumulate", parts])]
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("SyncBatchNorm needs GPUs" in done.stdout) == (ranks > 1)
        logs[out] = log(out)[0]
    expected, *others = logs
    moved = [(key, value) for key, value in weights(expected / "last.pt").items() if value.is_floating_point()]
    for other in others:
        assert logs[other] == pytest.approx(logs[expected], rel=1e-4)
        for key, value in moved:
            torch.testing.assert_close(weights(other / "last.pt")[key], value, rtol=1e-3, atol=1e-5, msg=f"{other.name} {key}")


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no nvcc")
@pytest.mark.parametrize("stage,options", [
    (train_teacher, ["--method", "sup"]), (train_teacher, ["--method", "cps", "--sup-only", "0", "--ramp-up", "0"]),
    (train_teacher, ["--method", "mt", "--sup-only", "0", "--ramp-up", "0"]), (distill, ["--method", "mgd", "--grad-norms"]),
    (distill, ["--method", "kd"]), (distill, ["--method", "cwd"]),
], ids=lambda options: options[1] if isinstance(options, list) else "")  # fmt: skip
def test_a_gpu_starts_as_the_cpu_does(script, teachers, tmp_path, stage, options):
    """The losses of the first step, until which all is drawn on the CPU; TF32 has ten bits."""
    if stage is distill:
        options = [*options, "--deep", teachers[0], "--wide", teachers[1]]
    first = []
    for device in ("cpu", "cuda"):
        arguments = ["--out", tmp_path / device, *TINY, *options, "--steps", "2", "--precision", "fp32", "--device", device]
        code, _, err = script(stage, *arguments)
        assert code == 0, err
        entry = next(entry for entry in log(tmp_path / device) if "lr" in entry)
        first.append({key: entry[key] for key in entry if key not in ("images_per_s", "data_wait")})
    assert "sup" in first[0] and first[1] == pytest.approx(first[0], rel=0.02)
    code, out, err = script(evaluate, "--ckpt", tmp_path / "cuda" / "last.pt", "--device", "cuda")
    assert code == 0 and "mIoU" in out, err


def test_compile_falls_back_with_one_line(script, tmp_path, monkeypatch):
    def no_compiler(*args, **more):
        raise RuntimeError("Failed to find C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    arguments = ["--out", tmp_path / "x", "--method", "sup", *TINY, "--steps", "1", "--compile"]
    code, out, _ = script(train_teacher, *arguments)
    assert code == 0 and "note: --compile is not possible here, going on without: Failed to find C++ compiler\n" in out


def test_a_rank_that_dies_ends_the_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, train_teacher\noriginal = train_teacher.poly_lr\n"
                       "def poly_lr(step, *rest):\n    if os.environ['RANK'] == '1' and step == 1:\n"
                       "        raise RuntimeError('rank 1 is gone')\n    return original(step, *rest)\n"
                       "train_teacher.poly_lr = poly_lr\ntrain_teacher.main()\n")  # fmt: skip
    arguments = ["--out", tmp_path / "x", "--method", "sup", *TINY, "--batch", "4", "--steps", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, *arguments]
    done = subprocess.run([*map(str, command)], env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "rank 1 is gone" in done.stderr


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
    assert row["teachers"] == ["T_D", "T_W"] and row["teacher_backbones"] == ["resnet18", "mobilenetv2"]
    assert row["teacher_labels"] == "partition" and row["steps"] == 4
    assert row["miou"] == common.load_checkpoint(ckpt)["row"]["miou"]  # evaluation and training agree to the last digit
    assert Image.open(tmp_path / "p.png").size[0] > 400


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


def test_gradient_norms_are_those_of_the_weighted_terms(script, teachers, tmp_path):
    student = torch.nn.Linear(2, 1)  # a term c · Σ weights has the gradient c everywhere, and none for the bias
    terms = {name: c * student.weight.sum() for name, c in (("sup", 3.0), ("image", -2.0), ("cwd", 0.5))}
    norms = distill.gradient_norms(terms, student, argparse.Namespace(lambda_image=0.1, kd_weight=10))
    assert norms == pytest.approx({"grad_sup": 3 * 2**0.5, "grad_image": 0.2 * 2**0.5, "grad_cwd": 5 * 2**0.5})
    assert student.weight.grad is None
    for name, flags in (("with", ["--grad-norms"]), ("without", [])):
        assert script(distill, *distill_args(tmp_path / name, teachers, *flags))[0] == 0
    assert same_weights(tmp_path / "with" / "last.pt", tmp_path / "without" / "last.pt")
    norms = log(tmp_path / "with")[0]
    terms = ["sup", "pixel_l", "pixel_u", "image", "region"]
    assert {key for key in norms if key != "step"} == {f"grad_{name}" for name in [*terms, "loss"]}
    assert 0 < norms["grad_loss"] < sum(norms[f"grad_{name}"] for name in terms)


EVERYTHING = "sup pixel image:T_D image:T_W region:T_D region:T_W"


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
        entry, row = log(tmp_path / str(i))[0], common.load_checkpoint(tmp_path / str(i) / "last.pt")["row"]
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


@pytest.mark.parametrize("options,said", [
    ("", "a teacher is needed: give --deep FILE"),
    ("--deep D --losses sup", "uses no teacher; that is train_teacher.py --method sup"),
    ("--deep D --losses pixel", "add sup"),
    ("--deep D --losses sup pixel image:T_W", "'image:T_W' needs that teacher; give --wide FILE"),
    ("--wide D --losses sup region:T_D", "'region:T_D' needs that teacher; give --deep FILE"),
    ("--deep D --wide W --losses sup image:T_D", "uses nothing of T_W; leave --wide out"),
    ("--deep D --losses sup pixel pixel:labeled", "names a loss twice"),
    ("--deep D --losses sup texture", "unknown loss 'texture'; choose of sup, pixel"),
    ("--deep D --method kd --losses sup pixel", "--losses: chooses among those of --method mgd"),
    ("--deep D --method cwd --temperature 0", "--temperature 0.0: must be above 0"),
    ("--deep D --method kd --kd-weight -1", "--kd-weight -1.0: must be at least 0"),
    ("--deep D --lambda-region -1", "--lambda-region -1.0: must be at least 0"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(script, tmp_path, options, said):
    assert said in errors(script, distill, "--out", tmp_path / "x", *TINY, *options.split())


def test_baselines_follow_their_formulas():
    """KD, CWD and Mean Teacher against loops over the definitions, in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    T = 2.5

    def divergence(p_logits, q_logits):  # of one distribution from another
        p, q = ((logits / T).exp() for logits in (p_logits, q_logits))
        p, q = p / p.sum(), q / q.sum()
        return T**2 * (p * (p / q).log()).sum()

    pixels = [(b, h, w) for b in range(2) for h in range(4) for w in range(5)]
    expected = torch.stack([divergence(teacher[b, :, h, w], student[b, :, h, w]) for b, h, w in pixels]).mean()
    torch.testing.assert_close(distill.kd_loss(student, teacher, T), expected)
    expected = torch.stack([divergence(teacher[b, c], student[b, c]) for b in range(2) for c in range(3)]).mean()
    torch.testing.assert_close(distill.cwd_loss(student, teacher, T), expected)

    target, valid = teacher.softmax(1), torch.rand(2, 4, 5, generator=generator) > 0.3
    kept = [p for p in pixels if valid[p]]
    parts = [((student[b, :, h, w].softmax(0) - target[b, :, h, w]) ** 2).mean() for b, h, w in kept]
    loss = train_teacher.consistency_loss(student, target, valid, valid.sum())
    torch.testing.assert_close(loss, torch.stack(parts).mean())


@pytest.mark.parametrize("method", ["kd", "cwd"])
def test_kd_and_cwd_distil_from_both_teachers_on_labeled_images_and_views(script, teachers, tmp_path, method):
    generator = torch.Generator().manual_seed(0)

    def output():
        return models.Output(torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64), None)

    label = torch.randint(3, (2, 6, 6), generator=generator)
    labeled, mixed = output(), output()
    taught = {role: distill.Taught(None, None, output(), output()) for role in ("T_D", "T_W")}
    args = argparse.Namespace(method=method, temperature=4.0, kd_weight=3.0, ohem=False)
    terms = distill.kd_losses(labeled, mixed, label, taught, args, torch.tensor([72.0, 72.0]))  # all pixels are valid
    each = distill.kd_loss if method == "kd" else distill.cwd_loss
    expected = sum(
        each(labeled.logits, t.labeled.logits, 4.0) + each(mixed.logits, t.mixed.logits, 4.0) for t in taught.values()
    )
    torch.testing.assert_close(terms[method], expected)
    torch.testing.assert_close(terms["loss"], F.cross_entropy(labeled.logits, label) + 3 * expected)
    options = ["--method", method, "--temperature", "4", "--kd-weight", "3", "--steps", "1"]
    assert script(distill, *distill_args(tmp_path / method, teachers, *options))[0] == 0
    entry, row = log(tmp_path / method)[0], common.load_checkpoint(tmp_path / method / "last.pt")["row"]
    assert entry["loss"] == pytest.approx(entry["sup"] + 3 * entry[method], rel=1e-4) and entry[method] > 0
    assert row["method"] == method and row["losses"] == ["sup", method] and row["regions"] is None


def test_mean_teacher_averages_the_weights_and_keeps_the_average(script, tmp_path, monkeypatch):
    """After k steps the average is the closed form of all weights so far, batch-norm statistics included."""
    history = []
    original = train_teacher.AveragedModel.update_parameters

    def update(self, net):
        history.append({key: value.clone() for key, value in net.state_dict().items()})
        original(self, net)

    monkeypatch.setattr(train_teacher.AveragedModel, "update_parameters", update)
    options = ["--method", "mt", "--backbone", "r18", "--ema-decay", "0.8", "--sup-only", "0.5", "--ramp-up", "0.5"]
    assert script(train_teacher, "--out", tmp_path / "mt", *options, *TINY, "--steps", "4")[0] == 0
    kept = weights(tmp_path / "mt" / "last.pt")
    shares = [0.8**3, 0.2 * 0.8**2, 0.2 * 0.8, 0.2]
    for key, value in kept.items():
        if value.is_floating_point():
            expected = sum(share * states[key].double() for share, states in zip(shares, history, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=key)
    entries = log(tmp_path / "mt")
    assert ["mt" in entry for entry in entries[:4]] == [False, False, True, True] and entries[3]["mt"] > 0
    saved = torch.load(tmp_path / "mt" / "last.pt", weights_only=True)
    assert "peer" not in saved and saved["row"]["losses"] == ["sup", "mt"]


def test_mean_teacher_learns_from_clean_views(script, tmp_path, monkeypatch):
    """A network that says one class for the first view's pixels and another for the second's: mixed as the images are, its
    average's probabilities are its own, and the consistency costs nothing; of other pixels it would cost a third."""

    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(50.0))

        def forward(self, images, upsample=True):
            bright = images[:, :1].sign()
            rest = torch.full_like(bright, -1.0).expand(-1, 4, -1, -1)
            logits = self.scale * torch.cat([bright, -bright, rest], 1)
            return models.Output(logits, logits)

    def batches(dataset, names, args, views, start, labeled):
        image = torch.full((args.batch, 3, *args.crop), 255, dtype=torch.uint8)
        label = torch.zeros(args.batch * views, *args.crop, dtype=torch.int64)
        while True:
            yield (torch.cat([image, 0 * image]) if views == 2 else image), label

    monkeypatch.setattr(train_teacher.datasets, "train_batches", batches)
    monkeypatch.setattr(train_teacher.models, "build_model", lambda *args: Says())
    monkeypatch.setattr(evaluate, "result_row", lambda *args, **fields: {"seconds": 0.0})
    arguments = ["--method", "mt", *TINY, "--steps", "1", "--sup-only", "0", "--ramp-up", "0", "--lr", "1e-9"]
    assert script(train_teacher, "--out", tmp_path / "mt", *arguments)[0] == 0
    assert log(tmp_path / "mt")[0]["mt"] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(train_teacher.datasets, "cutmix", lambda views, box: views.chunk(2)[views.shape[1] == 6])
    assert script(train_teacher, "--out", tmp_path / "black", *arguments)[0] == 0
    assert log(tmp_path / "black")[0]["mt"] == pytest.approx(2 / 6 / 2, abs=1e-3)


def test_native_kernels_and_pytorch_train_alike(teachers, tmp_path):
    """Twenty steps, in processes of their own since kernels cannot be unloaded.

    At lr 1e-5 rounding grows to 1e-2, as noise of 1e-6 on the logits does, since batch norm over a few images is chaotic;
    without its gradient the region loss would be off by 0.05 or more. The validation, of next to nothing learned, is left out.
    """
    logs = []
    for ops in ("torch", "native"):
        options = distill_args(
            tmp_path / ops,
            teachers,
            "--steps",
            "20",
            "--lambda-region",
            "100",
            "--lr",
            "1e-5",
            "--batch",
            "4",
            "--precision",
            "fp32",
        )
        subprocess.run([sys.executable, "distill.py", *map(str, options)], cwd=ROOT, check=True, capture_output=True,
                       env={**os.environ, **NO_GPU, "MGD_OPS": ops})  # fmt: skip
        assert common.load_checkpoint(tmp_path / ops / "last.pt")["row"]["mgd_ops"] == ops
        logs.append(log(tmp_path / ops))
    assert len(logs[0]) == 21  # one a step, and the validation
    for plain, native in zip(logs[0][:3], logs[1][:3], strict=True):
        assert native == pytest.approx(plain, rel=1e-4), plain["step"]
    for plain, native in zip(logs[0][:-1], logs[1][:-1], strict=True):
        assert native == pytest.approx(plain, rel=3e-2), plain["step"]
    assert logs[0][0]["region"] > 0


def test_total_loss_is_eq_7():
    """Every term from its formula in float64, with the weights where Eq. 7 has them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def labels():
        return torch.randint(3, (2, 6, 6), generator=generator)

    labeled = models.Output(random(2, 3, 6, 6), random(2, 4, 3, 3))
    unlabeled = models.Output(random(2, 3, 6, 6), random(2, 4, 3, 3))
    label, on_labeled, on_views = labels(), [labels(), labels()], [labels(), labels()]
    deep_logits, wide_features = random(2, 3, 6, 6), random(2, 5, 3, 3)
    args = argparse.Namespace(lambda_image=0.3, lambda_region=11.0, image_reduction="sum", regions=3, ohem=False,
                              losses=["sup", "pixel", "image:T_D", "region:T_W"])  # fmt: skip

    def cross_entropy(logits, label):
        return -logits.log_softmax(1).gather(1, label[:, None]).mean()

    def correlation(feat):  # one pixel a region
        unit = feat.flatten(2) / feat.flatten(2).norm(dim=1, keepdim=True)
        return unit.transpose(1, 2) @ unit

    expected = cross_entropy(labeled.logits, label)
    expected += sum(cross_entropy(labeled.logits, each) for each in on_labeled)
    expected += sum(cross_entropy(unlabeled.logits, each) for each in on_views)
    expected += 0.3 * (unlabeled.logits.mean((2, 3)) - deep_logits.mean((2, 3))).abs().sum(1).mean()
    expected += 11.0 * (correlation(unlabeled.features) - correlation(wide_features)).square().mean()
    taught = {"T_D": distill.Taught(on_labeled[0], on_views[0], None, models.Output(deep_logits, None)),
              "T_W": distill.Taught(on_labeled[1], on_views[1], None, models.Output(None, wide_features))}  # fmt: skip
    counts = torch.tensor([72.0, 72.0])  # all pixels of both
    losses = distill.mgd_losses(labeled, unlabeled, label, taught, args, counts)
    torch.testing.assert_close(losses["loss"], expected)
    fewer = distill.mgd_losses(labeled, unlabeled, label, taught, args, counts / torch.tensor([2, 3]))
    for name, factor in {"sup": 2, "pixel_l": 2, "pixel_u": 3, "image": 1, "region": 1}.items():
        torch.testing.assert_close(fewer[name], factor * losses[name])
    args.ohem = True
    hard = distill.mgd_losses(labeled, unlabeled, label, taught, args, counts)
    assert {name for name in losses if losses[name] != hard[name]} == {"sup", "loss"}


@pytest.mark.parametrize("teacher_bn", ["eval", "train"])
@pytest.mark.parametrize("mixed_terms", ["mixed", "clean"])
def test_teachers_label_clean_views_and_mix_the_labels(teacher_bn, mixed_terms):
    """A teacher that says class 1 for an image that is bright at its corner, wherever CutMix puts that image's pixels."""
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
    args = argparse.Namespace(teacher_bn=teacher_bn, mixed_terms=mixed_terms)
    everything = {*distill.Taught._fields}
    label, padding = torch.zeros(2, 2, 4, 4, dtype=torch.int64)
    taught = distill.teach(Teacher(), images, label, views, padding, box, args, everything)
    runs = 4 if mixed_terms == "mixed" else 3
    assert seen == ([2] * runs if teacher_bn == "train" else [2 * runs])
    assert (taught.labels[0] == 1).all() and (taught.labels[1] == 0).all() and torch.equal(taught.labeled.features, images)
    assert (taught.pseudo_labels[0, :2] == 1).all() and (taught.pseudo_labels[0, 2:] == 0).all()
    assert (taught.pseudo_labels[1, :2] == 0).all() and (taught.pseudo_labels[1, 2:] == 1).all()
    assert torch.equal(taught.mixed.features, datasets.cutmix(views, box)) and (taught.mixed.logits[0, 1, :2] == 1).all()
    # by its corner, or each view by its own
    assert (taught.mixed.logits[0, 1, 2:] == (1 if mixed_terms == "mixed" else -1)).all()
    # what is not wanted is not run, and what is wanted is the same alone
    for field, runs in {"labels": 1, "labeled": 1, "pseudo_labels": 2, "mixed": 1 if mixed_terms == "mixed" else 2}.items():
        seen.clear()
        alone = distill.teach(Teacher(), images, label, views, padding, box, args, {field})
        assert sum(seen) == 2 * runs and [name for name in everything if getattr(alone, name) is not None] == [field]
        got, expected = getattr(alone, field), getattr(taught, field)
        torch.testing.assert_close(tuple(got) if isinstance(got, tuple) else got,
                                   tuple(expected) if isinstance(expected, tuple) else expected)  # fmt: skip
    label[0, 3], padding[1, :, 3] = 255, 255  # what has no label, or lies outside the image, is not learnt from
    masked = distill.teach(Teacher(), images, label, views, padding, box, args, everything)
    assert torch.equal(masked.labels, taught.labels.masked_fill(label == 255, 255))
    assert torch.equal(masked.pseudo_labels, taught.pseudo_labels.masked_fill(padding == 255, 255))
    padding.zero_()
    taught = distill.teach(Teacher(), images, label, views[:2], padding, None, args, everything)
    assert (taught.pseudo_labels[0] == 0).all() and (taught.pseudo_labels[1] == 1).all()
    assert torch.equal(taught.mixed.features, views[:2])


def test_folded_teachers_say_the_same(teachers):
    dataset, args = datasets.Shapes(), argparse.Namespace(image_scale=1.0, teacher_bn="eval", mixed_terms="mixed")
    for path in teachers:
        teacher, _ = distill.load_teacher(path, dataset, args, torch.device("cpu"))
        plain, folded = models.Coarse(teacher), models.fold_batch_norm(models.Coarse(teacher))
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            for a, b in zip(plain(images), folded(images), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            folded = models.fold_batch_norm(models.Coarse(teacher), "bf16")
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


def test_cps_learns_from_the_other_networks_labels(script, tmp_path, monkeypatch):
    """Two networks that always say class 1 and class 2: cross supervision is dear, self-training would cost nothing."""

    class Says(torch.nn.Module):
        says = iter((1, 2))

        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(10 * F.one_hot(torch.tensor(next(self.says)), 6).float())

        def forward(self, images, upsample=True):
            logits = self.bias.view(1, 6, 1, 1).expand(len(images), 6, *images.shape[2:])
            return models.Output(logits, logits)

    monkeypatch.setattr(train_teacher.models, "build_model", lambda *args: Says())
    monkeypatch.setattr(evaluate, "result_row", lambda *args, **fields: {"seconds": 0.0})
    arguments = ["--out", tmp_path / "cps", *TINY, "--steps", "1", "--sup-only", "0", "--ramp-up", "0", "--lr", "0.1"]
    assert script(train_teacher, *arguments)[0] == 0
    assert log(tmp_path / "cps")[0]["cps"] == pytest.approx(10, rel=0.01)


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
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(datasets.Shapes, "has_mask", lambda self, name: name > "train-0100")
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--resume")
    assert code == 2 and "lists or masks have changed" in err
    monkeypatch.undo()
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments)
    assert code == 2 and "resume.pt: is of an earlier run; add --resume" in err and (tmp_path / "cut" / "resume.pt").exists()
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--crop", "40", "--resume")
    assert code == 2 and "--crop [48, 48], not [40, 40]" in err
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--steps", "7", "--resume")
    assert code == 2 and "--steps 6, not 7" in err
    code, _, err = script(module, "--out", tmp_path / "cut", *arguments, "--part", "1/4", "--resume")
    assert code == 2 and "--part 1/8, not 1/4" in err
    assert script(module, "--out", tmp_path / "cut", *arguments, "--resume")[0] == 0
    assert not (tmp_path / "cut" / "resume.pt").exists()
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "cut" / "last.pt")
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    code, out, _ = script(module, "--out", tmp_path / "cut", *arguments, "--resume")
    assert code == 0 and "this run is finished" in out
    assert script(module, "--out", tmp_path / "cut", *arguments)[0] == 2  # which would have replaced last.pt


@pytest.mark.parametrize("sup_only", [0, 0.8])  # the last steps' unlabeled images start after the resume, or before it
def test_resume_of_cps_equals_an_uninterrupted_run(script, tmp_path, sup_only):
    arguments = ["--backbone", "r18", *TINY, "--steps", "6", "--save-every", "3", "--sup-only", sup_only, "--ramp-up", sup_only]
    resume_equals_uninterrupted(script, train_teacher, arguments, tmp_path)


def test_resume_of_mean_teacher_equals_an_uninterrupted_run(script, tmp_path):
    arguments = ["--method", "mt", "--backbone", "r18", *TINY, "--steps", "6", "--save-every", "3", "--sup-only", "0.2"]
    resume_equals_uninterrupted(script, train_teacher, [*arguments, "--ramp-up", "0.8"], tmp_path)


def test_resume_of_distillation_equals_an_uninterrupted_run(script, teachers, tmp_path):
    arguments = ["--deep", teachers[0], "--wide", teachers[1], *TINY, "--steps", "6", "--save-every", "3"]
    resume_equals_uninterrupted(script, distill, arguments, tmp_path)


def test_a_student_does_not_go_on_with_teachers_trained_anew(script, teachers, tmp_path, monkeypatch):
    teacher = common.load_checkpoint(teachers[0])
    common.save_checkpoint(tmp_path / "teacher.pt", teacher)
    arguments = ["--out", tmp_path / "x", "--deep", tmp_path / "teacher.pt", *TINY, "--steps", "2", "--save-every", "1"]
    interrupt_at(monkeypatch, distill, 1)
    assert script(distill, *arguments)[0] == 130
    teacher["row"]["miou"] += 1
    common.save_checkpoint(tmp_path / "teacher.pt", teacher)
    code, _, err = script(distill, *arguments, "--resume")
    assert code == 2 and "resume.pt: learnt from other teachers than those of --deep and --wide now" in err
    assert (tmp_path / "x" / "resume.pt").exists()


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
    part = datasets.partition(datasets.Folder(folder), "1/4")
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
    assert "must be a multiple of 3" in errors(script, train_teacher, *run, "--batch", "8", "--accumulate", "3")
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
    assert not (tmp_path / "x" / "last.pt").exists() and not (tmp_path / "x" / "resume.pt").exists()
    (tmp_path / "file").write_text("words, not weights")
    wrong = ["--seed -1", "--workers -1", "--schedule nan", "--threshold 95", "--sup-only 40", "--scales 0",
             "--image-scale 0", "--weight-decay -1", "--val-every -1", "--part 1/", "--crop abc", "--dataset imagenet",
             "--no-such-flag"]  # fmt: skip
    for flags in [["--weights", tmp_path / "file"], *map(str.split, wrong)]:
        assert flags[0] in errors(script, train_teacher, *run, *flags)
    assert "--out" in errors(script, train_teacher, *run, "--out", tmp_path / "file")
    assert "--data" in errors(script, train_teacher, *run, "--data", folder)  # with the embedded data set
    assert "cannot be read" in errors(script, evaluate, "--ckpt", tmp_path / "file")
    assert "is a folder; give the last.pt in it" in errors(script, evaluate, "--ckpt", teachers[0].parent)
    assert "--panel-rows" in errors(script, evaluate, "--ckpt", teachers[0], "--panel-rows", "0")
    assert "--json" in errors(script, evaluate, "--ckpt", teachers[0], "--json", tmp_path)
    assert "--picture" in errors(script, datasets, "check", "--picture", tmp_path / "look")
    assert "prepare-voc" in errors(script, datasets)
    (folder / "images" / "im00.png").unlink()
    assert "im00" in errors(script, train_teacher, *run, *mine)


def test_what_does_not_fit_into_memory_is_refused_with_advice(script, teachers, tmp_path, monkeypatch):
    for module, arguments in (
        (train_teacher, ["--out", tmp_path / "x", *TINY, "--sup-only", "0", "--ramp-up", "0"]),
        (distill, distill_args(tmp_path / "y", teachers)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(common, "free_memory", lambda device: 1e6)
            assert "add --accumulate, or lower --batch or --crop" in errors(script, module, *arguments, "--steps", "6")
        code, out, _ = script(module, *arguments, "--steps", "6")
        assert code == 0 and " GB of " in out and "more steps such as the last 3" in out


def test_a_label_outside_the_classes_is_found_before_the_training(script, folder, tmp_path):
    Image.new("L", (56, 40), 9).save(folder / "masks" / "im11.png")  # of val
    data = ["--dataset", "folder", "--data", folder, "--part", "1", "--weights", "none", "--backbone", "r18", "--steps", "2"]
    assert "im11.png: holds label 9" in errors(script, train_teacher, "--out", tmp_path / "x", *TINY, *data)
    assert not (tmp_path / "x" / "log.jsonl").exists()


def test_nothing_is_lost_when_the_last_validation_fails(script, tmp_path, monkeypatch):
    arguments = ["--out", tmp_path / "x", "--method", "sup", *TINY, "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "validate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script(train_teacher, *arguments)
    assert common.load_checkpoint(tmp_path / "x" / "resume.pt")["step"] == 2
    assert script(train_teacher, *arguments, "--resume")[0] == 0 and (tmp_path / "x" / "last.pt").exists()


CAMVID = pathlib.Path(os.environ.get("MGD_CAMVID", ROOT / "data" / "camvid"))


@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid in data/camvid or MGD_CAMVID")
def test_camvid(script, tmp_path):
    data = ["--dataset", "folder", "--data", CAMVID, "--weights", "none", "--image-scale", "0.25"]
    code, _, err = script(train_teacher, "--out", tmp_path / "x", "--method", "sup", *TINY, *data, "--steps", "2")
    assert code == 0, err
    row = common.load_checkpoint(tmp_path / "x" / "last.pt")["row"]
    assert row["labeled"] == 46 and row["dataset"] == "camvid" and 0 < row["miou"] < 30


def make(*arguments):
    done = subprocess.run(["make", "--no-print-directory", "-n", "VENV=", "PYTHON=python", *arguments], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_make_distil_trains_missing_teachers_first(tmp_path):
    lines = make("distill", "PART=1/8", "STUDENT=mbv2", f"DATA={tmp_path}", "DATASET=folder", "SEEDS=2")
    run = f"runs/{tmp_path.name}/1-8"
    assert [line.split()[1] for line in lines] == ["train_teacher.py", "train_teacher.py", "distill.py"]
    assert f"--out {run}/teacher-deep-s2 --role teacher_deep --seed 2" in " ".join(lines[0].split())
    assert f"--out {run}/mgd-mbv2-s2 --student mbv2" in lines[2] and "--part 1/8" in lines[2]
    assert f"--deep {run}/teacher-deep-s2/last.pt --wide {run}/teacher-wide-s2/last.pt" in lines[2]


def test_make_passes_arguments_on_and_repeats_for_each_seed(tmp_path):
    more = ("ARGS=--lr 1", "TEACHER_ARGS=--sup-only 0", "MGD_ARGS=--regions 3", "STUDENT_ARGS=--seed 9", "SEEDS=0 1 2")
    lines = make("compare", f"DATA={tmp_path}", "DATASET=folder", *more)
    train = [line for line in lines if "train_teacher.py" in line]
    assert len(train) == 12 and all("--lr 1" in line for line in train)
    assert ["--sup-only 0" in line for line in train if "--role teacher" in line] == [True] * 6
    assert ["--seed 9" in line for line in lines if ".py --out" in line].count(True) == 9  # two Sup and one MGD a seed
    assert [line for line in lines if "--regions 3" in line] == [line for line in lines if "distill.py" in line] != []
    assert lines[-2].count("last.pt") == 15 and f"--json runs/{tmp_path.name}/1-8/compare-r18.json" in lines[-1]


def test_make_runs_several_processes():
    lines = make("compare", "NPROC=4", "SEEDS=3", "PART=1/2")
    scripts = [line for line in lines if ".py" in line]
    assert len(scripts) == 6 and all("-m torch.distributed.run --standalone --nproc-per-node 4" in line for line in scripts)


@pytest.mark.parametrize("arguments,expected", [("STUDENT=vgg", "STUDENT=vgg: unknown backbone"),
                                                ("DATASET=folder", "DATASET=folder: give its folder"),
                                                ("DATA=my data", "DATA=my data: make cannot")])  # fmt: skip
def test_make_refuses_what_is_wrong_before_it_trains_teachers(arguments, expected):
    done = subprocess.run(["make", "-n", "distill", arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and expected in done.stderr
