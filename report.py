"""Result files -> the paper's tables and figures with ours beside the paper's, and loss curves of runs.

    python report.py results/*.json --out results/tables                      (make tables)
    python report.py --curves runs/camvid/1-8/*/log.jsonl --out curves.png

Reads what `evaluate.py --json` wrote and the paper's figures in results/paper.json, nothing else. A table is written as
Markdown and as CSV, which has one line a cell, all settings, and every digit. Runs are averaged over seeds where all other
settings agree; what differs in any of them stands in a line of its own, with its settings. Students of teachers that saw all
labels have tables of their own.
"""

import collections
import csv
import functools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Callable
from typing import NamedTuple

import matplotlib

import models
from common import ArgumentParser, UserError, run

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

PAPER_FILE = pathlib.Path(__file__).parent / "results" / "paper.json"
MISSING = "–"
METHODS = {"sup": "Sup", "mt": "MT", "cps": "CPS", "kd": "KD", "cwd": "CWD", "mgd": "MGD"}  # in the paper's order
ROLES = {"teacher_deep": " (T_D)", "teacher_wide": " (T_W)", "student": ""}
BACKBONES = {"resnet101": "ResNet-101", "wide_resnet34": "Wide ResNet-34", "resnet50": "ResNet-50", "resnet34": "ResNet-34",
             "resnet18": "ResNet-18", "mobilenetv2": "MobileNetV2"}  # fmt: skip
TEACHERS = ("T_D", "T_W")
LOSSES = ("sup", "mt", "cps", "kd", "cwd", "pixel", "pixel:labeled", "pixel:unlabeled",
          "image:T_D", "image:T_W", "region:T_D", "region:T_W")  # fmt: skip
FULL = ("sup", "pixel", "image:T_D", "region:T_W")
REQUIRED = ("dataset", "partition", "partition_hash", "labeled", "method", "role", "backbone", "head_width", "weights", "crop",
            "seed", "steps", "teachers", "teacher_labels", "losses", "regions", "gmacs_backbone", "gmacs_model")  # fmt: skip
# What may not differ between runs that are averaged.
IDENTITY = ("dataset", "partition", "partition_hash", "labeled", "method", "role", "backbone", "head_width", "separable_head",
            "weights", "crop", "steps", "evaluated", "teachers", "teacher_labels", "losses", "regions")  # fmt: skip
MEASURED = ("gmacs_backbone", "gmacs_model", "params_m", "latency_ms")
# Okabe and Ito's palette, which most colour-blind readers can tell apart.
COLOURS = {"sup": "#000000", "mt": "#E69F00", "cps": "#0072B2", "kd": "#009E73", "cwd": "#CC79A7", "mgd": "#D55E00"}
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")


# ---- result files ----


def read_json(path: pathlib.Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give result files of evaluate.py --json") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON; give result files of evaluate.py --json") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a result file; give those of evaluate.py --json")
    return content


def read_rows(paths: list[pathlib.Path]) -> list[dict]:
    """The rows with an mIoU, those of older files first. Raises UserError, also where there is none."""
    found, without = [], []
    for path in paths:
        content = read_json(path)
        if content.get("what") == "paper":
            continue
        rows = content.get("rows")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: holds no rows; write it again with evaluate.py --json")
        usable = [normal(row, path) for row in rows if "miou" in row and "case" not in row]
        if usable:
            found.append((str(content.get("created", "")), usable))
        else:
            without.append(path.name)
    if without:
        print(f"without mIoU, left out: {', '.join(without)}")
    if not found:
        raise UserError("no result file has rows with an mIoU; make some with evaluate.py --json (or make compare)")
    return [row for _, rows in sorted(found, key=lambda pair: pair[0]) for row in rows]  # stable


def normal(row: dict, path: pathlib.Path) -> dict:
    """A row in today's vocabulary, hashable throughout, with the name of its file."""
    absent = [key for key in REQUIRED if key not in row]
    if absent:
        raise UserError(f"{path}: a row lacks '{absent[0]}'; write the file again with evaluate.py --json")
    if not isinstance(row["miou"], (int, float)) or not math.isfinite(row["miou"]):
        raise UserError(f"{path}: a row's mIoU is {row['miou']}; evaluate that checkpoint again")
    losses = normal_losses(row["losses"] or [])
    crop = row["crop"] if isinstance(row["crop"], list) else [row["crop"]]
    return {
        **row, "separable_head": bool(row.get("separable_head")), "crop": "×".join(map(str, crop)), "losses": losses,
        "teachers": normal_teachers(row["teachers"] or []), "evaluated": evaluation(row), "file": path.name,
        "regions": row["regions"] if any(loss.startswith("region") for loss in losses) else None,
    }  # fmt: skip


def normal_losses(losses: list[str]) -> tuple[str, ...]:
    """In one order, and `pixel` for its two halves."""
    losses = set(losses)
    if {"pixel:labeled", "pixel:unlabeled"} <= losses:
        losses = losses - {"pixel:labeled", "pixel:unlabeled"} | {"pixel"}
    return tuple(sorted(losses, key=lambda loss: (LOSSES.index(loss) if loss in LOSSES else len(LOSSES), loss)))


def normal_teachers(teachers: list[str]) -> tuple[str, ...]:
    """The teachers' roles. Older files name the backbones of the deep and of the wide teacher, in this order."""
    if set(teachers) <= set(TEACHERS):
        return tuple(teachers)
    return TEACHERS if len(set(teachers)) == 2 else ("T_D",) * len(teachers)


def evaluation(row: dict) -> str:
    """How the network saw the images. Older files do not say, so theirs is not taken for any other."""
    window = row.get("window", "not said")
    if window != "not said":
        window = f"in windows of {'×'.join(map(str, window))}" if window else "on whole images"
    words = [window]
    if list(row.get("scales") or [1]) != [1]:
        words.append("scales " + " ".join(f"{scale:g}" for scale in row["scales"]))
    return ", ".join([*words, "mirrored too"] if row.get("flip") else words)


def group_rows(rows: list[dict]) -> list[dict]:
    """Mean and sample deviation over the seeds of what was trained alike. Of one seed's rows the last counts."""
    seeds, replaced = collections.defaultdict(dict), collections.Counter()
    for row in rows:
        runs = seeds[tuple(row[key] for key in IDENTITY)]
        if row["seed"] in runs and (runs[row["seed"]]["miou"] != row["miou"] or runs[row["seed"]]["file"] != row["file"]):
            replaced[runs[row["seed"]]["file"], row["file"]] += 1
        runs[row["seed"]] = row
    for (old, new), count in replaced.items():
        which = f"the later ones of {new}" if old == new else f"those of {new}, which is newer,"
        print(f"{old}: {count} row(s) agree with others in all settings and the seed; {which} count")
    groups = []
    for runs in seeds.values():
        values = [row["miou"] for row in runs.values()]
        group = {key: next(iter(runs.values()))[key] for key in IDENTITY}
        for key in MEASURED:
            measured = [row[key] for row in runs.values() if row.get(key) is not None]
            group[key] = statistics.fmean(measured) if measured else None
        group.update(
            miou=statistics.fmean(values), deviation=statistics.stdev(values) if len(values) > 1 else None, n=len(values),
            seeds=sorted(runs), files={row["file"] for row in runs.values()},
        )  # fmt: skip
        groups.append(group)
    return groups


# ---- the paper ----


@functools.cache
def paper() -> dict:
    return read_json(PAPER_FILE)


def title_of(dataset: str) -> str:
    return paper()["datasets"].get(dataset, {}).get("title", dataset)


def paper_rows(dataset: str) -> dict[tuple, dict[tuple, float]]:
    """Tables 1 to 3: (method, role, backbone) -> (data set, partition) -> mIoU; empty where the paper has no such data set."""
    roles = {"resnet101": "teacher_deep", "wide_resnet34": "teacher_wide"}
    places = [(dataset, partition) for partition in paper()["partitions"]]
    return {(method, roles.get(backbone, "student"), backbone): dict(zip(places, values, strict=True))
            for method, backbone, values in paper()["datasets"].get(dataset, {}).get("rows", [])}  # fmt: skip


def paper_labels(dataset: str) -> dict[str, int]:
    """The paper's partitions and their numbers of labeled images."""
    known = paper()["datasets"].get(dataset)
    return dict(zip(paper()["partitions"], known["labeled"], strict=True)) if known else {}


def paper_partition(dataset: str, partition: str, labeled: int) -> str | None:
    """The paper's name of a partition: by name, or by the number of labels where a list has a name of its own."""
    labels = paper_labels(dataset)
    return partition if partition in labels else {n: part for part, n in labels.items()}.get(labeled)


def paper_ablation(part: str, dataset: str) -> dict[tuple, dict[tuple, float]]:
    """Tables 4 to 6: (variant, student) -> (data set, partition) -> mIoU; VOC's where the paper has none for this data set."""
    known, form = paper()["ablations"], {"4": tuple, "6": int}.get(part, normal_losses)
    rows = known["rows"][part]
    source = dataset if dataset in rows[0][1] else "voc"
    return {(form(variant), known["student"]): {(source, known["partition"]): miou[source]} for variant, miou in rows}


# ---- tables ----


class Spec(NamedTuple):
    """What a table shows. Its lines differ in `fields`, whose values are a line's key, and in the SETTINGS."""

    heading: str
    fields: tuple[str, ...]
    select: Callable[[dict], bool]
    head: tuple[str, ...]
    show: Callable[[tuple], list[str]]  # a key's texts, one for each of `head`
    order: Callable[[tuple], tuple]
    more: dict[str, Callable[[dict], str]] = {}  # noqa: RUF012  further columns, which tell no lines apart

    def key(self, group: dict) -> tuple:
        return tuple(group[field] for field in self.fields)


class Table(NamedTuple):
    name: str
    title: str
    notes: list[str]
    lines: list[list[str]]  # the first one is the header
    records: list[dict]


def method_order(key: tuple) -> tuple:
    """Teachers, then students from large to small, each with the methods in the paper's order."""
    method, role, backbone = key[:3]
    return place(role, ROLES), place(backbone, BACKBONES), backbone, place(method, METHODS), method


def place(name: str, names) -> int:
    return list(names).index(name) if name in names else len(names)


def number(value: float | None, form: str = ".1f") -> str:
    return MISSING if value is None else format(value, form)


def says(losses: tuple[str, ...]) -> str:
    return " + ".join("Sup" if loss == "sup" else loss.replace(":", " ") for loss in losses)


def is_full(group: dict) -> bool:
    """MGD as in Tables 1 to 3: two teachers, all losses, 7×7 regions."""
    return (group["teachers"], group["losses"], group["regions"]) == (TEACHERS, FULL, 7)


def half_pixel(losses: tuple[str, ...]) -> bool:
    return "pixel:labeled" in losses or "pixel:unlabeled" in losses


def one_of_each(group: dict) -> bool:
    """All three levels, each of image and region once; with T_D and T_W, which is which is Table 5a's question."""
    kinds = sorted(loss.split(":")[0] for loss in group["losses"])
    return kinds == ["image", "pixel", "region", "sup"] and (group["teachers"] != TEACHERS or group["losses"] == FULL)


def shows_levels(group: dict) -> bool:
    two = group["method"] == "mgd" and group["teachers"] == TEACHERS and group["regions"] in (7, None)
    return (two and not half_pixel(group["losses"])) or group["method"] == "sup"


def shows_cooperation(group: dict) -> bool:
    return group["method"] == "mgd" and (is_full(group) or (group["teachers"] == TEACHERS and half_pixel(group["losses"])))


def with_student(show: Callable) -> Callable:
    return lambda key: [show(key[0]), BACKBONES.get(key[1], key[1])]


def halves(losses: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(half for loss in losses for half in (("pixel:labeled", "pixel:unlabeled") if loss == "pixel" else (loss,)))


def loss_order(key: tuple) -> tuple:
    return len(key[0]), [place(loss, LOSSES) for loss in key[0]], place(key[1], BACKBONES)


METHOD_TABLE = Spec(
    "", ("method", "role", "backbone"), lambda g: g["method"] != "mgd" or is_full(g), ("method", "network"),
    lambda key: [METHODS.get(key[0], key[0]), BACKBONES.get(key[2], key[2]) + ROLES.get(key[1], "")], method_order,
    {"GMACs": lambda g: f"{number(g['gmacs_backbone'])} / {number(g['gmacs_model'])}"},
)  # fmt: skip
ABLATIONS = {
    "4": Spec("which teachers", ("teachers", "backbone"),
              lambda g: g["method"] == "mgd" and one_of_each(g) and g["regions"] == 7,
              ("teachers", "student"), with_student(" + ".join),
              lambda key: (len(key[0]), len(set(key[0])), key[0], place(key[1], BACKBONES))),
    "5a": Spec("which levels", ("losses", "backbone"), shows_levels, ("losses", "student"), with_student(says), loss_order),
    "5b": Spec("distilling labeled and unlabeled images", ("losses", "backbone"), shows_cooperation,
               ("losses", "student"), with_student(lambda losses: says(halves(losses))),
               lambda key: loss_order((halves(key[0]), *key[1:]))),
    "6": Spec("how many regions", ("regions", "backbone"),
              lambda g: g["method"] == "mgd" and (g["teachers"], g["losses"]) == (TEACHERS, FULL),
              ("regions", "student"), with_student(lambda side: f"{side}×{side}"),
              lambda key: (key[0], place(key[1], BACKBONES))),
}  # fmt: skip
HEAD_TABLE = Spec(
    "Students by head", ("method", "role", "backbone", "head_width", "separable_head"), METHOD_TABLE.select,
    ("method", "student", "head width", "separable"),
    lambda key: [METHODS.get(key[0], key[0]), BACKBONES.get(key[2], key[2]), str(key[3]), "yes" if key[4] else "no"],
    lambda key: (*method_order(key), key[4], -key[3]),
    {"params, M": lambda g: number(g["params_m"], ".2f"), "GMACs": lambda g: number(g["gmacs_model"]),
     "latency, ms": lambda g: number(g["latency_ms"])},
)  # fmt: skip
SETTINGS = {
    "head": lambda g: f"{g['head_width']}{' separable' if g['separable_head'] else ''}",
    "crop": lambda g: g["crop"],
    "weights": lambda g: str(g["weights"]),
    "steps": lambda g: f"{g['steps']:,}",
    "evaluated": lambda g: g["evaluated"],
    "taught by": lambda g: " + ".join(g["teachers"]) if g["method"] in ("kd", "cwd") else None,
}


class Column(NamedTuple):
    head: str
    labeled: int
    partition: str
    hash: str | None = None
    paper_of: str | None = None  # the data set, where the figures are the paper's


def columns_of(groups: list[dict], beside: dict, paired: bool) -> list[Column]:
    """The partitions found, from few labels to many, and the paper's: each beside ours where `paired`, or at the end."""
    dataset = groups[0]["dataset"]
    ours = {(g["labeled"], g["partition"], g["partition_hash"]) for g in groups}
    if not paired:
        theirs = dict.fromkeys(where for values in beside.values() for where in values)
        end = [Column(f"paper: {title_of(on)}, {part}", paper_labels(on)[part], part, None, on) for on, part in theirs]
    else:
        matched = {paper_partition(dataset, part, labeled) for labeled, part, _ in ours}
        ours |= {(n, part, None) for part, n in paper_labels(dataset).items() if part not in matched}
        end = []
    columns, names = [], collections.Counter(part for _, part, _ in ours)
    for labeled, part, digest in sorted(ours, key=lambda key: (*key[:2], key[2] or "")):
        head = f"{part} ({digest})" if names[part] > 1 else part
        columns.append(Column(head + " ours" * paired, labeled, part, digest))
        match = paper_partition(dataset, part, labeled) if paired else None
        if match:
            columns.append(Column(f"{head} paper", labeled, match, None, dataset))
    return columns + end


def build(name: str, title: str, spec: Spec, groups: list[dict], beside: dict, paired: bool = False) -> Table:
    """Lines of `spec`, one for each key and settings, with the mIoU by partition.

    `beside` has the paper's figures: key -> (data set, partition) -> mIoU.
    """
    columns = columns_of(groups, beside, paired)
    settings = {head: text for head, text in SETTINGS.items() if head != "head" or "head_width" not in spec.fields}
    seen = {head: {text(g) for g in groups} - {None} for head, text in settings.items()}
    varying = [head for head in settings if len(seen[head]) > 1 or head == "steps"]
    lines = collections.defaultdict(dict)  # (key, settings) -> (partition, hash) -> group
    for g in groups:
        settled = g["steps"], g["separable_head"], -g["head_width"], *(settings[head](g) or "" for head in varying)
        lines[spec.key(g), settled][g["partition"], g["partition_hash"]] = g
    lines.update({(key, ()): {} for key in beside.keys() - {key for key, _ in lines}})

    table, records = [[*spec.head, *spec.more, *varying, *(column.head for column in columns)]], {}
    for key, settled in sorted(lines, key=lambda line: (*spec.order(line[0]), line[1])):
        cells = lines[key, settled]
        bare = {**dict.fromkeys(MEASURED), "gmacs_backbone": models.PAPER.get(key[-1], (None, None))[1]}
        of = next(iter(cells.values()), bare)
        text = [*spec.show(key), *(show(of) for show in spec.more.values()), *(settled[3:] or [MISSING] * len(varying))]
        for column in columns:
            if column.paper_of:
                value = beside.get(key, {}).get((column.paper_of, column.partition))
                text.append(number(value, ".2f"))
                known = {**dict(zip(spec.fields, key, strict=True)), "dataset": column.paper_of, "miou": value,
                         "partition": column.partition, "labeled": paper_labels(column.paper_of)[column.partition]}  # fmt: skip
                if value is not None:  # once, also where ours has several schedules
                    records[key, column] = record(name, "paper", known)
            else:
                group = cells.get((column.partition, column.hash))
                text.append(mean_text(group))
                if group:
                    records[key, settled, column] = record(name, "ours", group)
        table.append(text)
    return Table(name, title, notes_of(groups, columns, seen, varying, spec), table, list(records.values()))


def mean_text(group: dict | None) -> str:
    if group is None:
        return MISSING
    return f"{group['miou']:.2f}" + (f" ± {group['deviation']:.2f} ({group['n']})" if group["n"] > 1 else "")


def notes_of(groups: list[dict], columns: list[Column], seen: dict, varying: list[str], spec: Spec) -> list[str]:
    labels = [f"{c.partition}: {c.labeled:,}" + (f" (partition {c.hash})" if c.hash else "") for c in columns if not c.paper_of]
    notes = [f"mIoU in percent on val. Labeled images: {', '.join(labels)}."]
    same = [f"{head} {next(iter(seen[head]))}" for head in ("head", "crop", "weights", "evaluated")
            if head in seen and head not in varying and seen[head] != {"not said"}]  # fmt: skip
    if same:
        notes.append(f"All runs: {', '.join(same)}.")
    if any(group["n"] > 1 for group in groups):
        notes.append("Mean ± sample deviation (number of seeds); one seed where none is given.")
    else:
        notes.append("One seed each.")
    if "GMACs" in spec.more:
        notes.append("GMACs at 512×512, of " + ("the backbone / the model." if spec is METHOD_TABLE else "the model."))
    return [*notes, f"From {', '.join(sorted(set().union(*(group['files'] for group in groups))))}."]


def record(name: str, source: str, values: dict) -> dict:
    """A line of the CSV: all settings, and every digit."""
    line = {"table": name, "source": source} | {key: values.get(key) for key in
            (*IDENTITY, *MEASURED, "n", "seeds", "miou", "deviation")}  # fmt: skip
    return {key: " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value for key, value in line.items()}


def make_tables(groups: list[dict]) -> list[Table]:
    tables = []
    for dataset in dict.fromkeys(g["dataset"] for g in groups):
        known = paper()["datasets"].get(dataset)
        for labels in ("partition", "all"):
            chosen = with_labels([g for g in groups if g["dataset"] == dataset], labels)
            remark, suffix = (", teachers trained on all labels", "-all") if labels == "all" else ("", "")
            name = f"table{known['table']}" if known else f"table-{slug(dataset)}"
            title = (f"Table {known['table']}: " if known else "") + title_of(dataset)
            # The paper's teachers saw the labels of the partition alone.
            beside = paper_rows(dataset) if labels == "partition" else {}
            wanted = [(name, title, METHOD_TABLE, list(filter(METHOD_TABLE.select, chosen)), beside, bool(beside))]
            for part, spec in ABLATIONS.items():
                shown, title = with_baselines(list(filter(spec.select, chosen))), f"Table {part}: {spec.heading}"
                wanted.append((f"table{part}-{slug(dataset)}", f"{title}, on {title_of(dataset)}", spec, shown,
                               paper_ablation(part, dataset), False))  # fmt: skip
            title = f"{HEAD_TABLE.heading}, on {title_of(dataset)}"
            wanted.append((f"heads-{slug(dataset)}", title, HEAD_TABLE, head_study(chosen), {}, False))
            tables += [build(name + suffix, title + remark, *rest) for name, title, *rest in wanted if rest[1]]
    return tables


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^\w.]+", "-", text.replace("×", "x"))


def with_labels(groups: list[dict], labels: str) -> list[dict]:
    """The students whose teachers saw these labels, with what they are compared with. Nothing where there is none."""
    if labels == "partition":
        return [g for g in groups if g["teacher_labels"] != "all"]
    students = [g for g in groups if g["teacher_labels"] == "all"]
    same = {(g["partition_hash"], g["backbone"], g["crop"], g["weights"]) for g in students}
    return students + [
        g for g in groups
        if students and ((g["role"] != "student" and g["partition"] == "1") or (
            g["method"] == "sup" and (g["partition_hash"], g["backbone"], g["crop"], g["weights"]) in same))
    ]  # fmt: skip


def with_baselines(groups: list[dict]) -> list[dict]:
    """An ablation's groups, with those of Sup and the full method that are like some of them; nothing without an ablation."""
    keys = ("partition_hash", "backbone", "head_width", "separable_head", "crop", "weights")
    base = [g for g in groups if g["method"] == "sup" or is_full(g)]
    varied = [g for g in groups if g not in base]
    same = {tuple(g[key] for key in keys) for g in varied}
    return varied + [g for g in base if g["role"] == "student" and tuple(g[key] for key in keys) in same]


def head_study(groups: list[dict]) -> list[dict]:
    """Students that were trained alike with several heads."""
    alike = collections.defaultdict(list)
    for g in groups:
        if g["role"] == "student" and HEAD_TABLE.select(g):
            alike[tuple(g[key] for key in IDENTITY if key not in ("head_width", "separable_head"))].append(g)
    return [g for several in alike.values() if len(several) > 1 for g in several]


def write_table(table: Table, out: pathlib.Path):
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table.lines]
    rows.insert(1, "|" + "---|" * len(table.lines[0]))
    text = "\n".join([f"**{table.title}**", "", *rows, "", " ".join(table.notes)])
    (out / f"{table.name}.md").write_text(text + "\n", encoding="utf-8")
    with open(out / f"{table.name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.records[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.records)


# ---- pictures ----


def comparable(groups: list[dict]) -> dict[str, tuple[str, list[dict]]]:
    """What a picture's file name ends in -> its title, and the groups of one data set that may be compared."""
    sets = collections.defaultdict(list)
    for g in filter(METHOD_TABLE.select, with_labels(groups, "partition")):
        sets[g["dataset"], g["crop"], str(g["weights"]), g["evaluated"]].append(g)
    pictures = {}
    for key, several in sets.items():
        dataset, crop, weights, evaluated = key
        # so much of the settings goes into the name as tells the data set's sets apart
        others = [other for other in sets if other[0] == dataset and other != key]
        n = next(n for n in range(1, 5) if all(other[:n] != key[:n] for other in others))
        title = f"{title_of(dataset)}, crop {crop}, "
        title += {"none": "from scratch", "imagenet": "ImageNet weights"}.get(weights, f"weights {weights}")
        pictures[slug("-".join(key[:n]))] = title + (f", evaluated {evaluated}" if n == 4 else ""), several
    return pictures


def main_lines(groups: list[dict]) -> list[dict]:
    """One line a method: with each network's commonest head, and each partition's commonest list."""
    return commonest(commonest(groups, "backbone", ("head_width", "separable_head")), "partition", ("partition_hash",))


def commonest(groups: list[dict], within: str, keys: tuple[str, ...]) -> list[dict]:
    """For each value of `within`, the groups whose `keys` have their commonest values."""
    counts = collections.defaultdict(collections.Counter)
    for g in groups:
        counts[g[within]][tuple(g[key] for key in keys)] += 1
    return [g for g in groups if counts[g[within]].most_common(1)[0][0] == tuple(g[key] for key in keys)]


def styles(groups: list[dict]) -> dict[tuple, tuple[str, str, str]]:
    """(method, steps) -> legend, colour, marker: a method's colour is always the same, and its schedules differ in marker."""
    schedules = collections.defaultdict(set)  # (method, role, backbone) -> steps
    for g in groups:
        schedules[METHOD_TABLE.key(g)].add(g["steps"])
    drawn = {}
    for (method, *_), steps in sorted(schedules.items(), key=lambda item: (place(item[0][0], METHODS), len(item[1]))):
        for i, n in enumerate(sorted(steps)):
            text = METHODS.get(method, method) + (f", {n:,} steps" if len(steps) > 1 else "")
            drawn[method, n] = text, COLOURS.get(method, "#8C8C8C"), "os^Dv"[min(i, 4)]
    return drawn


def new_axes(axis, xlabel: str):
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.92")
    axis.set_axisbelow(True)
    axis.set(xlabel=xlabel, ylabel="mIoU, %")


def log_axis(axis, ticks: dict[float, str]):
    axis.set_xscale("log")
    axis.set_xticks(list(ticks), ticks.values())
    axis.xaxis.set_minor_locator(NullLocator())


def cost_ticks(costs) -> dict[float, str]:
    """Round numbers around the costs, closer to each other where few fit."""
    for ticks in (
        (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300),
        (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200),
    ):
        inside = [n for n in ticks if min(costs) / 1.4 < n < max(costs) * 1.4]
        if len(inside) > 2:
            break
    return {n: f"{n:g}" for n in inside}


def plot(axis, x: list[float], groups: list[dict], **look):
    """Means over the seeds, with bars of one deviation where there are several."""
    bars = [g["deviation"] or 0 for g in groups]
    look = {"linestyle": "none", "markersize": 7, "capsize": 2.5, "elinewidth": 1, "zorder": 3} | look
    axis.errorbar(x, [g["miou"] for g in groups], yerr=bars if any(bars) else None, **look)


def entry(**look) -> Line2D:
    return Line2D([], [], **{"linestyle": "none", "markersize": 7, **look})


def save(figure, path: pathlib.Path, entries: dict[str, Line2D], columns: int = 6):
    """Write the picture, with `entries` as its legend."""
    columns = -(-len(entries) // -(-len(entries) // columns))  # rows of even length
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_cost(title: str, groups: list[dict], path: pathlib.Path) -> bool:
    """Fig. 1: mIoU against GMACs of the backbone and of the whole model, at the partition with most of the runs.

    What was trained with one network stands side by side around its GMACs; open points are the paper's.
    """
    groups = main_lines(groups)
    counts = collections.Counter((g["partition"], g["labeled"]) for g in groups)
    part, labeled = min(counts, key=lambda key: (-counts[key], key[1]))
    groups = [g for g in groups if g["partition"] == part]
    if len(groups) < 2:
        return False
    column = paper_partition(groups[0]["dataset"], part, labeled)
    rows = paper_rows(groups[0]["dataset"]) if column else {}
    beside = {key: values[groups[0]["dataset"], column] for key, values in rows.items()}
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True, layout="constrained")
    figure.suptitle(f"{title}: {part} labeled ({labeled:,} images)", fontsize=11)
    entries = {}
    for axis, field, name in zip(axes, ("gmacs_backbone", "gmacs_model"), ("backbone", "whole model"), strict=True):
        others = beside if field == "gmacs_backbone" else {}  # the paper's GMACs are those of the backbone
        at = {key[2]: models.PAPER[key[2]][1] for key in others} | {g["backbone"]: g[field] for g in groups}
        new_axes(axis, f"GMACs of the {name} at 512×512")
        log_axis(axis, cost_ticks(at.values()))
        low, high = min(at.values()) / 1.6, max(at.values()) * 1.5
        axis.set_xlim(low, high)
        place_in = slots(groups, others, at, 0.021 * math.log(high / low))
        for backbone, x in at.items():
            axis.axvline(x, color="0.9", linewidth=1, zorder=1)
            axis.text(x, 1.02, BACKBONES.get(backbone, backbone), transform=axis.get_xaxis_transform(), rotation=35, fontsize=9)
        for (method, steps), (text, colour, marker) in styles(groups).items():
            for g in groups:
                if (g["method"], g["steps"]) == (method, steps):
                    x = place_in[(*METHOD_TABLE.key(g), steps)]
                    plot(axis, [x], [g], color=colour, marker=marker)
                    role = {"teacher_deep": "$T_D$", "teacher_wide": "$T_W$"}.get(g["role"], "")
                    axis.annotate(role, (x, g["miou"]), (-7, -3), ha="right", textcoords="offset points", fontsize=10)
                    entries[text] = entry(color=colour, marker=marker)
        for key, miou in others.items():
            x = next(x for slot, x in place_in.items() if slot[:3] == key)
            axis.plot(x, miou, "o", color=COLOURS[key[0]], markerfacecolor="none", markersize=9, zorder=2)
            entries.setdefault(METHODS[key[0]], entry(color=COLOURS[key[0]], marker="o"))
    axes[1].set_ylabel("")
    axes[1].tick_params(labelleft=True)
    if beside:
        entries["open: the paper's"] = entries.pop("open: the paper's", entry(color="0.4", marker="o", markerfacecolor="none"))
    save(figure, path, entries, 7)
    return True


def slots(groups: list[dict], others: dict, at: dict[str, float], width: float) -> dict[tuple, float]:
    """(method, role, backbone, steps) -> x, side by side around the network's GMACs; the paper's share ours of the method."""
    ours = {(*METHOD_TABLE.key(g), g["steps"]) for g in groups}
    taken = ours | {(*key, 0) for key in others if key not in {slot[:3] for slot in ours}}
    places = {}
    for backbone, x in at.items():
        # teachers first: to their left is room for their name
        row = sorted((slot for slot in taken if slot[2] == backbone),
                     key=lambda slot: (place(slot[1], ROLES), place(slot[0], METHODS), slot))  # fmt: skip
        places |= {slot: x * math.exp(width * (i - (len(row) - 1) / 2)) for i, slot in enumerate(row)}
    return places


def draw_partitions(title: str, groups: list[dict], path: pathlib.Path) -> bool:
    """Fig. 3: mIoU against the partition, a panel a student and a line a method; dashed lines are the paper's."""
    dataset, panels = groups[0]["dataset"], collections.defaultdict(list)
    for g in sorted(main_lines(groups), key=lambda g: (place(g["backbone"], BACKBONES), g["labeled"])):
        if g["role"] == "student":
            panels[g["backbone"]].append(g)
    panels = {backbone: several for backbone, several in panels.items() if len({g["labeled"] for g in several}) > 1}
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.6), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=11)
    entries = {}
    for axis, (backbone, several) in zip(axes.flat, panels.items(), strict=True):
        new_axes(axis, "labeled images")
        axis.set_title(BACKBONES.get(backbone, backbone), fontsize=10)
        names = {g["labeled"]: g["partition"] for g in several}
        for (method, steps), (text, colour, marker) in styles(several).items():
            line = [g for g in several if (g["method"], g["steps"]) == (method, steps)]
            if line:
                plot(axis, [g["labeled"] for g in line], line, color=colour, marker=marker, linestyle="-")
                entries[text] = entry(color=colour, marker=marker, linestyle="-")
        for (method, _, network), values in paper_rows(dataset).items():
            if network == backbone:
                labels = paper_labels(dataset)
                axis.plot(labels.values(), values.values(), "--", color=COLOURS[method], linewidth=1.2, alpha=0.8, zorder=2)
                names = {n: part for part, n in labels.items()} | names
        log_axis(axis, {n: f"{name}\n{n:,}" for n, name in names.items()})
    if paper_rows(dataset):
        entries["dashed: the paper's"] = entry(color="0.4", linestyle="--")
    save(figure, path, entries, 7)
    return True


HEAD_MARKERS = {"resnet18": "o", "mobilenetv2": "s", "resnet34": "^", "resnet50": "v", "resnet101": "D", "wide_resnet34": "P"}


def draw_heads(title: str, groups: list[dict], path: pathlib.Path) -> bool:
    """mIoU against the whole model's GMACs, a panel a partition, a line a student and kind of head."""
    panels = collections.defaultdict(list)
    for g in sorted(head_study(groups), key=lambda g: g["gmacs_model"]):
        panels[g["labeled"], g["partition"], g["partition_hash"]].append(g)
    if not panels:
        return False
    figure, axes = plt.subplots(len(panels), figsize=(10, 4.4 * len(panels) + 0.8), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=11)
    entries = {}
    for axis, ((labeled, part, _), several) in zip(axes.flat, sorted(panels.items()), strict=True):
        new_axes(axis, "GMACs of the whole model at 512×512; beside the points: the head's width")
        axis.set_title(f"{part} labeled ({labeled:,} images)", fontsize=10)
        log_axis(axis, cost_ticks([g["gmacs_model"] for g in several]))
        style, lines = styles(several), collections.defaultdict(list)
        for g in several:
            lines[METHOD_TABLE.key(g), g["steps"], g["separable_head"]].append(g)
        for (key, steps, separable), line in sorted(lines.items(), key=lambda item: (method_order(item[0][0]), item[0])):
            text, colour, shape = style[key[0], steps]
            look = {"color": colour, "marker": HEAD_MARKERS.get(key[2], "X"), "linestyle": "--" if separable else "-",
                    "markerfacecolor": "white" if separable else colour, "alpha": 1 if shape == "o" else 0.5}  # fmt: skip
            plot(axis, [g["gmacs_model"] for g in line], line, **look)
            for g in line:  # lines rise to the right: these sides are free
                axis.annotate(g["head_width"], (g["gmacs_model"], g["miou"]), (-7, 4) if separable else (7, -11), fontsize=9,
                              ha="right" if separable else "left", textcoords="offset points", color="0.3")  # fmt: skip
            entries[f"{text} {BACKBONES.get(key[2], key[2])}, {'separable' if separable else 'plain'} head"] = entry(**look)
        axis.margins(x=0.08, y=0.12)
    save(figure, path, entries, 2)
    return True


# ---- loss curves ----


def read_log(path: pathlib.Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > 1 and not lines[-1].endswith("}"):  # of a run that goes on, or was cut off
            lines.pop()
        entries = [json.loads(line) for line in lines]
        if not all(isinstance(e, dict) and isinstance(e.get("step"), int) for e in entries):
            raise ValueError
    except OSError as error:
        raise UserError(f"--curves {path}: cannot be read ({error.strerror}); give the log.jsonl of a run") from None
    except ValueError:
        raise UserError(f"--curves {path}: is no log of a training; give the log.jsonl of a run") from None
    return entries


def draw_curves(paths: list[pathlib.Path], out: pathlib.Path):
    """A panel for each loss term and for the mIoU, with a line a run; faint: as logged, strong: the mean of nine entries."""
    logs = {path: read_log(path) for path in paths}
    for path in [path for path, log in logs.items() if not log]:
        print(f"{path}: empty yet, left out")
        del logs[path]
    parents = [path.resolve().parent.parts for path in logs]
    # a run is called by as much of its folder as tells it apart
    depth = next(n for n in range(1, 99) if len({parts[-n:] for parts in parents}) == len(set(parents)))
    other = ("step", "lr", "images_per_s", "data_wait", "miou")
    terms = dict.fromkeys(key for log in logs.values() for e in log for key in e if key not in other)
    panels = [*terms, *(["miou"] if any("miou" in e for log in logs.values() for e in log) else [])]
    if not panels:
        raise UserError(f"--curves {paths[0]}: holds no step yet; wait for the run's first --log-every steps")
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(10, 3 * height + 0.3 + 0.25 * len(logs) / 3), layout="constrained",
                                squeeze=False)  # fmt: skip
    entries = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for i, (log, parts) in enumerate(zip(logs.values(), parents, strict=True)):
        colour, dash = CURVE_COLOURS[i % len(CURVE_COLOURS)], ("-", "--", ":")[i // len(CURVE_COLOURS) % 3]
        entries["/".join(parts[-depth:])] = Line2D([], [], color=colour, linestyle=dash)
        for axis, term in zip(axes.flat, panels, strict=False):
            x, y = [e["step"] for e in log if term in e], [e[term] for e in log if term in e]
            if term == "miou":
                axis.plot(x, y, color=colour, linestyle=dash, marker="o", markersize=4)
                continue
            axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
            near = [[v for v in y[max(0, k - 4) : k + 5] if math.isfinite(v)] for k in range(len(y))]
            axis.plot(x, [statistics.fmean(v) if v else math.nan for v in near], color=colour, linestyle=dash, linewidth=1.6)
    for axis, term in zip(axes.flat, panels, strict=False):
        new_axes(axis, "step")
        axis.set_title("mIoU on val" if term == "miou" else "total loss" if term == "loss" else f"loss: {term}", fontsize=10)
        axis.set_ylabel("mIoU, %" if term == "miou" else "")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    save(figure, out, entries, 3)
    print(f"curves: {out}")


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("results", nargs="*", type=pathlib.Path, help="result files; those without mIoU are left out")
    parser.add_argument("--curves", nargs="+", type=pathlib.Path, metavar="LOG", help="draw these runs' log.jsonl instead")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the tables (default results/tables), or the picture "
                        "of --curves (default curves.png)")  # fmt: skip
    args = parser.parse_args()
    if bool(args.results) == bool(args.curves):
        raise UserError("give result files, or --curves with logs: python report.py results/*.json")
    if args.out is None:
        args.out = pathlib.Path("curves.png" if args.curves else "results/tables")
    if args.curves and (args.out.suffix.lower() != ".png" or args.out.is_dir()):
        raise UserError(f"--out {args.out}: with --curves, give a file's name that ends in .png")
    try:
        (args.out.parent if args.curves else args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: its folder cannot be made ({error.strerror}); give another") from None
    return args


def main():
    args = parse_args()
    if args.curves:
        draw_curves(args.curves, args.out)
        return
    groups = group_rows(read_rows(args.results))
    for table in make_tables(groups):
        write_table(table, args.out)
        print(f"{args.out / table.name}.md, .csv: {table.title}")
    for kind, draw, needs in (
        ("fig1", draw_cost, "two runs at one partition"),
        ("fig3", draw_partitions, "a student at two partitions"),
        ("heads", draw_heads, "a student with two heads"),
    ):
        without = []
        for name, (title, several) in comparable(groups).items():
            path = args.out / f"{kind}-{name}.png"
            if draw(title, several, path):
                print(f"{path}: {title}")
            else:
                without.append(name)
        if without:
            print(f"{kind}: not drawn for {', '.join(without)}; it needs {needs}")


if __name__ == "__main__":
    run(main)
