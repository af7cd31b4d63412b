"""The stages together, as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import AVERAGED, DEVICES, NO_GPU, ROOT, TINY, distill_args, errors, log, save_mask, weights
from PIL import Image

import common
import datasets
import distill
import evaluate
import run_folder
import train_teacher

# for several processes on a small machine
ONE_THREAD = {**os.environ, **NO_GPU, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
# Batch norm in evaluation mode, so that images do not depend on the others of their micro-batch; two val images. The command
# line holds a JSON list of scripts with their arguments, which run one after the other.
ALONE = """
import json, sys, torch, datasets, tiny
tiny.install()
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
class TwoShapes(datasets.Shapes):
    def __init__(self):
        super().__init__(512, 2)
datasets.Shapes = TwoShapes
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    __import__(script).main()
"""
NOW = ["--sup-only", "0", "--ramp-up", "0"]
JOINED = {  # script and options; two steps or one of plain descent, so that the weights show the gradient
    "cps": ["train_teacher", *NOW, "--conf-thresh", "0.17", "--steps", "1", "--lr", "1"],
    # Mean Teacher's average is the network itself at the first step
    "mt": ["train_teacher", *NOW, "--method", "mt", "--steps", "2", "--lr", "0.1", "--log-every", "2"],
    "mgd": ["distill", "--steps", "1", "--lr", "1"],
    # the first step has no relative weights, and the third is on the ground truth alone
    "mgd+": [
        *("distill", "--method", "mgd+", "--lambda-relative", "0.5", "--conf-thresh", "0.17", "--refine", "0.34"),
        *(*AVERAGED, "--steps", "3", "--lr", "0.1", "--log-every", "3"),
    ],
    "kd": ["distill", "--method", "kd", "--steps", "1", "--lr", "1"],
    "files": ["distill", "--pseudo-labels", "FILES", "--strong-views", "--steps", "1", "--lr", "1"],
    "some": ["distill", "--losses", "sup", "pixel:unlabeled", "region:T_W", "--steps", "1", "--lr", "1"],
}


@pytest.fixture(scope="module")
def joined(teachers, tmp_path_factory):
    """Folders of the runs of `JOINED`, by case, numbers of ranks and micro-batches."""
    root = tmp_path_factory.mktemp("joined")
    (root / "program.py").write_text(ALONE)
    across = np.arange(64)[None].repeat(64, 0)
    for i, name in enumerate(datasets.Shapes().train):  # of two images in three; a part of each is ignored
        if i % 3:
            save_mask(root / "FILES" / f"{name}.png", np.where(across < i % 64, 255, across // 11))
    runs = {}
    for ranks, parts, cases in ((1, 1, JOINED), (2, 2, JOINED), (3, 1, ["cps", "mgd"]), (1, 3, ["cps", "mgd"])):
        commands = []
        for case in cases:
            runs[case, ranks, parts] = out = root / f"{case}-{ranks}-{parts}"
            script, *options = JOINED[case]
            options += ["--deep", teachers[0], "--wide", teachers[1]] if script == "distill" else []
            # crops larger than the images, so that micro-batches differ in their valid pixels
            options = [*TINY, *options, "--batch", "12", "--crop", "72", "--precision", "fp32", "--grad-accum", parts]
            options = [root / option if option == "FILES" else option for option in options]
            commands.append([script, *map(str, options), "--out", str(out)])
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, root / "program.py", json.dumps(commands)]
        done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("SyncBatchNorm needs GPUs" in done.stdout) == (ranks > 1)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("case", JOINED)
def test_any_number_of_ranks_and_micro_batches_gives_the_gradient_of_the_joined_batch(joined, case):
    expected = joined[case, 1, 1]
    others = [out for (name, *numbers), out in joined.items() if name == case and numbers != [1, 1]]
    assert len(others) == (3 if case in ("cps", "mgd") else 1)
    for other in others:
        assert log(other)[0] == pytest.approx(log(expected)[0], rel=1e-4)
        for key, value in weights(expected / "last.pt").items():
            if value.is_floating_point():
                torch.testing.assert_close(
                    weights(other / "last.pt")[key], value, rtol=1e-3, atol=1e-5, msg=f"{other.name} {key}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("before,after", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(teachers, tmp_path, before, after):
    """It says so, and ends as one that was left alone, to the rounding of sums in another order."""
    stops = "import distill, os\npoly_lr = distill.poly_lr\n"
    stops += (
        "distill.poly_lr = lambda step, *rest: os._exit(3) if step == 2 and 'STOP' in os.environ else poly_lr(step, *rest)\n"
    )
    (tmp_path / "program.py").write_text(stops + ALONE)

    def train(out, ranks, *more, **environment):
        options = [*TINY, *more, "--deep", teachers[0], "--wide", teachers[1], "--out", tmp_path / out, "--batch", "4"]
        options += [
            "--method",
            "mgd+",
            *AVERAGED,
            "--steps",
            "4",
            "--save-every",
            "2",
            "--log-every",
            "2",
            "--lr",
            "0.1",
            "--precision",
            "fp32",
        ]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, tmp_path / "program.py", json.dumps([["distill", *map(str, options)]])]
        return subprocess.run(command, env={**ONE_THREAD, **environment}, capture_output=True, text=True)

    assert train("whole", 1).returncode == 0
    assert train("x", before, STOP="1").returncode != 0 and (tmp_path / "x/resume.pt").exists()
    done = train("x", after, "--resume")
    assert done.returncode == 0 and f"{before} process(es), not {after}" in done.stdout, done.stderr
    for entry, expected in zip(log(tmp_path / "x"), log(tmp_path / "whole"), strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    for key, value in weights(tmp_path / "whole/last.pt").items():
        torch.testing.assert_close(weights(tmp_path / "x/last.pt")[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no nvcc")
@pytest.mark.parametrize(
    "stage,options",
    [
        (train_teacher, ["--method", "sup"]),
        (train_teacher, ["--method", "cps", "--sup-only", "0", "--ramp-up", "0"]),
        (train_teacher, ["--method", "mt", "--sup-only", "0", "--ramp-up", "0"]),
        (distill, ["--method", "mgd", "--grad-norms"]),
        (
            distill,
            ["--method", "mgd+", "--lambda-relative", "0.3", "--conf-thresh", "0.2", *AVERAGED],
        ),
        (distill, ["--method", "kd"]),
        (distill, ["--method", "cwd"]),
    ],
    ids=lambda options: options[1] if isinstance(options, list) else "",
)
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


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, train_teacher\noriginal = train_teacher.poly_lr\n"
        "def poly_lr(step, *rest):\n    if os.environ['RANK'] == '1' and step == 1:\n"
        "        raise RuntimeError('rank 1 is gone')\n    return original(step, *rest)\n"
        "train_teacher.poly_lr = poly_lr\ntrain_teacher.main()\n"
    )
    arguments = ["--out", tmp_path / "x", "--method", "sup", *TINY, "--batch", "4", "--steps", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, *arguments]
    done = subprocess.run([*map(str, command)], env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "rank 1 is gone" in done.stderr


@pytest.fixture(scope="module")
def full_teachers(tmp_path_factory):
    """A deep and a wide teacher of torchvision's networks, hardly trained."""
    out = tmp_path_factory.mktemp("full")
    for role, backbone in (("deep", "r18"), ("wide", "mbv2")):
        with pytest.MonkeyPatch.context() as monkeypatch:
            argv = ["--out", out / role, "--role", f"teacher_{role}", "--backbone", backbone, *NOW, "--steps", "2", *TINY]
            monkeypatch.setattr("sys.argv", ["train_teacher.py", *map(str, argv)])
            train_teacher.main()
    return out / "deep" / "last.pt", out / "wide" / "last.pt"


@pytest.mark.slow
@pytest.mark.parametrize("student", ["r18", "mbv2"])
def test_distil_and_evaluate(script, full_teachers, tmp_path, student, monkeypatch):
    teachers = full_teachers
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
    code, out, err = script(evaluate, "--ckpt", ckpt, *teachers, "--json", tmp_path / "r.json", "--panels", tmp_path / "p.png")
    assert code == 0, err
    assert f"MGD {run_folder.load_checkpoint(ckpt)['row']['backbone']}" in out and str(tmp_path / "p.png") in out
    result = json.loads((tmp_path / "r.json").read_text())
    row = result["rows"][0]
    assert {
        "dataset",
        "partition",
        "partition_hash",
        "labeled",
        "method",
        "role",
        "backbone",
        "head_width",
        "weights",
        "crop",
        "seed",
        "steps",
        "seconds",
        "teachers",
        "teacher_labels",
        "losses",
        "regions",
        "gmacs_backbone",
        "gmacs_model",
        "miou",
        "iou",
    } <= row.keys()
    assert row["teachers"] == ["T_D", "T_W"] and row["teacher_backbones"] == ["resnet18", "mobilenetv2"]
    assert row["teacher_labels"] == "partition" and row["steps"] == 4
    assert row["miou"] == run_folder.load_checkpoint(ckpt)["row"]["miou"]  # evaluation and training agree to the last digit
    assert Image.open(tmp_path / "p.png").size[0] > 400


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.slow
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
    row = run_folder.load_checkpoint(tmp_path / "s" / "last.pt")["row"]
    assert row["labeled"] == 3 and row["partition_hash"] == part.hash


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(script, teachers, folder, tmp_path):
    run = ["--out", tmp_path / "x", *TINY, "--steps", "2"]
    mine = ["--dataset", "folder", "--data", folder, "--weights", "none"]
    assert "absent: no such folder" in errors(script, train_teacher, *run, "--dataset", "folder", "--data", tmp_path / "absent")
    assert "--data DIR" in errors(script, train_teacher, *run, "--dataset", "folder")
    assert "unknown backbone 'vgg'" in errors(script, train_teacher, *run, "--backbone", "vgg")
    assert "--stem" in errors(script, train_teacher, *run, "--stem", "odd")
    assert "--batch 1" in errors(script, train_teacher, *run, "--batch", "1")
    assert "must be a multiple of 3" in errors(script, train_teacher, *run, "--batch", "8", "--grad-accum", "3")
    assert "--steps 0" in errors(script, train_teacher, *run, "--steps", "0")
    assert "--part 2/3" in errors(script, train_teacher, *run, "--part", "2/3")
    assert "no unlabeled image" in errors(script, train_teacher, *run, "--part", "1")
    assert "6 classes, but the data set has 3" in errors(script, distill, *distill_args(tmp_path / "x", teachers), *mine)
    assert "no such checkpoint" in errors(script, distill, *distill_args(tmp_path / "x", ("absent.pt", "absent.pt")))
    assert "unknown backbone" in errors(script, distill, *distill_args(tmp_path / "x", teachers, "--student", "vgg"))
    assert "--regions 0" in errors(script, distill, *distill_args(tmp_path / "x", teachers, "--regions", "0"))
    assert "no such checkpoint" in errors(script, evaluate, "--ckpt", tmp_path / "absent.pt")
    assert "not finite" in errors(
        script, train_teacher, "--out", tmp_path / "x", "--method", "sup", *TINY, "--steps", "30", "--lr", "1e30"
    )
    assert not (tmp_path / "x" / "last.pt").exists() and not (tmp_path / "x" / "resume.pt").exists()
    (tmp_path / "file").write_text("words, not weights")
    wrong = [
        "--seed -1",
        "--workers -1",
        "--steps-factor nan",
        "--conf-thresh 95",
        "--sup-only 40",
        "--scales 0",
        "--image-scale 0",
        "--weight-decay -1",
        "--val-every -1",
        "--part 1/",
        "--crop abc",
        "--dataset imagenet",
        "--no-such-flag",
    ]
    for flags in [["--weights", tmp_path / "file"], *map(str.split, wrong)]:
        assert flags[0] in errors(script, train_teacher, *run, *flags)
    assert "--out" in errors(script, train_teacher, *run, "--out", tmp_path / "file")
    assert "--data" in errors(script, train_teacher, *run, "--data", folder)  # with the embedded data set
    assert "cannot be read" in errors(script, evaluate, "--ckpt", tmp_path / "file")
    assert "is a folder; give the last.pt in it" in errors(script, evaluate, "--ckpt", teachers[0].parent)
    assert "--panel-rows" in errors(script, evaluate, "--ckpt", teachers[0], "--panel-rows", "0")
    assert "--json" in errors(script, evaluate, "--ckpt", teachers[0], "--json", tmp_path)
    (folder / "images" / "im00.png").unlink()
    assert "im00" in errors(script, train_teacher, *run, *mine)


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.slow
def test_what_does_not_fit_into_memory_is_refused_with_advice(script, teachers, tmp_path, monkeypatch):
    for module, arguments in (
        (train_teacher, ["--out", tmp_path / "x", *TINY, "--sup-only", "0", "--ramp-up", "0"]),
        (distill, distill_args(tmp_path / "y", teachers)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(common, "free_memory", lambda device: 1e5)
            assert "raise --grad-accum, or lower --batch or --crop" in errors(script, module, *arguments, "--steps", "6")
        code, out, _ = script(module, *arguments, "--steps", "6")
        assert code == 0 and " GB of " in out and "estimated " in out


CAMVID = pathlib.Path(os.environ.get("MGD_CAMVID", ROOT / "data" / "camvid"))


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason="no CamVid in data/camvid or MGD_CAMVID")
def test_camvid_trains_and_is_evaluated(script, tmp_path, tiny_networks):
    data = ["--dataset", "folder", "--data", CAMVID, "--weights", "none", "--image-scale", "0.25"]
    code, _, err = script(train_teacher, "--out", tmp_path / "x", "--method", "sup", *TINY, *data, "--steps", "2")
    assert code == 0, err
    row = run_folder.load_checkpoint(tmp_path / "x" / "last.pt")["row"]
    assert row["labeled"] == 46 and row["dataset"] == "camvid" and 0 < row["miou"] < 30


@pytest.mark.slow
def test_native_kernels_and_pytorch_train_alike(teachers, tmp_path):
    """Twenty steps, each in its own process, since kernels cannot be unloaded.

    At lr 1e-5 rounding grows to 1e-2, as noise of 1e-6 on the logits does, since batch norm over a few images is chaotic;
    without its gradient the region loss would be off by 0.05 or more. The validation, of next to nothing learned, is left out.
    """
    logs = []
    for ops in ("torch", "native"):
        options = ["--steps", "20", "--lambda-region", "100", "--lr", "1e-5", "--batch", "4", "--precision", "fp32"]
        options = distill_args(tmp_path / ops, teachers, *options)
        program = "import tiny; tiny.install(); import distill; distill.main()"
        subprocess.run(
            [sys.executable, "-c", program, *map(str, options)],
            check=True,
            capture_output=True,
            env={**ONE_THREAD, "MGD_OPS": ops},
        )
        assert run_folder.load_checkpoint(tmp_path / ops / "last.pt")["row"]["mgd_ops"] == ops
        logs.append(log(tmp_path / ops))
    assert len(logs[0]) == 21  # one a step, and the validation
    for plain, native in zip(logs[0][:3], logs[1][:3], strict=True):
        assert native == pytest.approx(plain, rel=1e-4), plain["step"]
    for plain, native in zip(logs[0][:-1], logs[1][:-1], strict=True):
        assert native == pytest.approx(plain, rel=3e-2), plain["step"]
    assert logs[0][0]["region"] > 0
