"""The benchmarks' released procedure is a fair opponent: it computes the same losses."""

import importlib
import json

import bench_deploy
import bench_depthwise
import bench_heads
import bench_step
import device_name
import pytest
import torch

import inference
import models
import result_files
from common import UserError


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


def test_what_is_timed_in_pytorch_gives_the_labels_of_a_prediction():
    network = bench_deploy.build(bench_deploy.Case("student", "mobilenetv2", 8, True))
    image = bench_deploy.draw_image((70, 90))
    labels = bench_deploy.Labels(network)(torch.from_numpy(image))
    expected = inference.predict(network, image[0], torch.device("cpu"), "fp32")
    assert labels.shape == (1, 70, 90) and labels.dtype == torch.uint8 and labels.unique().numel() > 1
    assert torch.equal(labels[0], expected)


DEPLOYED = {"case": "a", "p50_ms": 8.0, "p95_ms": 9.0, "size_mb": 2.0, "peak_mb": 40.0, "params_m": 1.0, "gmacs_model": 1.5}


def deployed_rows(**changes):
    """Rows of one student in each runtime, without mIoU."""
    row = {**DEPLOYED, "case": "mobilenetv2 separable 64", "role": "student", "backbone": "mobilenetv2", "head_width": 64}
    row |= {"separable_head": True, "threads": 1, "shape": [1, 360, 480, 3], "miou": None, "miou_on": None, **changes}
    kinds = [tuple(impl.split()) for impl in bench_deploy.IMPLS]
    return [{**row, "runtime": name, "precision": precision, "impl": f"{name} {precision}"} for name, precision in kinds]


def write_evaluation(path, **fields):
    row = {"role": "student", "backbone": "mobilenetv2", "head_width": 64, "separable_head": True, "miou": 60.0, **fields}
    path.write_text(json.dumps({"rows": [row]}))
    return path


def test_a_row_gets_the_miou_of_its_network_runtime_and_precision(tmp_path):
    rows = [*deployed_rows(), *deployed_rows(separable_head=False)]
    int8 = write_evaluation(tmp_path / "int8.json", export="int8", miou=59.0, miou_torch=60.0)
    bench_deploy.add_miou(rows, [int8])
    assert [row["miou"] for row in rows] == [60.0, 60.0, None, 59.0, None, None, None, None]
    other = write_evaluation(tmp_path / "other.json", export=None, miou=61.0)
    with pytest.raises(UserError, match=r"other.json: has another mIoU of student mobilenetv2 64"):
        bench_deploy.add_miou(rows, [int8, other])


def test_the_picture_of_latency_shows_what_has_a_miou(tmp_path, capsys):
    rivals = deployed_rows(case="lraspp_mobilenet_v3_large", role="torchvision", backbone="lraspp_mobilenet_v3_large")
    rows = [row for threads in (1, 2) for row in [*deployed_rows(threads=threads), *rivals]]
    bench_deploy.draw(tmp_path / "a.png", rows, (360, 480))
    assert not (tmp_path / "a.png").exists() and "no row has a mIoU" in capsys.readouterr().out
    bench_deploy.add_miou(rows, [write_evaluation(tmp_path / "evaluation.json", export="int8", miou_torch=60.5)])
    bench_deploy.draw(tmp_path / "a.png", rows, (360, 480))
    assert result_files.is_ours(tmp_path / "a.png")
    line = next(line for line in bench_deploy.markdown(rows).splitlines() if "MobileNetV2" in line and "int8" in line)
    assert line.split(" | ")[6:] == ["60.0", "8.0 (9.0)", "8.0 (9.0) |"]


@pytest.mark.slow
def test_a_deployment_is_measured_and_resumed(script, monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    case = bench_deploy.Case("student", "mobilenetv2", 8, True)
    monkeypatch.setattr(bench_deploy, "CASES", {"tiny": case})
    monkeypatch.setattr(bench_deploy, "name_of", lambda case: "tiny")
    monkeypatch.setattr(bench_deploy, "SHAPES", [(96, 64)])
    monkeypatch.setattr(bench_deploy, "THREADS", [1])
    result = tmp_path / "deploy.json"
    arguments = ["--json", result, "--calls", "3"]
    code, _, err = script(bench_deploy, *arguments)
    assert code == 0, err
    rows = json.loads(result.read_text())["rows"]
    assert [row["impl"] for row in rows] == ["pytorch fp32", "onnxruntime fp32", "onnxruntime int8"]
    torch_row, fp32, int8 = rows
    assert int8["size_mb"] < fp32["size_mb"] / 2 and torch_row["size_mb"] == pytest.approx(fp32["size_mb"], rel=0.2)
    for row in rows:
        assert row["calls"] == 3 and 0 < row["p50_ms"] <= row["p95_ms"] and row["peak_mb"] > row["size_mb"] / 2
        assert row["miou"] is None and row["gmacs_model"] > 0.1 and row["shape"] == [1, 96, 64, 3]
    monkeypatch.setattr(bench_deploy, "export_case", None)  # nothing is measured again
    evaluation = write_evaluation(tmp_path / "evaluation.json", export="int8", head_width=8, dataset="camvid", image_scale=0.5)
    code, _, err = script(bench_deploy, *arguments, "--resume", "--evaluations", evaluation)
    assert code == 0, err
    assert json.loads(result.read_text())["rows"] == [
        torch_row,
        fp32,
        {**int8, "miou": 60.0, "miou_on": "camvid at 0.5 of its size"},
    ]
    assert (tmp_path / "deploy.png").exists() and (tmp_path / "tables" / "deploy.md").exists()


def test_an_export_that_differs_is_not_timed(monkeypatch):
    def start(case, runtime, file, threads):
        return lambda image: (image[..., 0] + (runtime != "pytorch")).astype("uint8")

    monkeypatch.setattr(bench_deploy, "start", start)
    files = dict.fromkeys(("pytorch", "fp32", "int8"))
    with pytest.raises(UserError, match="the export's labels are PyTorch's"):
        bench_deploy.check(bench_deploy.CASES[bench_deploy.LIGHT], files)


@pytest.mark.parametrize(
    "name,flag",
    [
        ("deploy", "--json"),
        ("deploy", "--picture"),
        ("deploy", "--table"),
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


@pytest.mark.slow
def test_depthwise_gradients_are_measured(script, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_depthwise, "SHAPE", (2, 3, 64, 64))
    monkeypatch.setattr(bench_depthwise, "NETWORKS", [("mobilenetv2", 8, True)])
    code, _, err = script(bench_depthwise, "--rounds", "2", "--json", tmp_path / "depthwise.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "depthwise.json").read_text())["rows"]
    assert [row["impl"] for row in rows] == ["pytorch", "here"] and all(row["p50_ms"] > 0 for row in rows)
