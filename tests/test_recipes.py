import argparse
import ast
import pathlib

import pytest
from conftest import ROOT, TINY, errors

import distill
import distill_losses
import evaluate
import recipes
import result_files
import run_folder
import train_teacher

REQUIRED = {train_teacher: ["--out", "x"], distill: ["--out", "x", "--deep", "T.pt"]}
FLAGS_OF = {module: vars(module.parse_args(argv)) for module, argv in REQUIRED.items()}


@pytest.mark.parametrize("module", REQUIRED)
def test_every_flag_has_a_row_and_every_row_a_flag(module):
    assert FLAGS_OF[module].keys() <= recipes.FLAGS.keys()
    assert {name for flags in FLAGS_OF.values() for name in flags} == {*recipes.FLAGS}


@pytest.mark.parametrize("name", recipes.FLAGS)
def test_runs_that_differ_in_a_flag_are_kept_apart_or_the_flag_changes_no_number(name):
    """A recorded flag's key is one of those that seeds are averaged within; a flag without a key may change on a resume."""
    flag = recipes.FLAGS[name]
    if flag.column is not None:
        assert (flag.column or name) in (*result_files.GROUP_BY, "seed")
    else:
        assert name in ("out", "recipe", "resume", "cache", "workers", "device", "compile", "log_every", "save_every",
                        "val_every", "grad_norms", "tensorboard")  # fmt: skip


@pytest.mark.usefixtures("tiny_networks")
def test_a_result_holds_every_recorded_flag(script, teachers, tmp_path):
    """Of a student; its value is that of the training."""
    arguments = ["--out", tmp_path / "x", "--deep", teachers[0], "--wide", teachers[1], "--steps", "1", "--lambda-image", "0.3"]
    assert script(distill, *arguments, *TINY)[0] == 0
    assert script(evaluate, "--ckpt", tmp_path / "x" / "last.pt", "--json", tmp_path / "r.json")[0] == 0
    (row,) = result_files.json.loads((tmp_path / "r.json").read_text())["rows"]
    args = run_folder.load_checkpoint(tmp_path / "x" / "last.pt")["args"]
    keys = {name: flag.column or name for name, flag in recipes.FLAGS.items() if flag.column is not None and name in args}
    assert {*keys.values()} <= row.keys() and row["lambda_image"] == 0.3 and row["grad_accum"] == 1
    # of these the key holds what they lead to
    own = {"deep", "wide", "data", "part", "labeled_list", "unlabeled_list", "steps_factor", "window"}
    for name in keys.keys() - own:
        assert row[keys[name]] == args[name], name


def test_every_term_of_a_loss_has_a_weight_and_every_weight_a_row():
    assert {*filter(None, distill_losses.WEIGHTS.values())} <= recipes.FLAGS.keys()
    assert all(recipes.FLAGS[flag].at_least == 0 for flag in distill_losses.WEIGHTS.values() if flag)
    with pytest.raises(KeyError, match="forgotten"):  # a term without an entry in WEIGHTS is not weighted by 1
        distill_losses.weighted_sum({"sup": 1.0, "forgotten": 1.0}, dict.fromkeys(distill_losses.WEIGHTS, 1.0))


def test_recipes_set_flags_alone():
    for method, values in recipes.OF_METHOD.items():
        assert all(method in recipes.FLAGS[name].methods or method in recipes.TEACHER_METHODS for name in values)
        assert all(recipes.FLAGS[name].default is None and recipes.fits(recipes.FLAGS[name], values[name]) for name in values)
    structure = {"teacher_deep", "teacher_wide", "teacher_method", "teacher", "student", "of", "no_cutmix"}
    for recipe in (*recipes.RECIPES.values(), recipes.LIGHT_RECIPE):
        parts = [recipe, recipe.get("teacher", {}), recipe.get("student", {}), recipe.get("no_cutmix", {})]
        parts += recipe.get("of", {}).values()
        assert {key for part in parts for key in part} <= recipes.FLAGS.keys() | structure
        assert recipe.get("teacher_method", "cps") in recipes.TEACHER_METHODS


@pytest.mark.parametrize("dataset", [name for name in recipes.RECIPES if name != "shapes"])
def test_the_light_recipe_is_light(dataset):
    """Its networks, crops and steps, where none are given, and what it leaves out is the data set's own."""
    more = ["--dataset", dataset, "--data", "x"]
    for module, flags in REQUIRED.items():
        paper, light = (module.parse_args([*flags, *more, *recipe]) for recipe in ([], ["--recipe", "light"]))
        assert light.backbone == "efficientnet_lite0" and light.separable_head and light.weights == "imagenet"
        assert light.steps < paper.steps / 10 and light.crop[0] < paper.crop[0] and light.window == light.crop
        assert (light.ohem, light.weight_decay) == (paper.ohem, paper.weight_decay)
        assert light.logit_adjustment is paper.logit_adjustment is None
        given = module.parse_args(
            [*flags, *more, "--recipe", "light", "--steps", "7", "--no-separable-head", "--backbone", "r34"]
        )
        assert (given.steps, given.separable_head, given.backbone) == (7, False, "resnet34")
    roles = ("teacher_deep", "teacher_wide")
    teachers = [
        train_teacher.parse_args([*REQUIRED[train_teacher], *more, "--recipe", "light", "--role", role]) for role in roles
    ]
    assert [(args.backbone, args.head_width, args.separable_head) for args in teachers] == [
        ("efficientnet_lite2", 256, False),
        ("efficientnet_lite0", 256, False),
    ]
    assert [(args.method, args.logit_adjustment) for args in teachers] == [("sup", 0.3), ("sup", 0.3)]
    given = train_teacher.parse_args(
        [*REQUIRED[train_teacher], *more, "--recipe", "light", "--role", "teacher_deep", "--method", "mt"]
    )
    assert given.method == "mt" and train_teacher.parse_args([*REQUIRED[train_teacher], *more]).method == "cps"


@pytest.mark.parametrize("module", REQUIRED)
def test_the_embedded_data_set_has_no_light_recipe(script, module, tmp_path):
    assert "--recipe light: shapes is small as it is" in errors(script, module, *REQUIRED[module], "--recipe", "light")


def test_flags_are_given_in_full(script, tmp_path):
    assert "unrecognized arguments: --head 64" in errors(script, train_teacher, "--out", tmp_path / "x", "--head", "64")


@pytest.mark.parametrize("flags,said", [
    ("--sup-only -0.1", "--sup-only -0.1: must be at least 0 and at most 1"),
    ("--ramp-up 1.5", "--ramp-up 1.5: must be at least 0 and at most 1"),
    ("--conf-thresh nan", "--conf-thresh nan: must be at least 0 and at most 1"),
    ("--ema-decay 1", "--ema-decay 1.0: must be at least 0 and below 1"), ("--lr 0", "--lr 0.0: must be above 0"),
    ("--lr nan", "--lr nan: must be above 0"), ("--lr inf", "--lr inf: must be finite and above 0"),
    ("--steps 0", "--steps 0: must be at least 1"),
    ("--scales 1 0", "--scales 0.0: must be above 0"),
])  # fmt: skip
def test_values_outside_their_range_are_refused(script, tmp_path, flags, said):
    assert said in errors(script, train_teacher, "--out", tmp_path / "x", *flags.split())


LAYERS = [
    ["common", "logit_adjustment"],
    ["readers", "recipes", "run_owner", "stop_signals", "finite_steps", "efficientnet_lite", "depthwise"],
    ["backbones", "run_folder"],
    ["models"],
    ["checks", "kernels", "onnx_model"],
    ["result_files"],
    ["datasets"],
    ["convert", "splits"],
    ["polygons"],
    ["batches", "mgd_ops", "pictures"],
    ["inference", "distill_losses", "step_time"],
    ["events"],
    ["evaluate", "predict"],  # stages whose public functions the other stages need
    ["prepare", "export", "train_teacher", "distill"],
]


def test_imports_point_down():
    """Each module imports modules of lower layers alone, and nothing imports a stage but another stage."""
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert level.keys() == {path.stem for path in ROOT.glob("*.py")}
    for name in level:
        for node in ast.walk(ast.parse(pathlib.Path(ROOT, f"{name}.py").read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            for other in imported:
                assert level.get(other, -1) < level[name], f"{name} imports {other}"
                assert other.partition(".")[0] != "paper", name


@pytest.mark.parametrize("text,expected", [("64", (64, 64)), ("96x128", (96, 128))])
def test_crop_size(text, expected):
    assert recipes.crop_size(text) == expected


@pytest.mark.parametrize("text", ["0", "1x2x3", "ten", "-5"])
def test_crop_size_refuses_nonsense(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        recipes.crop_size(text)
