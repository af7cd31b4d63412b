"""Kill trainings, break their disk, feed them damaged files and let one run for long; count what did not survive.

    python -m soak                          # all parts
    python -m soak --parts kills faults     # some of them
    python -m soak --quick --json runs/quick.json

Each case becomes a row of results/reliability.json, and of the table in
docs/reliability.md, when it has ended; an interrupted command goes on with the
case that it stopped in. Needs Linux; the file system that runs full needs root.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import time

if __name__ == "__main__":
    # Trainings are forks of this process. It may have no threads, and with one thread each they repeat bit for bit.
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    os.environ.setdefault("MGD_OPS", "torch")

import result_files
from common import ArgumentParser, cli, printable

ROOT = pathlib.Path(result_files.__file__).parent
PARTS = ("kills", "faults", "long_run", "fuzz")
COUNTS = ("tried", "survived", "differing", "lost")
BEGIN, END = "<!-- python -m soak writes this table -->", "<!-- end of the table -->"


def parse_args(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m soak")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (default: all)")
    parser.add_argument("--quick", action="store_true", help="some cases of each part, in less than a minute (default: off)")
    path = {"type": pathlib.Path, "metavar": "FILE"}
    parser.add_argument("--json", default=ROOT / "results/reliability.json", help="result file that rows are put into", **path)
    parser.add_argument(
        "--work", type=pathlib.Path, default=ROOT / "runs/soak", metavar="DIR", help="folder of the runs (default: runs/soak)"
    )
    args = parser.parse_args(argv)
    result_files.refuse_outputs([("--json", args.json)], [], overwrite=False)
    return args


def main(argv=None):
    sys.argv[0] = "soak"  # as result files and errors name it
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    done = args.work / "done.json"
    finished = json.loads(done.read_text()) if done.exists() else []
    found = {}
    for part in args.parts:
        module = importlib.import_module(f"soak.{part}")
        choose = getattr(module, "quick", lambda folder: {}) if args.quick else module.cases
        found |= choose(args.work.resolve())
    bad = []
    for case, count in found.items():
        if case in finished:
            continue
        began = time.perf_counter()
        counts = count()
        if counts is not None:  # it can run here
            row = {"case": case, **counts, "seconds": round(time.perf_counter() - began, 1)}
            rows = put_row(args.json, row)
            if args.json.resolve() == ROOT / "results/reliability.json":
                write_table(ROOT / "docs/reliability.md", rows)
            print(f"{case}: " + ", ".join(f"{row[key]} {key}" for key in COUNTS) + f", {row['seconds']:.0f} s", flush=True)
            bad += [case] * (row["survived"] != row["tried"] or row["differing"] + row["lost"] > 0)
        finished.append(case)
        result_files.write_text(done, json.dumps(finished))
    result_files.write_text(done, json.dumps([case for case in finished if case not in found]))
    if bad:
        sys.exit(f"not all survived: {'; '.join(bad)}")


def put_row(path: pathlib.Path, row: dict) -> list[dict]:
    """Put a row into a result file, in place of the one of the same case; all rows."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    cases = [each["case"] for each in rows]
    if row["case"] in cases:
        rows[cases.index(row["case"])] = row
    else:
        rows.append(row)
    result_files.write_result(path, "reliability", rows, sum(each["seconds"] for each in rows), os.environ["MGD_OPS"])
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a table in Markdown, with the sum of each part: of the cases that begin alike."""
    parts: dict[str, list[dict]] = {}
    for row in rows:
        parts.setdefault(row["case"].partition(":")[0], []).append(row)
    shown = []
    for part, of_part in parts.items():
        total = {key: sum(row[key] for row in of_part) for key in (*COUNTS, "seconds")}
        shown += [*of_part, *([{"case": f"**{part}: all**", **total}] if len(of_part) > 1 else [])]
    lines = [f"| case | {' | '.join(COUNTS)} | seconds |", "|---" * (len(COUNTS) + 2) + "|"]
    for row in shown:
        lines.append(f"| {printable(row['case'])} | {' | '.join(str(row[key]) for key in COUNTS)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def write_table(document: pathlib.Path, rows: list[dict]):
    """Put the table of the rows between the marks in a document."""
    text = document.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    result_files.write_text(document, f"{text[:begin]}\n\n{table(rows)}\n\n{text[end:]}")


if __name__ == "__main__":
    cli(main)
