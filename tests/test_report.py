import collections
import csv
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import report

PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
FULL = ["sup", "pixel", "image:T_D", "region:T_W"]


def row(method="sup", backbone="resnet18", miou=50.0, seed=0, **changes):
    """A row as evaluate.py writes it."""
    distilled = method in ("mgd", "kd", "cwd")
    return {
        "dataset": "voc", "partition": "1/8", "partition_hash": "aaa", "labeled": 1323, "method": method, "role": "student",
        "backbone": backbone, "head_width": 256, "separable_head": False, "weights": "imagenet", "crop": [512, 512],
        "seed": seed, "steps": 1000, "seconds": 1.0, "teachers": ["T_D", "T_W"] if distilled else [],
        "teacher_labels": "partition" if distilled else None, "losses": FULL if method == "mgd" else ["sup"],
        "regions": 7 if method == "mgd" else None, "gmacs_backbone": 15.9, "gmacs_model": 41.2, "mgd_ops": "torch",
        "miou": miou, "iou": {"a": miou}, "window": [512, 512], "scales": [1.0], "flip": False, **changes,
    }  # fmt: skip


@pytest.fixture
def tables(script, tmp_path, monkeypatch):
    """tables(rows, more rows, ...), a result file each -> the folder of the report; its output is in `tables.said`."""

    def call(*files, created=None, pictures=False):
        if not pictures:  # which take most of the time
            monkeypatch.setattr(report, "comparable", lambda groups: {})
        paths = []
        for i, rows in enumerate(files):
            date = (created or {}).get(i, f"2026-01-0{i + 1}T00:00:00+00:00")
            paths.append(tmp_path / f"r{i}.json")
            paths[-1].write_text(json.dumps({"what": "evaluation", "created": date, "rows": rows}))
        code, call.said, err = script(report, *paths, "--out", tmp_path / "out")
        assert code == 0, err
        return tmp_path / "out"

    return call


def markdown(path):
    """The lines of a table: header -> cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in path.read_text().splitlines() if line[:1] == "|"]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def records(path, source="ours"):
    with open(path, newline="") as file:
        return [line for line in csv.DictReader(file) if line["source"] == source]


# ---- figures are right ----


def test_mean_and_sample_deviation_over_seeds(tables):
    values = [51.25, 48.5, 50.75]
    out = tables([row(miou=v, seed=i) for i, v in enumerate(values)] + [row("mgd", miou=60.125)])
    sup, mgd = records(out / "table1.csv")
    assert float(sup["miou"]) == pytest.approx(np.mean(values)) and sup["n"] == "3" and sup["seeds"] == "0 1 2"
    assert float(sup["deviation"]) == pytest.approx(np.std(values, ddof=1))
    assert (mgd["miou"], mgd["deviation"], mgd["n"]) == ("60.125", "", "1")  # one seed tells no deviation
    cells = {(line["method"], line["network"]): line["1/8 ours"] for line in markdown(out / "table1.md")}
    assert cells["Sup", "ResNet-18"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (3)"
    assert cells["MGD", "ResNet-18"] == "60.12"


@pytest.mark.parametrize("dataset,number", [("voc", "1"), ("voc-few", "2"), ("cityscapes", "3")])
def test_paper_figures_stand_beside_ours_and_missing_cells_are_dashes(tables, dataset, number):
    known = PAPER["datasets"][dataset]
    out = tables([row("mgd", dataset=dataset, labeled=known["labeled"][1])])
    lines = markdown(out / f"table{number}.md")
    assert len(lines) == len(known["rows"])
    expected = [f"{value:.2f}" for _, _, values in known["rows"] for value in values]
    assert [line[f"{part} paper"] for line in lines for part in PAPER["partitions"]] == expected
    ours = [line[f"{part} ours"] for line in lines for part in PAPER["partitions"]]
    assert collections.Counter(ours) == {"–": len(ours) - 1, "50.00": 1}
    from_csv = [float(line["miou"]) for line in records(out / f"table{number}.csv", "paper")]
    assert from_csv == [value for _, _, values in known["rows"] for value in values]


def test_paper_figures_are_the_published_ones():
    """Some, typed from the paper."""

    def mgd(dataset): return report.paper_rows(dataset)["mgd", "student", "resnet18"]  # fmt: skip

    assert list(mgd("voc").values()) == [66.86, 68.29, 69.71, 71.59]
    assert mgd("voc-few")["voc-few", "1/16"] == 58.03 and mgd("cityscapes")["cityscapes", "1/2"] == 75.40
    for part in ("4", "5a", "5b", "6"):  # each ablation has the full method, and it is the same one
        assert {("voc", "1/8"): 68.29} in report.paper_ablation(part, "camvid").values()
    assert report.paper_ablation("5a", "cityscapes")[("sup", "pixel"), "resnet18"] == {("cityscapes", "1/8"): 69.05}


def test_csv_and_markdown_agree(tables):
    rng = np.random.default_rng(0)
    rows = [row(method, backbone, rng.uniform(30, 80), seed, partition=part, partition_hash=part, labeled=labeled, steps=steps)
            for method in ("sup", "cps", "mgd") for backbone in ("resnet18", "mobilenetv2") for seed in (0, 1)
            for part, labeled in (("1/8", 1323), ("1/2", 5291)) for steps in (500, 1000)]  # fmt: skip
    out = tables(rows)
    names = report.METHODS | report.BACKBONES
    shown = {(line["method"], line["network"], line["steps"], part): line[f"{part} ours"]
             for line in markdown(out / "table1.md") for part in ("1/8", "1/2") if line[f"{part} ours"] != "–"}  # fmt: skip
    read = {(names[r["method"]], names[r["backbone"]], f"{int(r['steps']):,}", r["partition"]):
            f"{float(r['miou']):.2f} ± {float(r['deviation']):.2f} ({r['n']})"
            for r in records(out / "table1.csv")}  # fmt: skip
    assert shown == read and len(read) == 3 * 2 * 2 * 2


# ---- nothing is mixed that is not alike ----


@pytest.mark.parametrize("change", [
    {"steps": 2000}, {"partition_hash": "bbb"}, {"head_width": 64}, {"separable_head": True}, {"weights": "none"},
    {"crop": [256, 512]}, {"window": None}, {"scales": [0.5, 1.0]}, {"flip": True}, {"backbone": "mobilenetv2"},
    {"partition": "1/4", "labeled": 2646}, {"role": "teacher_deep"}, {"dataset": "camvid"},
])  # fmt: skip
def test_runs_that_differ_are_not_averaged_and_can_be_told_apart(tables, change):
    out = tables([row(miou=40.0), row(miou=60.0, seed=1, **change)])
    lines = [line for path in sorted(out.glob("table*.md")) for line in markdown(path)]
    assert sum("±" in cell for line in lines for cell in line.values()) == 0
    of = [(key, line) for line in lines for key, cell in line.items() if cell in ("40.00", "60.00")]
    assert len(of) == 2
    told = [{"column": key, **{k: v for k, v in line.items() if "paper" not in k and "ours" not in k}} for key, line in of]
    assert told[0] != told[1] or "dataset" in change  # which has a table of its own


def test_a_separable_head_that_is_not_named_is_a_plain_one(tables):
    old = row(seed=1)
    del old["separable_head"]
    (line,) = records(tables([row(), old]) / "table1.csv")
    assert line["n"] == "2"


def test_students_of_teachers_with_all_labels_have_their_own_table(tables):
    rows = [row("mgd", miou=50.0), row("mgd", miou=70.0, teacher_labels="all"), row("sup", miou=40.0),
            row("cps", "resnet101", 80.0, partition="1", partition_hash="all", labeled=10582, role="teacher_deep")]  # fmt: skip
    out = tables(rows)
    both = {name: {r["miou"] for r in records(out / f"{name}.csv")} for name in ("table1", "table1-all")}
    assert both == {"table1": {"50.0", "40.0", "80.0"}, "table1-all": {"70.0", "40.0", "80.0"}}
    text = (out / "table1-all.md").read_text()
    assert "teachers trained on all labels" in text and "paper" not in text
    assert "all labels" not in (out / "table1.md").read_text()


def test_without_all_labels_there_is_no_table_of_them(tables):
    assert not list(tables([row(), row("mgd")]).glob("*-all*"))


@pytest.mark.parametrize("newer_first", [False, True])
def test_the_newer_of_two_files_counts(tables, newer_first):
    dates = {0: "2026-05-01T00:00:00+00:00"} if newer_first else {}
    out = tables([row(miou=41.0), row(miou=43.0, seed=1)], [row(miou=51.0)], created=dates)
    (line,) = records(out / "table1.csv")
    assert line["n"] == "2" and float(line["miou"]) == ((41 + 43) / 2 if newer_first else (51 + 43) / 2)
    said = [text for text in tables.said.splitlines() if "which is newer" in text]
    assert len(said) == 1 and said[0].startswith("r1.json" if newer_first else "r0.json") and "1 row(s)" in said[0]


# ---- vocabulary ----


@pytest.mark.parametrize("old,roles", [
    (["resnet34", "resnet18"], ("T_D", "T_W")), (["T_D", "T_W"], ("T_D", "T_W")), (["T_W"], ("T_W",)), ([], ()),
    (["T_D", "T_D"], ("T_D", "T_D")), (["resnet18", "resnet18"], ("T_D", "T_D")),
])  # fmt: skip
def test_names_of_teachers_in_older_files(old, roles):
    assert report.normal_teachers(old) == roles


def test_older_rows_average_with_newer_ones(tables):
    halves = ["region:T_W", "pixel:unlabeled", "image:T_D", "sup", "pixel:labeled"]
    out = tables([row("mgd"), row("mgd", seed=1, teachers=["resnet34", "resnet18"]), row("mgd", seed=2, losses=halves)])
    (line,) = records(out / "table1.csv")
    assert line["n"] == "3" and line["losses"] == " ".join(FULL)


# ---- ablations ----


def ablation_rows(**more):
    one = ["sup", "pixel", "image:T_D", "region:T_D"]
    return [
        row(miou=40.0, **more), row("mgd", miou=50.0, **more),
        row("mgd", miou=44.0, teachers=["T_D"], losses=one, **more),
        row("mgd", miou=45.0, teachers=["T_D", "T_D"], **more),
        row("mgd", miou=42.0, losses=["sup", "pixel"], **more),
        row("mgd", miou=41.0, losses=["sup", "pixel:labeled"], **more),
        row("mgd", miou=48.0, regions=3, **more),
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "camvid"])
def test_ablations_beside_the_paper(tables, dataset):
    out = tables(ablation_rows(dataset=dataset))
    found = {}
    for part, field in (("4", "teachers"), ("5a", "losses"), ("5b", "losses"), ("6", "regions")):
        lines = markdown(out / f"table{part}-{dataset}.md")
        has = dataset == "cityscapes" and part != "6"  # otherwise VOC's, and the column says so
        assert f"paper: {'Cityscapes' if has else 'PASCAL VOC 2012'}, 1/8" in lines[0]
        found[part] = {line[field]: line["1/8"] for line in lines if line["1/8"] != "–"}
        assert len(lines) == len(PAPER["ablations"]["rows"][part])  # those without a run of ours too
    full = "Sup + pixel + image T_D + region T_W"
    assert found["4"] == {"T_D": "44.00", "T_D + T_D": "45.00", "T_D + T_W": "50.00"}
    assert found["5a"] == {"Sup": "40.00", "Sup + pixel": "42.00", full: "50.00"}
    halves = full.replace("pixel", "pixel labeled + pixel unlabeled")
    assert found["5b"] == {"Sup + pixel labeled": "41.00", halves: "50.00"}
    assert found["6"] == {"3×3": "48.00", "7×7": "50.00"}
    name = {"voc": "table1", "cityscapes": "table3"}.get(dataset, f"table-{dataset}")
    assert {r["miou"] for r in records(out / f"{name}.csv")} == {"40.0", "50.0"}  # of MGD, the full method alone


def test_without_ablations_there_are_no_tables_of_them(tables):
    assert {path.name for path in tables([row(), row("mgd")]).glob("*.md")} == {"table1.md"}


def test_heads(tables):
    rows = [row("mgd", miou=50 - i, head_width=256 >> i, gmacs_model=40.0 / (i + 1), separable_head=separable, **more)
            for i in range(3) for separable, more in ((False, {}), (True, {"params_m": 2.5, "latency_ms": 20.0}))]  # fmt: skip
    out = tables([*rows, row(miou=10.0)], pictures=True)
    lines = markdown(out / "heads-voc.md")
    assert [(line["head width"], line["separable"]) for line in lines] == [
        (width, sep) for sep in ("no", "yes") for width in ("256", "128", "64")]  # fmt: skip
    assert {line["params, M"] for line in lines} == {"–", "2.50"} and is_picture(out / "heads-voc.png")


# ---- pictures ----


def is_picture(path):
    image = Image.open(path)
    return image.format == "PNG" and 950 <= image.width <= 1050 and len(image.getcolors(1 << 20)) > 20


def test_pictures(tables):
    parts = (("1/8", 1323), ("1/4", 2646))
    out = tables([row(method, miou=50 + labeled / 1000, seed=seed, partition=part, partition_hash=part, labeled=labeled)
                  for part, labeled in parts for method in ("sup", "mgd") for seed in (0, 1)], pictures=True)  # fmt: skip
    assert is_picture(out / "fig1-voc.png") and is_picture(out / "fig3-voc.png")


def test_pictures_without_points_are_not_drawn_and_that_is_said(tables):
    out = tables([row()], pictures=True)
    assert not list(out.glob("*.png"))
    assert [line.split(":")[0] for line in tables.said.splitlines() if "not drawn for voc" in line] == ["fig1", "fig3", "heads"]


def test_curves(script, tmp_path):
    for name, extra in (("a", {"sup": 1.0, "cps": 0.5}), ("b", {"sup": float("nan")})):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "lr": 0.1, "images_per_s": 9.0, "data_wait": 0.0, **extra} for s in range(20, 200, 20)]
        text = "\n".join(map(json.dumps, [*lines, {"step": 180, "miou": 40.0}]))
        (tmp_path / name / "log.jsonl").write_text(text + '\n{"step": 200, "l')  # a run that goes on
    (tmp_path / "c.jsonl").write_text("")
    logs = [tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl", tmp_path / "c.jsonl"]
    code, out, err = script(report, "--curves", *logs, "--out", tmp_path / "new" / "curves.png")
    assert code == 0 and "c.jsonl: empty yet" in out and is_picture(tmp_path / "new" / "curves.png"), err


# ---- as a user runs it ----


def test_committed_results_are_read(script, tmp_path):
    code, out, err = script(report, *sorted((ROOT / "results").glob("*.json")), "--out", tmp_path)
    assert code == 0 and (tmp_path / "table-shapes.md").exists() and "without mIoU, left out: " in out, err
    demo = json.loads((ROOT / "results" / "demo.json").read_text())["rows"]
    mean = np.mean([r["miou"] for r in demo if r["method"] == "mgd"])
    (line,) = [line for line in markdown(tmp_path / "table-shapes.md") if line["method"] == "MGD"]
    assert any(cell.startswith(f"{mean:.2f} ± ") for cell in line.values())


@pytest.mark.parametrize("arguments,expected", [
    ([], "give result files"), (["absent.json"], "absent.json: cannot be read"), (["junk.json"], "junk.json: is not JSON"),
    (["list.json"], "list.json: is not a result file"), (["empty.json"], "empty.json: holds no rows"),
    (["lacks.json"], "lacks.json: a row lacks 'partition'"), (["nan.json"], "nan.json: a row's mIoU is nan"),
    (["bench.json", "paper.json"], "no result file has rows"), (["good.json", "--out", "junk.json"], "--out junk.json"),
    (["--curves", "absent"], "--curves absent: cannot be read"), (["--curves", "junk.json"], "--curves junk.json: is no log"),
    (["--curves", "good.json", "--out", "x.jpg"], "ends in .png"), (["--curves", "none.jsonl"], "holds no step yet"),
    (["--curves", "bare.json"], "holds no step yet"), (["good.json", "--curves", "none.jsonl"], "or --curves"),
])  # fmt: skip
def test_wrong_input_is_one_line(script, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    contents = {"junk": "{", "list": "[]", "empty": '{"rows": []}', "lacks": '{"rows": [{"miou": 1, "dataset": "voc"}]}',
                "nan": json.dumps({"rows": [row(miou=float("nan"))]}), "bench": '{"rows": [{"case": "x", "miou": 1}]}',
                "paper": '{"what": "paper"}', "bare": '{"step": 1}', "good": json.dumps({"rows": [row()]})}  # fmt: skip
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "none.jsonl").write_text("")
    code, _, err = script(report, *arguments)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1, err
