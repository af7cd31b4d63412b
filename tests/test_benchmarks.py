"""The benchmarks' released procedure is a fair opponent: it computes the same losses."""

import importlib
import json

import bench_heads
import bench_step
import device_name
import pytest
import torch

import models


@pytest.mark.slow
@pytest.mark.parametrize("mixed_terms", ["mixed", "clean"])
def test_the_released_step_and_ours_have_equal_terms(mixed_terms):
    """Teachers and student in evaluation mode on both sides, float32, no ignored pixels."""
    torch.manual_seed(0)
    nets = [models.build_model(name, 5, head_width=16).eval() for name in ("r18", "r18", "mbv2")]
    for net in nets:  # batch norm that does something
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    folded = [nets[0], *(models.fold_batch_norm(net).requires_grad_(False) for net in nets[1:])]
    batch = bench_step.draw_batch(2, 64, 5, torch.device("cpu"), channels_last=True)
    args = bench_step.Variant("fp32", mixed_terms)
    still = torch.optim.SGD(nets[0].parameters(), lr=0.0)
    released = bench_step.released_distill(nets, still, batch)
    ours = bench_step.our_distill(folded, still, batch, args)
    released["image"] /= 2  # its sum over the batch is our mean
    names = ["sup", "pixel_l", "pixel_u"] + (["image", "region"] if mixed_terms == "mixed" else [])
    for name in names:
        assert float(ours[name]) == pytest.approx(released[name], rel=1e-4), name
    if mixed_terms == "clean":  # near, since only what the networks see across a box's border differs
        assert float(ours["image"]) != pytest.approx(released["image"], rel=1e-4)


@pytest.mark.slow
def test_both_variants_of_the_step_benchmark_run(capsys):
    for impl in ("released", "ours"):
        rows = bench_step.measure("cps", "resnet18", 48, 2, 3, impl, "cpu", 2)
        assert rows[0]["pass"] == "step" and rows[0]["gflops"] > 1 and rows[0]["peak_mb"] > 0
    assert {row["pass"] for row in rows} == {"step", "pseudo labels", "student forward", "backward", "optimizer"}


@pytest.mark.slow
def test_heads_are_measured(script, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_heads, "SIZE", 64)
    monkeypatch.setattr(bench_heads, "HEADS", [(16, False), (16, True)])
    code, _, err = script(bench_heads, "--rounds", "2", "--json", tmp_path / "heads.json", "--device", "cpu")
    assert code == 0, err
    rows = json.loads((tmp_path / "heads.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [f"{net} {kind}16" for net in bench_heads.STUDENTS for kind in ("", "separable ")]
    for plain, separable in (rows[:2], rows[2:]):
        assert separable["gmacs_model"] < plain["gmacs_model"] and separable["params_m"] < plain["params_m"]
        assert plain["gmacs_backbone"] < plain["gmacs_model"] and 0 < plain["p20_ms"] <= plain["p50_ms"] <= plain["p80_ms"]


@pytest.mark.parametrize(
    "name,flag",
    [
        ("heads", "--json"),
        ("loading", "--json"),
        ("region_loss", "--json"),
        ("step", "--json"),
        ("step", "--curves"),
        ("upsample_loss", "--json"),
    ],
)
def test_a_benchmark_keeps_others_files(script, tmp_path, name, flag):
    """The refusal comes before any measurement."""
    module, path = importlib.import_module(f"bench_{name}"), tmp_path / "mine.json"
    path.write_text("precious")
    code, _, err = script(module, flag, path)
    assert code == 2 and "mine.json exists" in err and "--overwrite" in err and path.read_text() == "precious"


def test_benchmarks_are_named_after_the_whole_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert device_name.device_slug("cuda") == "h100-80gb-hbm3" and device_name.device_slug("cpu") == "cpu"
