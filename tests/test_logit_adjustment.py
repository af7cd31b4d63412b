"""Logits that are lowered by how frequent their class was among the labels."""

import numpy as np
import pytest
import torch
from conftest import TINY, distill_args, weights

import datasets
import distill
import evaluate
import logit_adjustment
import mgd_ops
import models
import train_teacher
from result_files import GROUP_BY, setting_values


class Painted(datasets.Shapes):
    """Of the labeled pixels, a half is of class 0, and a quarter each of classes 1 and 3; others are ignored."""

    def mask(self, name):
        mask = np.zeros((10, 8), np.uint8)
        mask[4:6], mask[6:8], mask[8:] = 1, 3, 255  # no 2, 4 or 5: as rare as the rarest
        return mask


class Ignored(datasets.Shapes):
    def mask(self, name):
        return np.full((8, 8), 255, np.uint8)


def test_frequencies_are_shares_of_the_labeled_pixels():
    found = logit_adjustment.log_frequencies(Painted(), ["a", "b"]).exp()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.25, 0.25, 0.25, 0.25, 0.25]))
    assert (logit_adjustment.log_frequencies(Ignored(), ["a"]) == 0).all()


@pytest.mark.usefixtures("tiny_networks")
def test_probabilities_become_those_of_classes_that_are_equally_frequent():
    """Menon et al. 2021, Eq. 9: softmax of the new logits is p(c) / π_c^τ, normalized, at each pixel of the image too."""
    torch.manual_seed(0)
    model = models.build_model("r18", 6, head_width=16).eval()
    images, tau = torch.randn(2, 3, 32, 32), 0.7
    with torch.no_grad():
        before = mgd_ops.upsample(model(images).logits, (32, 32)).softmax(1)
        logit_adjustment.adjust_logits(model, Painted(), ["a"], tau)
        after = mgd_ops.upsample(model(images).logits, (32, 32)).softmax(1)
    expected = before / torch.tensor([0.5, 0.25, 0.25, 0.25, 0.25, 0.25]).view(-1, 1, 1) ** tau
    torch.testing.assert_close(after, expected / expected.sum(1, keepdim=True))
    assert not torch.allclose(before, after)


def assert_adjusted(plain, adjusted):
    """Of two last.pt: that of a run, and of the same one with --logit-adjustment 0.7."""
    dataset = datasets.Shapes()
    expected = weights(plain)
    labeled = datasets.partition(dataset, "1/8").labeled
    expected["classifier.bias"] -= 0.7 * logit_adjustment.log_frequencies(dataset, labeled)
    for key, value in weights(adjusted).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6, msg=key)
    checkpoint = torch.load(adjusted, weights_only=True)
    assert checkpoint["args"]["logit_adjustment"] == 0.7
    assert torch.load(plain, weights_only=True)["args"]["logit_adjustment"] is None


@pytest.mark.usefixtures("tiny_networks")
@pytest.mark.parametrize("method", ["sup", "cps", "mt"])
def test_a_training_adjusts_the_network_that_it_keeps(script, tmp_path, method):
    arguments = ["--method", method, *TINY, "--steps", "2", "--backbone", "r18"]
    assert script(train_teacher, "--out", tmp_path / "plain", *arguments, "--logit-adjustment", "0")[0] == 0
    assert script(train_teacher, "--out", tmp_path / "new", *arguments, "--logit-adjustment", "0.7")[0] == 0
    assert_adjusted(tmp_path / "plain" / "last.pt", tmp_path / "new" / "last.pt")


@pytest.mark.usefixtures("tiny_networks")
def test_a_run_that_is_resumed_after_its_last_step_adjusts_once(script, teachers, tmp_path, monkeypatch):
    """Its validation, which comes after the adjustment, fails at first."""
    arguments = ["--ema-decay", "0.5", "--logit-adjustment"]
    assert script(distill, *distill_args(tmp_path / "plain", teachers, *arguments, "0"))[0] == 0
    adjusted = distill_args(tmp_path / "new", teachers, *arguments, "0.7")
    validate = evaluate.validate

    def fail(model, dataset, device, args):
        if model.training or args.out != tmp_path / "new" or not (args.out / "resume.pt").exists():
            return validate(model, dataset, device, args)  # of a teacher
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "validate", fail)
        assert script(distill, *adjusted)[0] != 0
    assert not (tmp_path / "new" / "last.pt").exists()
    assert script(distill, *adjusted, "--resume")[0] == 0
    assert_adjusted(tmp_path / "plain" / "last.pt", tmp_path / "new" / "last.pt")
    code, out, _ = script(evaluate, "--ckpt", tmp_path / "new" / "last.pt")
    miou = torch.load(tmp_path / "new" / "last.pt", weights_only=True)["row"]["miou"]
    assert code == 0 and f"{miou:.2f}" in out


@pytest.mark.usefixtures("tiny_networks")
def test_a_students_row_says_how_its_teachers_were_adjusted(script, teachers, tmp_path):
    """So that students of differently adjusted teachers are not averaged."""
    checkpoint = torch.load(teachers[1], weights_only=True)
    checkpoint["args"]["logit_adjustment"] = 0.7
    torch.save(checkpoint, tmp_path / "adjusted.pt")
    found = []
    for wide in (teachers[1], tmp_path / "adjusted.pt"):
        out = tmp_path / wide.stem
        assert script(distill, *distill_args(out, (teachers[0], wide), "--steps", "1"))[0] == 0
        found.append(torch.load(out / "last.pt", weights_only=True)["row"])
    assert [row["teacher_logit_adjustments"] for row in found] == [None, [0.0, 0.7]]
    assert setting_values(found[0], GROUP_BY) != setting_values(found[1], GROUP_BY)
