"""Teachers and baselines: sup, cps and mt."""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LEARNING,
    TINY,
    assert_it_learns,
    errors,
    log,
    resume_equals_uninterrupted,
    weights,
)
from PIL import Image

import batches
import evaluate
import models
import run_folder
import train_teacher

pytestmark = pytest.mark.usefixtures("tiny_networks")


@pytest.mark.parametrize(
    "method,options",
    [
        ("sup", []),
        ("cps", ["--sup-only", "0.2", "--ramp-up", "0.4"]),
        ("mt", ["--sup-only", "0", "--ramp-up", "0.4", "--ema-decay", "0.8", "--mt-weight", "10"]),
    ],
)
def test_training_learns(script, few, tmp_path, method, options):
    """Forty steps on four labeled and four unlabeled images."""
    code, _, err = script(train_teacher, "--out", tmp_path / method, "--method", method, "--data", few, *LEARNING, *options)
    assert code == 0, err
    assert_it_learns(tmp_path / method, ["sup"], falls_to=0.3, miou=65)


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
    factors = [0.8**3, 0.2 * 0.8**2, 0.2 * 0.8, 0.2]
    for key, value in kept.items():
        if value.is_floating_point():
            expected = sum(factor * states[key].double() for factor, states in zip(factors, history, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=key)
    entries = log(tmp_path / "mt")
    assert ["mt" in entry for entry in entries[:4]] == [False, False, True, True] and entries[3]["mt"] > 0
    saved = torch.load(tmp_path / "mt" / "last.pt", weights_only=True)
    assert "second" not in saved and saved["row"]["losses"] == ["sup", "mt"]


def test_mean_teacher_learns_from_clean_views(script, tmp_path, monkeypatch):
    """A network that predicts one class for the first view's pixels and another for the second's: mixed as the images are, its
    average's probabilities are its own, and the consistency costs nothing; of other pixels it would cost a third."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(50.0))

        def forward(self, images):
            bright = images[:, :1].sign()
            rest = torch.full_like(bright, -1.0).expand(-1, 4, -1, -1)
            logits = self.scale * torch.cat([bright, -bright, rest], 1)
            return models.Output(logits, logits)

    def endless(dataset, names, args, views, start, labeled):
        image = torch.full((args.batch, 3, *args.crop), 255, dtype=torch.uint8)
        label = torch.zeros(args.batch * views, *args.crop, dtype=torch.int64)
        while True:
            yield {"image": torch.cat([image, 0 * image]) if views == 2 else image, "mask": label}

    monkeypatch.setattr(train_teacher, "train_batches", endless)
    monkeypatch.setattr(train_teacher.models, "model_from_args", lambda *args: Constant())
    monkeypatch.setattr(evaluate, "result_row", lambda *args, **fields: {"seconds": 0.0})
    arguments = ["--method", "mt", *TINY, "--steps", "1", "--sup-only", "0", "--ramp-up", "0", "--lr", "1e-9"]
    assert script(train_teacher, "--out", tmp_path / "mt", *arguments)[0] == 0
    assert log(tmp_path / "mt")[0]["mt"] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(batches.Batch, "mix", lambda batch, maps: maps.chunk(2)[maps.shape[1] == 6])
    assert script(train_teacher, "--out", tmp_path / "black", *arguments)[0] == 0
    assert log(tmp_path / "black")[0]["mt"] == pytest.approx(2 / 6 / 2, abs=1e-3)


def test_cps_learns_from_the_other_networks_labels(script, tmp_path, monkeypatch):
    """Two networks that always predict class 1 and class 2: cross supervision has a high loss, self-training has none."""

    class Constant(torch.nn.Module):
        classes = iter((1, 2))

        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(10 * F.one_hot(torch.tensor(next(self.classes)), 6).float())

        def forward(self, images):
            logits = self.bias.view(1, 6, 1, 1).expand(len(images), 6, *images.shape[2:])
            return models.Output(logits, logits)

    monkeypatch.setattr(train_teacher.models, "model_from_args", lambda *args: Constant())
    monkeypatch.setattr(evaluate, "result_row", lambda *args, **fields: {"seconds": 0.0})
    arguments = ["--out", tmp_path / "cps", *TINY, "--steps", "1", "--sup-only", "0", "--ramp-up", "0", "--lr", "0.1"]
    assert script(train_teacher, *arguments)[0] == 0
    assert log(tmp_path / "cps")[0]["cps"] == pytest.approx(10, rel=0.01)
    # the first network moved towards the second one's class by lr times that gradient, which is 1
    assert weights(tmp_path / "cps" / "last.pt")["bias"][2] == pytest.approx(0.1, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("sup_only", [0, 0.8])  # the last steps' unlabeled images start after the resume, or before it
def test_resume_of_cps_equals_an_uninterrupted_run(script, tmp_path, sup_only):
    arguments = ["--backbone", "r18", *TINY, "--steps", "6", "--save-every", "3", "--sup-only", sup_only, "--ramp-up", sup_only]
    resume_equals_uninterrupted(script, train_teacher, arguments, tmp_path)


@pytest.mark.slow
def test_resume_of_mean_teacher_equals_an_uninterrupted_run(script, tmp_path):
    arguments = ["--method", "mt", "--backbone", "r18", *TINY, "--steps", "6", "--save-every", "3", "--sup-only", "0.2"]
    resume_equals_uninterrupted(script, train_teacher, [*arguments, "--ramp-up", "0.8"], tmp_path)


def test_cps_keeps_its_first_network_and_its_terms(script, tmp_path):
    arguments = ["--out", tmp_path / "cps", "--backbone", "r18", *TINY, "--steps", "4"]
    assert script(train_teacher, *arguments, "--sup-only", "0.5", "--ramp-up", "0.5")[0] == 0
    entries = log(tmp_path / "cps")
    assert ["cps" in e for e in entries[:4]] == [False, False, True, True]
    assert "second" not in torch.load(tmp_path / "cps" / "last.pt", weights_only=True)
    row = run_folder.load_checkpoint(tmp_path / "cps" / "last.pt")["row"]
    assert row["method"] == "cps" and row["labeled"] == 64 and row["losses"] == ["sup", "cps"]


def test_compile_falls_back_with_one_line(script, tmp_path, monkeypatch):
    def no_compiler(*args, **more):
        raise RuntimeError("Failed to find C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    arguments = ["--out", tmp_path / "x", "--method", "sup", *TINY, "--steps", "1", "--compile"]
    code, out, _ = script(train_teacher, *arguments)
    assert code == 0 and "note: --compile is not possible here, going on without: Failed to find C++ compiler\n" in out


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
    assert run_folder.load_checkpoint(tmp_path / "x" / "resume.pt")["step"] == 2
    assert script(train_teacher, *arguments, "--resume")[0] == 0 and (tmp_path / "x" / "last.pt").exists()


def test_consistency_is_the_mean_squared_difference_of_probabilities():
    """Against a loop over the definition, in float64, with its gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    student.requires_grad_()
    target, valid = teacher.softmax(1), torch.rand(2, 4, 5, generator=generator) > 0.3
    kept = valid.nonzero().tolist()
    expected = sum(((student[b, :, h, w].softmax(0) - target[b, :, h, w]) ** 2).mean() for b, h, w in kept) / len(kept)
    loss = train_teacher.consistency_loss(student, target, valid, valid.sum())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
