import collections
import csv
import json
import re

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import result_files
from paper import report
from recipes import MGD_METHODS, ROW, STUDENT_METHODS
from result_files import METHODS_WITH, OPTIONAL

PAPER = json.loads((ROOT / "results" / "paper.json").read_text())
FULL = ["sup", "pixel", "image:T_D", "region:T_W"]


def row(method="sup", backbone="resnet18", miou=50.0, seed=0, **changes):
    """A row as evaluate.py writes it."""
    distilled = method in STUDENT_METHODS
    return {
        "dataset": "voc",
        "partition": "1/8",
        "partition_hash": "aaa",
        "labeled": 1323,
        "method": method,
        "role": "student",
        "backbone": backbone,
        "head_width": 256,
        "separable_head": False,
        "weights": "imagenet",
        "crop": [512, 512],
        "seed": seed,
        "steps": 1000,
        "seconds": 1.0,
        "teachers": ["T_D", "T_W"] if distilled else [],
        "teacher_labels": "partition" if distilled else None,
        "losses": FULL if method in MGD_METHODS else ["sup"],
        "regions": 7 if method in MGD_METHODS else None,
        "gmacs_backbone": 15.9,
        "gmacs_model": 41.2,
        "mgd_ops": "torch",
        "miou": miou,
        "iou": {"a": miou},
        "window": [512, 512],
        "scales": [1.0],
        "flip": False,
        **changes,
    }


@pytest.fixture
def tables(script, tmp_path, monkeypatch):
    """tables(rows, more rows, ...), one result file each, from old to new -> the folder of the report."""

    def call(*files, newest_first=False, pictures=False):
        if not pictures:  # which take most of the time
            monkeypatch.setattr(report, "draw_figures", lambda *_: None)
        paths = [tmp_path / f"r{i}.json" for i in range(len(files))]
        for i, (path, rows) in enumerate(zip(paths, files, strict=True)):
            created = f"2026-01-{20 - i if newest_first else 10 + i}T00:00:00+00:00"
            path.write_text(json.dumps({"what": "evaluation", "created": created, "rows": rows}))
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


def is_picture(path):
    image = Image.open(path)
    return image.format == "PNG" and 950 <= image.width <= 1050 and len(image.getcolors(1 << 20)) > 20


# ---- numbers are right ----


def test_mean_and_sample_deviation_over_seeds(tables):
    values = [51.25, 48.5, 50.75]
    out = tables([row(miou=v, seed=i) for i, v in enumerate(values)] + [row("mgd", miou=60.125)])
    assert {path.name for path in out.glob("*.md")} == {"table1.md"}  # no ablation, no heads: no such tables
    sup, mgd = records(out / "table1.csv")
    assert float(sup["miou"]) == pytest.approx(np.mean(values)) and sup["n"] == "3" and sup["seeds"] == "0 1 2"
    assert float(sup["deviation"]) == pytest.approx(np.std(values, ddof=1))
    assert (mgd["miou"], mgd["deviation"], mgd["n"]) == ("60.125", "", "1")  # one seed has no deviation
    cells = {(line["method"], line["backbone"]): line["1/8"] for line in markdown(out / "table1.md")}
    assert cells["Sup", "ResNet-18"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (3)"
    assert cells["MGD", "ResNet-18"] == "60.12" and cells["Sup", "MobileNetV2"] == "–"


@pytest.mark.parametrize("dataset,table", PAPER["tables"].items())
def test_paper_numbers_stand_beside_ours(tables, dataset, table):
    known = [r for r in PAPER["rows"] if r["table"] == table]
    out = tables([row("mgd", dataset=dataset, labeled=known[1]["labeled"])])
    names = report.NAMES
    shown = {
        (line["role"], line["backbone"], line["method"], f"{part} paper"): line[f"{part} paper"]
        for line in markdown(out / f"{table}.md")
        for part in ("1/16", "1/8", "1/4", "1/2")
    }
    assert shown == {
        (names[r["role"]], names[r["backbone"]], names[r["method"]], f"{r['partition']} paper"): f"{r['miou']:.2f}"
        for r in known
    }
    ours = collections.Counter(line["1/8"] for line in markdown(out / f"{table}.md"))
    assert ours == {"–": len(known) // 4 - 1, "50.00": 1}
    assert [float(line["miou"]) for line in records(out / f"{table}.csv", "paper")] == [r["miou"] for r in known]


def test_paper_numbers_are_the_published_ones():
    """Some numbers, typed from the paper."""

    def numbers(**wanted):
        return [r["miou"] for r in PAPER["rows"] if all(r.get(key) == value for key, value in wanted.items())]

    assert numbers(table="table1", method="mgd", backbone="resnet18") == [66.86, 68.29, 69.71, 71.59]
    assert numbers(table="table2", method="mgd", partition="1/16") == [58.03]
    assert numbers(table="table3", method="mgd", backbone="resnet18", partition="1/2") == [75.40]
    assert numbers(table="table5a", dataset="cityscapes", losses=["sup", "pixel"]) == [69.05]
    for table in ("table4", "table5a", "table5b", "table6"):  # each ablation has the full method, and it is the same one
        assert 68.29 in numbers(table=table, dataset="voc")


# ---- nothing is mixed that is not alike ----


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2000},
        {"partition_hash": "bbb"},
        {"head_width": 64},
        {"separable_head": True},
        {"weights": "none"},
        {"crop": [256, 512]},
        {"window": None},
        {"scales": [0.5, 1.0]},
        {"flip": True},
        {"backbone": "mobilenetv2"},
        {"partition": "1/4", "labeled": 2646},
        {"role": "teacher_deep"},
        {"dataset": "camvid"},
        {"batch": 16},
        {"lr": 0.1},
        {"teacher_backbones": ["vgg"]},
        {"teacher_methods": ["mt"]},
        {"teacher_steps": [9]},
        {"train_scales": [1.0]},
        {"list": "test (0123)"},
        *({key: 0.123} for key in OPTIONAL if key not in ROW),
    ],
)
def test_runs_that_differ_are_not_averaged_and_can_be_told_apart(tables, change):
    method = METHODS_WITH.get(next(iter(change)), ("sup",))[0]  # of those that have the setting
    out = tables([row(method, miou=40.0), row(method, miou=60.0, seed=1, **change)])
    lines = [(path.stem, line) for path in sorted(out.glob("table*.md")) for line in markdown(path)]
    found = [(table, key, line) for table, line in lines for key, cell in line.items() if cell in ("40.00", "60.00")]
    assert len(found) == 2 and not any("±" in cell for _, line in lines for cell in line.values())
    told = [(table, key, [c for k, c in line.items() if not k.startswith("1/")]) for table, key, line in found]
    assert told[0] != told[1]


def test_settings_that_a_method_does_not_have_do_not_keep_its_runs_apart(tables):
    out = tables([row(miou=40.0, kd_weight=1.0, cutmix=True), row(miou=42.0, seed=1, kd_weight=4.0, cutmix=False)])
    assert [line["1/8"] for line in markdown(out / "table1.md") if line["method"] == "Sup"].count("41.00 ± 1.41 (2)") == 1


def test_all_settings_in_which_lines_of_a_method_differ_are_columns(tables):
    """Also where one of them would tell the lines apart."""
    out = tables([row(miou=40.0, lr=0.1), row(miou=42.0, steps=2000, lr=0.2), row("mgd", miou=50.0, lr=0.3)])
    lines = [(line["steps"], line["lr"]) for line in markdown(out / "table1.md") if line["1/8"] != "–"]
    assert lines == [("1,000", "0.1"), ("2,000", "0.2"), ("1,000", "0.3")]
    assert "batch" not in markdown(out / "table1.md")[0]


def test_a_table_of_other_images_than_val_says_so(tables):
    """Also where all of its numbers are of one list."""
    out = tables([row(miou=40.0, list="test (0123)"), row("mgd", miou=50.0, list="test (0123)")])
    assert {line["list"] for line in markdown(out / "table1.md") if line["1/8"] != "–"} == {"test (0123)"}
    assert "mIoU in percent on the images of the list, or of val, mean" in (out / "table1.md").read_text()
    assert "mIoU in percent on val, mean" in (tables([row(miou=40.0)]) / "table1.md").read_text()


def test_students_of_one_seed_and_different_teachers_all_count(tables):
    out = tables([row("mgd", miou=50.0 + sum(seeds), seed=1, teacher_seeds=seeds) for seeds in ([0, 0], [1, 1])])
    (line,) = records(out / "table1.csv")
    assert (line["miou"], line["n"], line["seeds"]) == ("51.0", "2", "1 1")


def test_students_of_teachers_with_all_labels_have_their_own_table(tables):
    rows = [
        row("mgd", miou=50.0),
        row("mgd", miou=70.0, teacher_labels="all"),
        row("sup", miou=40.0),
        row("cps", miou=45.0),
        row("cps", "resnet101", 80.0, partition="1", partition_hash="all", labeled=10582, role="teacher_deep"),
    ]
    out = tables(rows)
    both = {name: {float(r["miou"]) for r in records(out / f"{name}.csv")} for name in ("table1", "table1-all")}
    assert both == {"table1": {50, 40, 45, 80}, "table1-all": {70, 40, 45, 80}}
    text = (out / "table1-all.md").read_text()
    assert "teachers trained on all labels" in text and "paper" not in text
    assert "all labels" not in (out / "table1.md").read_text()


@pytest.mark.parametrize("newest_first", [False, True])
def test_the_newest_of_rows_that_agree_counts(tables, newest_first):
    out = tables([row(miou=41.0), row(miou=43.0, seed=1)], [row(miou=51.0)], newest_first=newest_first)
    (line,) = records(out / "table1.csv")
    assert line["n"] == "2" and float(line["miou"]) == ((41 + 43) / 2 if newest_first else (51 + 43) / 2)
    assert "1 row(s) left out" in tables.said


# ---- ablations ----


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "camvid"])
def test_ablations_beside_the_paper(tables, dataset):
    one = ["sup", "pixel", "image:T_D", "region:T_D"]
    out = tables(
        [
            row(dataset=dataset, **r)
            for r in (
                {"miou": 40.0},
                {"method": "mgd"},
                {"method": "mgd", "miou": 44.0, "teachers": ["T_D"], "losses": one},
                {"method": "mgd", "miou": 45.0, "teachers": ["T_D", "T_D"]},
                {"method": "mgd", "miou": 48.0, "regions": 3},
                {"method": "mgd", "miou": 42.0, "losses": ["sup", "pixel"], "regions": None},
                {"method": "mgd", "miou": 41.0, "losses": ["sup", "pixel:labeled"], "regions": None},
            )
        ]
    )
    found = {}
    for table in ("table4", "table5a", "table5b", "table6"):
        lines, field = markdown(out / f"{table}-{dataset}.md"), report.TABLES[table][1][0]
        known = [r for r in PAPER["rows"] if r["table"] == table]
        known = [r for r in known if r["dataset"] == dataset] or [r for r in known if r["dataset"] == "voc"]
        column = "1/8 paper" + (", PASCAL VOC 2012" if known[0]["dataset"] != dataset else "")
        assert sorted(line[column] for line in lines) == sorted(f"{r['miou']:.2f}" for r in known)
        found[table] = {line[field]: line["1/8"] for line in lines if line["1/8"] != "–"}
    full = "Sup + pixel + image T_D + region T_W"
    assert found["table4"] == {"T_D": "44.00", "T_D + T_D": "45.00", "T_D + T_W": "50.00"}
    assert found["table5a"] == {"Sup": "40.00", "Sup + pixel": "42.00", full: "50.00"}
    assert found["table5b"] == {"Sup + pixel labeled": "41.00", full: "50.00"}
    assert found["table6"] == {"3×3": "48.00", "7×7": "50.00"}
    methods = records(out / f"{PAPER['tables'].get(dataset, f'table-{dataset}')}.csv")
    assert {r["miou"] for r in methods} == {"40.0", "50.0"}  # of MGD, the full method alone


@pytest.mark.parametrize(
    "roles,backbones,kinds",
    [
        ("teacher_deep teacher_wide", "resnet101 wide_resnet34", "T_D T_W"),
        ("teacher_deep teacher_deep", "r34 r34", "T_D T_D"),
        ("teacher_wide teacher_wide", "r18 r18", "T_W T_W"),
        ("student teacher_wide", "resnet34 resnet18", "T_D T_W"),
        ("student teacher_wide", "resnet18 resnet18", "T_W T_W"),
        ("teacher_wide teacher_deep", "resnet18 resnet34", "T_D T_W"),
        ("teacher_deep teacher_wide", "resnet18 resnet18", "T_D T_W"),
        ("student student", "resnet18 resnet18", "T_D T_W"),
    ],
)
def test_two_teachers_of_one_kind_are_no_full_mgd(tables, roles, backbones, kinds):
    """Rows name teachers by the flag they were given under, also where both are of one kind."""
    both = {"teachers": ["T_D", "T_W"], "teacher_roles": roles.split(), "teacher_backbones": backbones.split()}
    out = tables([row(), row("mgd", miou=44.0, **both), row("mgd", miou=46.0, teachers=["T_D"])])
    (line,) = [line for line in markdown(out / "table4-voc.md") if line["1/8"] == "44.00"]
    assert line["teachers"] == kinds.replace(" ", " + ")
    in_full = [line for line in markdown(out / "table1.md") if line["1/8"] == "44.00"]
    assert len(in_full) == (kinds == "T_D T_W")


def test_files_of_pseudo_labels_are_a_kind_of_teacher(tables):
    """And no second T_D, whatever the network beside them."""
    files = {"teacher_labels": "unknown", "pseudo_labels": "0123", "losses": ["sup", "pixel", "image:T_D", "region:T_D"]}
    one = {"teacher_roles": ["teacher_deep"], "teacher_backbones": ["r34"]}
    two = {"teacher_roles": ["teacher_deep", "teacher_wide"], "teacher_backbones": ["r34", "r18"], "losses": FULL}
    rows = [row(), row("mgd"), row("mgd", miou=44.0, teachers=["T_D", "pseudo labels"], **{**files, **one})]
    out = tables([*rows, row("mgd", miou=45.0, teachers=["T_D", "T_W", "pseudo labels"], **{**files, **two})])
    lines = {line["1/8"]: line["teachers"] for line in markdown(out / "table4-voc.md")}
    assert lines["44.00"] == "T_D + pseudo labels" and lines["45.00"] == "T_D + T_W + pseudo labels"
    elsewhere = [line["1/8"] for path in out.glob("*.md") if path.stem != "table4-voc" for line in markdown(path)]
    assert elsewhere and not {"44.00", "45.00"} & {*elsewhere}


# ---- pictures, and as a user runs it ----


def test_runs_that_no_table_shows_are_named(tables):
    image_mean = row("mgd", losses=["sup", "image:T_D"], teachers=["T_D"], regions=None, steps=1234)
    tables([row(), row("mgd"), image_mean])
    assert "voc: no table has a place for 1 of 3 run(s): MGD ResNet-18 1/8 1,234 (r0.json)\n" in tables.said
    tables([row(), row("mgd")])
    assert "no table" not in tables.said


@pytest.mark.slow
def test_heads_have_a_table_and_every_figure_is_drawn(tables):
    heads = [
        row("mgd", miou=50 - i, head_width=256 >> i, gmacs_model=40.0 / (i + 1), separable_head=separable)
        for i in range(3)
        for separable in (False, True)
    ]
    parts = [
        row("sup", miou=40 + n / 1000, seed=seed, partition=part, partition_hash=part, labeled=n)
        for part, n in (("1/4", 2646), ("1/2", 5291))
        for seed in (0, 1)
    ]
    out = tables([*heads, *parts, row("cps", "resnet101", 80.0, role="teacher_deep", gmacs_backbone=59.0)], pictures=True)
    lines = [(line["head width"], line["separable head"]) for line in markdown(out / "heads-voc.md")]
    assert lines == [(width, sep) for width in ("64", "128", "256") for sep in ("no", "yes")]
    assert all(is_picture(out / f"{name}-voc.png") for name in ("fig1", "fig3", "heads"))
    assert "fig1 and fig3 leave out" in tables.said


def test_partitions_trained_for_other_steps_are_no_line_of_fig3(tables):
    half = {"partition": "1/2", "partition_hash": "bbb", "labeled": 5291}
    assert not (tables([row(), row(steps=2000, **half)], pictures=True) / "fig3-voc.png").exists()
    assert is_picture(tables([row(), row(**half)], pictures=True) / "fig3-voc.png")


def test_curves_show_the_logged_values_and_their_running_mean(script, tmp_path, monkeypatch):
    drawn, save = {}, report.save_with_legend

    def keep(figure, entries, path):
        drawn.update({axis.get_title(): [line.get_data() for line in axis.lines] for axis in figure.axes})
        save(figure, entries, path)

    monkeypatch.setattr(report, "save_with_legend", keep)
    for name, extra in (("a", {"cps": 0.5}), ("b", {"sup": float("nan")})):
        (tmp_path / name).mkdir()
        common = {"lr": 0.1, "images_per_s": 9.0, "data_wait": 0.0}
        lines = [{"step": step, **common, "sup": step / 20, **extra} for step in range(20, 200, 20)]
        text = "\n".join(map(json.dumps, [*lines, {"step": 180, "miou": 40.0}]))
        (tmp_path / name / "log.jsonl").write_text(text + '\n{"step": 200, "l')  # a run that goes on
    logs = [tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl"]
    code, _, err = script(report, "--curves", *logs, "--out", tmp_path / "new" / "curves.png")
    assert code == 0 and is_picture(tmp_path / "new" / "curves.png"), err
    assert drawn.keys() == {"loss: sup", "loss: cps", "mIoU on val, %"}
    logged, smooth, *_ = drawn["loss: sup"]
    steps = np.arange(20, 200, 20)
    np.testing.assert_allclose(logged, (steps, steps / 20))
    np.testing.assert_allclose(smooth, (steps, [np.mean(range(max(1, k - 4), min(9, k + 4) + 1)) for k in range(1, 10)]))
    assert np.isnan(drawn["loss: sup"][-1][1]).all()  # b's
    assert np.array(drawn["mIoU on val, %"]).tolist() == [[[180], [40]]] * 2


@pytest.mark.slow
def test_committed_results_are_read(script, tmp_path):
    code, _, err = script(report, *sorted((ROOT / "results").glob("*.json")), "--out", tmp_path)
    assert code == 0, err
    demo = json.loads((ROOT / "results" / "demo.json").read_text())["rows"]
    mean = np.mean([r["miou"] for r in demo if r["method"] == "mgd"])
    (line,) = [line for line in markdown(tmp_path / "table-shapes.md") if line["method"] == "MGD"]
    assert any(cell.startswith(f"{mean:.2f} ± ") for cell in line.values())


@pytest.mark.slow
def test_tables_and_pictures_are_written_again_and_others_files_with_overwrite_alone(script, tmp_path):
    """Whatever is written is known as ours, also the tables, whose CSV begins with its columns, as other programs expect."""
    command = [ROOT / "results" / "demo.json", "--out", tmp_path / "out"]
    for _ in range(2):
        code, _, err = script(report, *command)
        assert code == 0, err
    written = sorted((tmp_path / "out").iterdir())
    assert {path.suffix for path in written} == {".md", ".csv", ".png"} and all(map(result_files.is_ours, written))
    assert records(tmp_path / "out" / "table-shapes.csv")
    before = {path: path.read_bytes() for path in written}
    for path in written:
        for kept, content in before.items():
            kept.write_bytes(content)
        path.write_bytes(b"precious")
        for other in written:
            if other != path:
                other.unlink()
        code, _, err = script(report, *command)
        assert code == 2 and f"--out: {path} exists" in err and len(err.splitlines()) == 1
        assert [*(tmp_path / "out").iterdir()] == [path] and path.read_bytes() == b"precious"
    assert script(report, *command, "--overwrite")[0] == 0 and path.read_bytes() != b"precious"


def test_what_a_table_replaces_is_looked_at_before_the_first_is_written(script, tmp_path):
    """A folder in the place of the last picture of the second data set."""
    rows = [row(dataset=name, seed=seed) for name in ("a", "b") for seed in (0, 1)]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "out" / "heads-b.png").mkdir(parents=True)
    assert script(report, tmp_path / "r.json", "--out", tmp_path / "out", "--overwrite")[0] == 2
    assert len([*(tmp_path / "out").iterdir()]) == 1


@pytest.mark.slow
def test_all_that_a_report_may_write_is_looked_at(script, tmp_path, monkeypatch):
    """Nothing is written that `outputs` does not name."""
    seen = []
    monkeypatch.setattr(report, "refuse_foreign", lambda paths, *_: seen.extend(paths))
    assert script(report, *sorted((ROOT / "results").glob("*.json")), "--out", tmp_path / "out")[0] == 0
    assert {*(tmp_path / "out").iterdir()} <= {*seen}


def test_curves_keep_others_pictures_and_names_are_no_formulas(script, tmp_path):
    log = tmp_path / "$a_b$ $c" / "x" / "y" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"step": 1, "lr": 1, "images_per_s": 1, "data_wait": 0, "sup": null, "grad_loss": null}\n' * 3)
    picture = tmp_path / "mine.png"
    picture.write_bytes(b"precious")
    code, _, err = script(report, "--curves", log, "--out", picture)
    assert code == 2 and "mine.png exists" in err and picture.read_bytes() == b"precious"
    assert script(report, "--curves", log, "--out", picture, "--overwrite")[0] == 0 and result_files.is_ours(picture)
    assert script(report, "--curves", log, "--out", picture)[0] == 0


@pytest.mark.parametrize(
    "arguments,expected",
    [
        ([], "give result files"),
        (["absent.json"], "absent.json: cannot be read"),
        (["junk.json"], "junk.json: cannot be read"),
        (["list.json"], "list.json: holds no rows"),
        (["empty.json"], "empty.json: holds no rows"),
        (["lacks.json"], "lacks.json: a row lacks 'partition'"),
        (["nan.json"], "nan.json: a row has 'miou' as nan"),
        (["bench.json", "paper.json"], "no result file has rows"),
        (["good.json", "--out", "junk.json"], "--out junk.json"),
        (["--curves", "absent"], "--curves absent: cannot be read"),
        (["--curves", "list.json"], "holds no step yet"),
        (["--curves", "empty.json"], "--curves empty.json: cannot be read as a log"),
        (["--curves", "step.json"], "no step yet"),
        (["--curves", "good.json", "--out", "x.jpg"], "ends in .png"),
        (["good.json", "--curves", "step.json"], "or --curves"),
        (["--curves", "step.json", "--out", "junk.json/x.png"], "--out junk.json: cannot be written to"),
    ],
)
def test_wrong_input_is_one_line(script, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    contents = {
        "junk": "{",
        "list": "[]",
        "empty": '{"rows": []}',
        "lacks": '{"rows": [{"miou": 1, "dataset": "voc"}]}',
        "nan": json.dumps({"rows": [row(miou=float("nan"))]}),
        "bench": '{"rows": [{"case": "x", "miou": 1.0}]}',
        "paper": json.dumps(PAPER),
        "step": '{"step": 1}',
        "good": json.dumps({"rows": [row()]}),
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.json").write_text(text)
    code, _, err = script(report, *arguments)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    "content,said",
    [
        ("[" * 100_000, "cannot be read as JSON"),
        (json.dumps({"rows": [row(miou=10**300)]}), "a row has 'miou' as 1000"),
        (json.dumps({"rows": [row(labeled=0)]}), "a row has 'labeled' as 0"),
        (json.dumps({"rows": [row(losses="sup")]}), "a row has 'losses' as 'sup'"),
        (json.dumps({"rows": [row(method=["sup"])]}), r"a row has 'method' as \['sup'\]"),
        (json.dumps({"rows": [row(lr={"a": 1})]}), "a row has 'lr' as {'a': 1}"),
        (json.dumps({"rows": [row(backbone=None)]}), "a row has 'backbone' as null"),
    ],
    ids=["deep", "huge", "zero", "text", "list", "dict", "null"],
)
def test_a_row_that_no_evaluation_writes_is_one_line(script, tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    code, _, err = script(report, tmp_path / "a.json", "--out", tmp_path / "out")
    assert code == 2 and re.search(f"a.json: {said}", err) and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"step": "1"}', '{"step": 1, "loss": {}}', '{"step": 1, "loss": true}', "[1]"]
)
def test_a_log_that_no_run_writes_is_one_line(script, tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{line}\n{{"step": 2}}\n')
    code, _, err = script(report, "--curves", tmp_path / "log.jsonl", "--out", tmp_path / "a.png")
    assert code == 2 and "log.jsonl: cannot be read as a log" in err and len(err.splitlines()) == 1, err


def test_names_are_printed_and_are_no_formulas(script, tmp_path):
    rows = [
        row(miou=40.0 + seed, backbone="$\\frac{$|\x1b[2J", partition=f"1/{2 + seed}", labeled=9 + seed) for seed in range(3)
    ]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    assert script(report, tmp_path / "a.json", "--out", tmp_path / "out")[0] == 0
    assert list((tmp_path / "out").glob("fig3-*.png"))
    assert all("\x1b" not in path.read_text() for path in (tmp_path / "out").glob("*.md"))
