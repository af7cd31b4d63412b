"""Draw the paper's tables and figures from result files, with our numbers beside
the paper's, or draw the loss curves of runs.

    python -m paper.report results/*.json --out results/tables
    python -m paper.report --curves runs/mine/1/*/log.jsonl --out curves.png

It reads what `evaluate.py --json` wrote, and the paper's numbers in
results/paper.json. Each table is written as Markdown and as CSV; the CSV has
one line per cell, with all settings and every digit. Runs are averaged only if
they agree in all settings but the seed. Students of teachers that saw all
labels have tables of their own. `make tables` runs the first command.
"""

import collections
import csv
import io
import json
import math
import pathlib
import re
import statistics

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from common import ArgumentParser, UserError, cli, printable
from pictures import save_figure
from readers import read_json, read_text
from recipes import is_kind, shortened, wrong_column
from result_files import (
    GROUP_BY,
    NETWORK,
    OPTIONAL,
    SETTINGS,
    TABLE_MARK,
    refuse_foreign,
    refuse_links_out,
    refuse_outputs,
    setting_values,
    write_text,
)
from run_folder import check_folder

# Its rows have the keys of ours.
PAPER = json.loads((pathlib.Path(__file__).resolve().parent.parent / "results" / "paper.json").read_text(encoding="utf-8"))
TITLES = PAPER["titles"]

HEAD = ("head_width", "separable_head")
GMACS = ("gmacs_backbone", "gmacs_model")
NEEDED = ("dataset", "partition", "labeled", "role", "backbone", "method", "teachers", "losses", "seed", "miou", *GMACS)
FULL = ("sup", "pixel", "image:T_D", "region:T_W")  # the losses of MGD in Tables 1 to 3

# How tables and pictures call them, and in which order.
NAMES = {
    "teacher_deep": "T_D",
    "teacher_wide": "T_W",
    "student": "student",
    "resnet101": "ResNet-101",
    "wide_resnet34": "Wide ResNet-34",
    "resnet50": "ResNet-50",
    "resnet34": "ResNet-34",
    "resnet18": "ResNet-18",
    "mobilenetv2": "MobileNetV2",
    "efficientnet_lite0": "EfficientNet-Lite0",
    "efficientnet_lite1": "EfficientNet-Lite1",
    "efficientnet_lite2": "EfficientNet-Lite2",
    "sup": "Sup",
    "mt": "MT",
    "cps": "CPS",
    "kd": "KD",
    "cwd": "CWD",
    "mgd": "MGD",
    "mgd+": "MGD+",
}
RANK = {name: i for i, name in enumerate(NAMES)}
# Okabe and Ito's palette, which most colour-blind readers can tell apart.
COLOURS = {
    "sup": "#000000",
    "mt": "#E69F00",
    "cps": "#0072B2",
    "kd": "#009E73",
    "cwd": "#CC79A7",
    "mgd": "#D55E00",
    "mgd+": "#56B4E9",
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "0.92",
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "errorbar.capsize": 2.5,
}

# The settings that tell the lines of each table apart. `methods` is the paper's Table 1, 2 or 3, by data set.
TABLES = {
    "methods": ("", NETWORK),
    "table4": ("Table 4: which teachers", ("teachers", "backbone")),
    "table5a": ("Table 5a: which levels", ("losses", "backbone")),
    "table5b": ("Table 5b: distilling labeled and unlabeled images", ("losses", "backbone")),
    "table6": ("Table 6: how many regions", ("regions", "backbone")),
    "heads": ("Students by head", (*NETWORK, *HEAD)),
}


# ---- result files ----


def read_rows(paths: list[pathlib.Path]) -> list[dict]:
    """The rows with an mIoU, those of older files first, with tuples for lists. Raises UserError where there is none."""
    files = []
    for path in paths:
        content = read_json(path, "give result files of evaluate.py --json")
        rows = content.get("rows") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: holds no rows; give result files of evaluate.py --json")
        # without the rows of benchmarks and of the paper
        rows = [row for row in rows if "miou" in row and not {"case", "table"} & row.keys()]
        rows = [{**dict.fromkeys(OPTIONAL), **row, "file": path.name} for row in rows]
        for row in rows:
            if absent := [key for key in (*GROUP_BY, "seed", *GMACS) if key not in row]:
                raise UserError(f"{path}: a row lacks '{absent[0]}'; write the file again with evaluate.py --json")
            empty = next((key for key in NEEDED if row[key] is None), None)
            if wrong := wrong_column(row) or (empty and f"'{empty}' as null"):
                raise UserError(f"{path}: a row has {wrong}; evaluate that checkpoint again")
        files.append((shortened(content.get("created")), rows))
    rows = [row for _, rows in sorted(files, key=lambda file: file[0]) for row in rows]
    if not rows:
        raise UserError("no result file has rows with an mIoU; make some with evaluate.py --json (or make compare)")
    return [tuples({**row, "teachers": kinds_of(row)}) for row in rows]


def kinds_of(row: dict) -> list[str]:
    """The kinds of a row's teachers, as in Table 4: T_D or T_W, by the flag that each was given under. Two teachers of one
    backbone are both of the kind that one of them was trained as."""
    backbones, kinds = row["teacher_backbones"], {"teacher_deep": "T_D", "teacher_wide": "T_W"}
    known = {kinds[role] for role in row.get("teacher_roles") or () if role in kinds}
    alike = len(backbones or ()) == 2 and len(set(backbones)) == 1
    return [*known] * 2 if alike and len(known) == 1 else row["teachers"]


def tuples(row: dict) -> dict:
    """The row with tuples for lists, which can be keys, and texts as they can be printed."""

    def plain(value):
        return printable(value) if isinstance(value, str) else tuple(map(plain, value)) if isinstance(value, list) else value

    return {key: plain(value) for key, value in row.items()}


def average(rows: list[dict]) -> list[dict]:
    """Mean and sample deviation over the seeds of runs with the same settings. If two rows have the same settings and seeds
    (the student's and the teachers'), the newer one counts."""
    alike, replaced = collections.defaultdict(dict), 0
    for row in rows:
        seeds, seed = alike[setting_values(row, GROUP_BY)], (row["seed"], row.get("teacher_seeds"))
        replaced += seed in seeds and seeds[seed]["miou"] != row["miou"]
        seeds[seed] = row
    if replaced:
        print(f"{replaced} row(s) left out: newer ones agree with them in all settings and seeds")
    groups = []
    for seeds in alike.values():
        mious = [row["miou"] for row in seeds.values()]
        groups.append(
            {
                **{key: row[key] for row in seeds.values() for key in (*GROUP_BY, *GMACS)},
                "source": "ours",
                "miou": statistics.fmean(mious),
                "deviation": statistics.stdev(mious) if len(mious) > 1 else None,
                "n": len(mious),
                "seeds": sorted(row["seed"] for row in seeds.values()),
                "files": sorted({row["file"] for row in seeds.values()}),
            }
        )
    return groups


# ---- tables ----


def paper_cells(table: str, dataset: str) -> list[dict]:
    """The paper's numbers for a data set; for an ablation that it did not run there, its numbers for VOC."""
    table = PAPER["tables"].get(dataset) if table == "methods" else table
    cells = [{**tuples(row), "source": "paper"} for row in PAPER["rows"] if row["table"] == table]
    return [c for c in cells if c["dataset"] == dataset] or [c for c in cells if c["dataset"] == "voc"]


def is_shown(g: dict, table: str) -> bool:
    """Whether a table has a place for such a run. Every table shows MGD with all its losses."""
    mgd, losses, two = g["method"] == "mgd", g["losses"], set(g["teachers"]) == {"T_D", "T_W"}
    half = "pixel:labeled" in losses or "pixel:unlabeled" in losses
    if mgd and two and losses == FULL and g["regions"] == 7:
        return True
    if table in ("methods", "heads"):
        return not mgd
    if table == "table4":  # each level once
        return (
            mgd and not two and g["regions"] == 7 and [x.split(":")[0] for x in losses] == ["sup", "pixel", "image", "region"]
        )
    if table == "table6":
        return mgd and two and losses == FULL
    if g["method"] == "sup":
        return table == "table5a" and g["role"] == "student"
    return mgd and two and half == (table == "table5b") and g["regions"] in (7, None)


def select(groups: list[dict], table: str) -> list[dict]:
    """The runs of a table: an ablation's variants and the runs with their settings; for `heads`, students trained alike."""
    groups = [g for g in groups if is_shown(g, table)]
    if table == "heads":
        like = [key for key in GROUP_BY if key not in HEAD]
        counts = collections.Counter(setting_values(g, like) for g in groups)
        return [g for g in groups if g["role"] == "student" and counts[setting_values(g, like)] > 1]
    like = ("partition_hash", "backbone", *HEAD, "crop", "weights")
    variants = {setting_values(g, like) for g in groups if table == "methods" or not is_shown(g, "methods")}
    return [g for g in groups if setting_values(g, like) in variants]


def write_tables(groups: list[dict], dataset: str, name: str, out: pathlib.Path):
    """Write all tables of one data set, and again for teachers that saw all labels, beside the runs without teachers."""
    hashes = {g["partition_hash"] for g in groups if g["teacher_labels"] == "all"}

    def is_beside(g):  # the students of the same labels that had no teachers, and the teachers of all labels
        return g["teacher_labels"] is None and (
            g["partition_hash"] in hashes if g["role"] == "student" else g["partition"] == "1"
        )

    of_all = [g for g in groups if g["teacher_labels"] == "all" or (hashes and is_beside(g))]
    of_partition = [g for g in groups if g["teacher_labels"] != "all"]
    shown = []
    for table, (heading, fields) in TABLES.items():
        file, title = f"{table}-{name}", f"{heading}, on {TITLES.get(dataset, dataset)}"
        if table == "methods":
            file, title = PAPER["tables"].get(dataset, f"table-{name}"), TITLES.get(dataset, dataset)
        ours, theirs = select(of_partition, table), select(of_all, table)
        write_table(out, file, title, fields, ours, paper_cells(table, dataset))
        # the paper's teachers saw the labels of the partition alone
        write_table(out, f"{file}-all", f"{title}, teachers trained on all labels", fields, theirs, [])
        shown += ours + theirs
    hidden = [g for g in groups if g not in shown]
    if hidden:
        runs = (
            f"{' '.join(cell_text(k, g[k]) for k in ('method', 'backbone', 'partition', 'steps'))} ({', '.join(g['files'])})"
            for g in hidden
        )
        print(f"{name}: no table has a place for {len(hidden)} of {len(groups)} run(s): {'; '.join(runs)}")


def write_table(out: pathlib.Path, name: str, title: str, fields: tuple, ours: list[dict], paper: list[dict]):
    """Write NAME.md and NAME.csv: one column per partition, and one line per value of `fields`, the steps, and every setting
    in which lines of the same `fields` differ. Nothing is written without a run of ours."""
    if not ours:
        return
    alike = {setting_values(g, fields) for g in ours}
    settings = [
        key
        for key in SETTINGS
        if key == "steps"
        or len({setting_values(g, (*fields, key)) for g in ours}) > len(alike)
        or (key == "list" and any(g["list"] for g in ours))  # no number of other images stands there as one of val
    ]
    settings += GMACS if "method" in fields else ()
    lists = collections.Counter(part for part, _ in {setting_values(g, ("partition", "partition_hash")) for g in ours})

    lines = collections.defaultdict(dict)  # (fields, settings) -> (labeled, heading) of a column -> text
    for g in ours:
        column = g["partition"] + (f" ({g['partition_hash']})" if lists[g["partition"]] > 1 else "")
        text = f"{g['miou']:.2f}" + (f" ± {g['deviation']:.2f} ({g['n']})" if g["n"] > 1 else "")
        lines[setting_values(g, fields), setting_values(g, settings)][g["labeled"], column] = text
    for cell in paper:
        column = f"{cell['partition']} paper" + ("" if cell["dataset"] == ours[0]["dataset"] else f", {TITLES['voc']}")
        key = setting_values(cell, fields)
        # the paper's number stands in the line of each of our schedules, or in a line of its own
        for line in [line for line in lines if line[0] == key] or [(key, setting_values(cell, settings))]:
            lines[line][cell["labeled"], column] = f"{cell['miou']:.2f}"

    columns, keys = sorted({column for cells in lines.values() for column in cells}), (*fields, *settings)
    rows = [[key.replace("_", " ").replace("gmacs", "GMACs") for key in keys] + [heading for _, heading in columns]]
    rows.append(["---"] * len(rows[0]))
    rows += [
        [*map(cell_text, keys, line[0] + line[1]), *(lines[line].get(column, "–") for column in columns)]
        for line in sorted(lines, key=order)
    ]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    labels = ", ".join(f"{heading} {labeled:,}" for labeled, heading in columns if "paper" not in heading)
    where = "the images of the list, or of val" if "list" in settings else "val"
    note = f"mIoU in percent on {where}, mean ± sample deviation (number of seeds); labeled images: {labels}."
    write_text(out / f"{name}.md", f"{TABLE_MARK}\n\n**{title}**\n\n{text}\n\n{note}\n")

    header = ("source", *GROUP_BY, *GMACS, "n", "seeds", "miou", "deviation", "files")
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(
        [" ".join(map(str, v)) if isinstance(v, (tuple, list)) else v for v in setting_values(cell, header)]
        for cell in ours + paper
    )
    write_text(out / f"{name}.csv", lines.getvalue())
    print(f"{out / name}.md, .csv: {title}")


def order(value) -> tuple:
    """A sort key: names come in the order of NAMES, and tuples last, by their length first."""
    if isinstance(value, tuple):
        return 1, len(value), *map(order, value)
    return (0, RANK.get(value, len(RANK)), value) if isinstance(value, str) else (0, value or 0, "")


def cell_text(key: str, value) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, tuple):
        return ("×" if key in ("crop", "window") else " + ").join(NAMES.get(v, str(v)).replace(":", " ") for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    form = {"steps": "{:,}", "regions": "{0}×{0}", "gmacs_backbone": "{:.1f}", "gmacs_model": "{:.1f}"}.get(key, "{}")
    return form.format(NAMES.get(value, value))


# ---- pictures ----


def usual(groups: list[dict], keys: tuple[str, ...], within: tuple[str, ...] = ()) -> list[dict]:
    """The groups in which `keys` have their most frequent values among the groups that agree in `within`."""
    counts = collections.defaultdict(collections.Counter)
    for g in groups:
        counts[setting_values(g, within)][setting_values(g, keys)] += 1
    return [g for g in groups if setting_values(g, keys) == counts[setting_values(g, within)].most_common(1)[0][0]]


def draw_figures(groups: list[dict], dataset: str, name: str, out: pathlib.Path):
    """Draw Figs. 1 and 3 and the head study for one data set, from runs whose settings may be compared."""
    groups = select([g for g in groups if g["teacher_labels"] != "all"], "methods")
    alike = usual(groups, ("crop", "weights", "image_scale", "window", "scales", "flip", "list"))
    shown = usual(usual(alike, ("partition_hash",), ("partition",)), (*HEAD, "stem"), ("backbone",))
    shown = usual(shown, SETTINGS, (*NETWORK, "steps"))
    if len(shown) < len(groups):
        print(f"{name}: fig1 and fig3 leave out {len(groups) - len(shown)} of {len(groups)} cells, of less frequent settings")
    draw_cost(shown, dataset, out / f"fig1-{name}.png")
    draw_students(shown, dataset, "labeled", out / f"fig3-{name}.png")
    draw_students(usual(select(alike, "heads"), ("partition_hash",)), dataset, "gmacs_model", out / f"heads-{name}.png")


def draw_cost(groups: list[dict], dataset: str, path: pathlib.Path):
    """Fig. 1: mIoU against GMACs of the backbone and of the whole model, at the partition with most of the runs."""
    ours = usual(groups, ("partition", "labeled"))
    if len(ours) < 2:
        return
    paper = [cell for cell in paper_cells("methods", dataset) if cell["labeled"] == ours[0]["labeled"]]
    gmacs = {g["backbone"]: g["gmacs_backbone"] for g in paper + ours}  # ours where there are both
    paper = [{**cell, "gmacs_backbone": gmacs[cell["backbone"]]} for cell in paper]
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.4), sharey=True)
    title = f"{TITLES.get(dataset, dataset)}: {ours[0]['partition']} labeled ({ours[0]['labeled']:,} images)"
    figure.suptitle(title, parse_math=False)
    entries = {}
    for axis, key, cells in zip(axes, GMACS, (paper, []), strict=True):  # the paper gives the backbone's GMACs
        ticks = {g[key]: f"{NAMES.get(g['backbone'], g['backbone'])}, {g[key]:.1f}" for g in cells + ours}
        axis.set_xlabel(f"{key.replace('gmacs_', 'GMACs of the ')} at 512×512")
        entries |= draw_lines(axis, key, ours, cells, ticks)
        plt.setp(axis.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    axes[1].set_ylabel("")
    save_with_legend(figure, entries, path)


def draw_students(groups: list[dict], dataset: str, x: str, path: pathlib.Path):
    """mIoU against the labeled images (Fig. 3) or against the GMACs of several heads, with one panel per student."""
    panels = {
        name: [g for g in groups if (g["backbone"], g["role"]) == (name, "student")]
        for name in sorted({g["backbone"] for g in groups}, key=order)
    }
    panels = {name: ours for name, ours in panels.items() if any(len(line) > 1 for line in lines_along(x, ours).values())}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 4.8), squeeze=False)
    title = TITLES.get(dataset, dataset) + (f": {groups[0]['partition']} labeled" if x == "gmacs_model" else "")
    figure.suptitle(title, parse_math=False)
    entries = {}
    for axis, (backbone, ours) in zip(axes.flat, panels.items(), strict=True):
        if x == "labeled":
            paper = [cell for cell in paper_cells("methods", dataset) if cell["backbone"] == backbone]
            ticks = {g[x]: f"{g['partition']}\n{g[x]:,}" for g in paper + ours}
        else:
            paper, costs = [], [g[x] for g in ours]
            ticks = {
                n: str(n)
                for n in (1, 2, 3, 4, 6, 8, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200)
                if min(costs) / 1.75 < n < max(costs) * 1.4
            }
        label = {"labeled": "labeled images", "gmacs_model": "GMACs of the model at 512×512 (at the points: head width)"}
        axis.set_xlabel(label[x])
        axis.set_title(NAMES.get(backbone, backbone), parse_math=False)
        entries |= draw_lines(axis, x, ours, paper, ticks)
        for g in ours if x == "gmacs_model" else []:  # lines rise to the right: these sides are free
            side = {"xytext": (-6, 4), "ha": "right"} if g["separable_head"] else {"xytext": (6, -11)}
            axis.annotate(g["head_width"], (g[x], g["miou"]), textcoords="offset points", fontsize=9, **side)
    save_with_legend(figure, entries, path)


def lines_along(x: str, groups: list[dict]) -> dict[tuple, list[dict]]:
    """Lines of groups that differ only in `x` and the head's width, sorted by `x`; the key of a line begins with the method."""
    lines = collections.defaultdict(list)
    for g in sorted(groups, key=lambda g: g[x]):
        lines[setting_values(g, (*NETWORK[::-1], *(key for key in SETTINGS if key != "head_width")))].append(g)
    return lines


def draw_lines(axis, x: str, ours: list[dict], paper: list[dict], ticks: dict[float, str]) -> dict[str, Line2D]:
    """Draw mIoU against `x`, one line per group of runs that differ only in `x`, with bars of one deviation. Returns the
    legend. The colour shows the method, the marker the schedule; open points and dashed lines are the paper's numbers."""
    axis.set_xscale("log")
    axis.set_xticks(list(ticks), ticks.values(), parse_math=False)
    axis.minorticks_off()
    low, high = min(ticks) / 1.4, max(ticks) * 1.4
    axis.set(xlim=(low, high), ylabel="mIoU, %")
    methods = sorted({g["method"] for g in ours + paper}, key=order)
    entries, the_paper, lines = {}, {}, lines_along(x, paper + ours)
    for key in sorted(lines, key=order):
        line, method = lines[key], key[0]
        schedules = sorted({g["steps"] for g in ours if g["method"] == method})
        rank = schedules.index(line[0]["steps"]) if line[0]["source"] == "ours" else 0
        # methods and schedules stand beside each other, so that their bars do not overlap
        beside = (high / low) ** ((methods.index(method) + rank / 2 - (len(methods) - 1) / 2) * 0.1 / (len(methods) + 1))
        at, mious, bars = [g[x] * beside for g in line], [g["miou"] for g in line], [g.get("deviation") or 0 for g in line]
        look = {"color": COLOURS.get(method, "#8C8C8C"), "marker": "os^Dv"[rank % 5], "linestyle": "-" if line[1:] else "none"}
        if line[0]["source"] == "paper":
            look |= {"markerfacecolor": "none", "markersize": 9}
            look |= {"linestyle": "--", "linewidth": 1, "markersize": 5} if len(line) > 1 else {}
            axis.plot(at, mious, **look)
            the_paper = {"the paper's": Line2D([], [], **look | {"color": "0.4"})}
            continue
        text = f"{NAMES.get(method, method)}, {line[0]['steps']:,} steps"
        if line[0]["separable_head"]:
            text, look["linestyle"] = f"{text}, separable head", ":"
        axis.errorbar(at, mious, bars if any(bars) else None, elinewidth=1, zorder=3, **look)
        entries[text] = Line2D([], [], **look)
        role = {"teacher_deep": "$T_D$", "teacher_wide": "$T_W$"}.get(line[0]["role"], "")
        axis.annotate(role, (at[0], mious[0]), (-6, 3), ha="right", textcoords="offset points")
    return entries | the_paper


def save_with_legend(figure, entries: dict[str, Line2D], path: pathlib.Path):
    columns = 4 if max(map(len, entries)) < 30 else 2
    legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
    for text in legend.get_texts():  # names of folders
        text.set_parse_math(False)
    save_figure(path, figure)
    print(path)


def log_entry(line: str) -> dict:
    """A line of a log: its step and numbers, of which those that were not finite are None. Raises ValueError for another."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not is_kind(entry.get("step"), int) or len(entry) > 100:
        raise ValueError(f"an entry without a step: {line[:40]}")
    entry.pop("skipped", None)  # the losses and images of a skipped step, or how many were skipped
    for key, value in entry.items():  # those that are not finite are null, and nan in old logs
        if not (value is None or isinstance(value, float) or is_kind(value, int)):
            raise ValueError(f"'{key}' as {shortened(value)}")
    return {printable(key): value for key, value in entry.items()}


def draw_curves(paths: list[pathlib.Path], out: pathlib.Path):
    """Draw one panel per loss term and gradient norm, and one for the mIoU, with one line per run. The faint line shows the
    logged values, the strong one their mean over nine entries, if there are that many."""
    logs = {}
    for path in paths:
        try:
            lines = read_text(path).splitlines()
            whole = lines[:-1] + [line for line in lines[-1:] if line.endswith("}")]  # the last one may be cut off
            logs[path] = [log_entry(line) for line in whole]
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"--curves {path}: cannot be read as a log ({getattr(error, 'strerror', error)}); give the log.jsonl of a run"
            ) from None
    keys = dict.fromkeys(key for log in logs.values() for entry in log for key in entry)
    terms = [key for key in keys if key not in ("step", "lr", "images_per_s", "data_wait", "skipped")]
    if not terms:
        raise UserError(f"--curves {paths[0]}: holds no step yet; wait for the run's first --log-every steps")
    rows, columns = -(-len(terms) // 3), min(3, len(terms))
    figure, axes = plt.subplots(rows, columns, figsize=(10, 3 * rows + 0.8), squeeze=False)
    for axis in axes.flat[len(terms) :]:
        axis.set_axis_off()
    entries, colours = {}, list(COLOURS.values())
    for axis, term in zip(axes.flat, terms, strict=False):
        titles = {"miou": "mIoU on val, %", "loss": "total loss", "grad_loss": "gradient of the total loss"}
        gradient = term.startswith("grad_")  # drawn on one scale, to be compared
        axis.set(xlabel="step", title=titles.get(term, f"gradient: {term[5:]}" if gradient else f"loss: {term}"))
        axis.title.set_parse_math(False)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=5, integer=True)
        for i, (path, log) in enumerate(logs.items()):
            look = {"color": colours[i % len(colours)], "linestyle": ("-", "--", ":")[i // len(colours) % 3]}
            entries[printable("/".join(path.resolve().parts[-4:-1]))] = Line2D([], [], **look)
            points = [(e["step"], e[term]) for e in log if e.get(term) is not None]  # null where it was not finite
            x, y = [step for step, _ in points], [value for _, value in points]
            if len(x) < 9:
                look["marker"] = "o"
            elif term != "miou":
                axis.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.3)
                near = [[v for v in y[max(0, k - 4) : k + 5] if math.isfinite(v)] for k in range(len(y))]
                y = [statistics.fmean(v) if v else math.nan for v in near]
            axis.plot(x, y, **look)
    gradients = [axis for axis, term in zip(axes.flat, terms, strict=False) if term.startswith("grad_")]
    limits = [limit for axis in gradients for limit in axis.dataLim.intervaly if math.isfinite(limit)]
    for axis in gradients if limits else []:
        axis.set(yscale="log", ylim=(max(min(limits), max(limits) / 1e4) / 1.5, max(limits) * 1.5))
    save_with_legend(figure, entries, out)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="python -m paper.report RESULTS... | --curves LOG... [options]")
    parser.add_argument(
        "results", nargs="*", type=pathlib.Path, metavar="RESULTS", help="result files; files without mIoU are left out"
    )
    parser.add_argument(
        "--curves", nargs="+", type=pathlib.Path, metavar="LOG", help="draw the log.jsonl of runs instead (default: none)"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="PATH", help="(default: results/tables, or curves.png for --curves)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    args = parser.parse_args(argv)
    if bool(args.results) == bool(args.curves):
        raise UserError("give result files, or --curves with logs: python -m paper.report results/*.json")
    args.out = args.out or pathlib.Path("curves.png" if args.curves else "results/tables")
    if args.curves and (args.out.suffix.lower() != ".png" or args.out.is_dir()):
        raise UserError(f"--out {args.out}: with --curves, give a file's name that ends in .png")
    if args.curves:
        refuse_outputs([("--out", args.out)], args.curves, args.overwrite)
    else:
        check_folder("--out", args.out)
    return args


def outputs(dataset: str, name: str, out: pathlib.Path) -> list[pathlib.Path]:
    """The files that may be written for a data set."""
    tables = [f"{table}-{name}" for table in TABLES if table != "methods"] + [PAPER["tables"].get(dataset, f"table-{name}")]
    files = [f"{table}{tail}.{suffix}" for table in tables for tail in ("", "-all") for suffix in ("md", "csv")]
    return [out / file for file in [*files, *(f"{figure}-{name}.png" for figure in ("fig1", "fig3", "heads"))]]


def main(argv=None):
    args = parse_args(argv)
    with plt.rc_context(STYLE):
        if args.curves:
            return draw_curves(args.curves, args.out)
        groups = average(read_rows(args.results))
        names = {dataset: re.sub(r"[^\w.]+", "-", dataset) for dataset in dict.fromkeys(g["dataset"] for g in groups)}
        for dataset, name in names.items():
            refuse_links_out(args.out, outputs(dataset, name, args.out), "--out")
            refuse_foreign(outputs(dataset, name, args.out), args.overwrite, "--out")
        for dataset, name in names.items():
            of_dataset = [g for g in groups if g["dataset"] == dataset]
            write_tables(of_dataset, dataset, name, args.out)
            draw_figures(of_dataset, dataset, name, args.out)


if __name__ == "__main__":
    cli(main)
