"""The flags of the training scripts, one row each, and their defaults by data set.

A row says how a flag is parsed, what it may be, which methods have it, and under which key it stands in a result's row. The
scripts' parsers, the checks, and the settings that keep runs apart when seeds are averaged all come from these rows.
"""

import argparse
import math
import operator
import os
import pathlib
from typing import Any, NamedTuple

from common import UserError

MGD_METHODS = ("mgd", "mgd+")
TEACHER_METHODS, STUDENT_METHODS = ("sup", "mt", "cps"), (*MGD_METHODS, "kd", "cwd")
METHODS = (*TEACHER_METHODS, *STUDENT_METHODS)
UNLABELED = ("mt", "cps", *STUDENT_METHODS)  # the methods that use unlabeled images

# ---- defaults by data set ----

# What flags without a default of their own become; `backbone` is the students'. `teacher`, `student`, a backbone of `of`, and
# `no_cutmix` override.
# `shapes` has small stand-ins for the teachers, so that the whole pipeline runs in minutes without a GPU. The others are the
# recipes of the paper and its released code, in one process (docs/paper.md); `folder` follows that of VOC. A window of "crop"
# is as large as the crop: a head that saw nothing but crops is off on larger images, where its dilated convolutions reach
# what was padding before (33.0 mIoU instead of 37.8 on CamVid at half size with crops of 96x128).
SHAPES_RECIPE = {
    "teacher_deep": "resnet34",
    "teacher_wide": "resnet18",
    "backbone": "resnet18",
    "weights": "none",
    "head_width": 64,
    "separable_head": False,
    "crop": (64, 64),
    "scales": [0.75, 1.0, 1.25],
    "batch": 8,
    "lr": 0.05,
    "sup_only": 0.4,
    "ramp_up": 0.6,
    "cps_weight": 1.0,
    "lambda_image": 0.002,
    "lambda_region": 10.0,  # from scratch, 100 slowed the student
    "window": False,
    "ohem": False,
    "teacher": {"steps": 350},
    "student": {"steps": 250},
}
FOLDER_RECIPE = {
    "teacher_deep": "resnet101",
    "teacher_wide": "wide_resnet34",
    "backbone": "resnet18",
    "weights": "imagenet",
    "head_width": 256,
    "separable_head": False,
    "crop": (512, 512),
    "scales": [0.5, 0.75, 1.0, 1.5, 1.75, 2.0],
    "batch": 8,
    "lr": 0.0025,
    "steps": 40_000,
    "sup_only": 0.0,
    "ramp_up": 0.0,
    "cps_weight": 1.0,
    "lambda_image": 0.002,
    "lambda_region": 100.0,
    "window": "crop",
    "ohem": False,
    "of": {"wide_resnet34": {"lr": 0.001}, "mobilenetv2": {"lr": 0.0035}},
}
VOC_RECIPE = {
    **FOLDER_RECIPE,
    "steps": 39_700,
    "no_cutmix": {"cps_weight": 1.5},
    "of": {"wide_resnet34": {"lr": 0.001}, "mobilenetv2": {"lr": 0.0035, "lambda_image": 0.001, "lambda_region": 50.0}},
}
CITYSCAPES_RECIPE = {
    **FOLDER_RECIPE,
    "crop": (800, 800),
    "ohem": True,
    "cps_weight": 5.0,
    "no_cutmix": {"cps_weight": 6.0},
    "of": {},
    "teacher": {"steps": 44_600},
    "student": {"steps": 22_300, "batch": 16},
}
# What flags without a default of their own become by method, whatever the data set.
OF_METHOD: dict[str, dict] = {
    **{method: {"ema_decay": 0.99, "conf_thresh": 0.0} for method in TEACHER_METHODS},
    "mgd+": {"logit_adjustment": 0.3},  # it raised mIoU on CamVid and cost nothing on `shapes` (results/README.md)
}
RECIPES = {
    "shapes": SHAPES_RECIPE,
    "folder": FOLDER_RECIPE,
    "voc": VOC_RECIPE,
    "voc-few": VOC_RECIPE,
    "cityscapes": CITYSCAPES_RECIPE,
}

# What --recipe light puts in place of these: networks, crops and steps for one small GPU, or hours of a patient CPU.
LIGHT_RECIPE = {
    "teacher_deep": "efficientnet_lite2",  # the largest of those whose weights a package has
    "teacher_wide": "efficientnet_lite0",
    "backbone": "efficientnet_lite0",
    "weights": "imagenet",
    "head_width": 256,  # of teachers, as in the paper
    "crop": (256, 256),  # a quarter of VOC's pixels; a batch of 8 then needs less than 2 GB
    "batch": 8,  # the paper's
    # the next three as in the runs of CamVid with these networks (results/README.md)
    "lr": 0.02,  # eight times that of the paper's 40,000 steps, since the steps are few
    "scales": [0.75, 1.0, 1.25],  # 0.5 to 2 was 1.3 worse after 500 steps
    "teacher_method": "sup",  # better than cps that takes as long
    "sup_only": 0.4,  # of other methods, as for `shapes`: pseudo labels of heads from scratch are noise
    "ramp_up": 0.6,
    "lambda_region": 10.0,  # as for `shapes`: 100 cost two points in 500 steps on CamVid
    "of": {},
    "no_cutmix": {},
    "teacher": {"steps": 1600, "logit_adjustment": 0.3},  # so that they find rare classes
    "student": {"steps": 1500, "head_width": 64, "separable_head": True},  # the head for small students (docs/performance.md)
}

# ---- values that are more than a number ----


def crop_size(text: str) -> tuple[int, int]:
    """`512` -> (512, 512); `96x128`, height by width -> (96, 128)."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHTxWIDTH, not '{text}'")
    return sides[0], sides[-1]


def window_size(text: str) -> tuple[int, int] | bool:
    """As `crop_size`, and False for `whole`."""
    return False if text == "whole" else crop_size(text)


def default_workers() -> int:
    return max(0, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


# ---- the flags ----


class Flag(NamedTuple):
    group: str
    help: str
    default: Any = None  # None: that of the data set's recipe, or what `help` says
    type: Any = None
    choices: tuple | None = None
    nargs: str | None = None
    metavar: str | None = None
    required: bool = False
    methods: tuple[str, ...] = METHODS  # those whose runs it changes
    column: str | None = ""  # the key of a result's row that holds it, "": its own name; None: it changes no number
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None


WINDOW_HELP = "evaluation: size of sliding windows, SIDE or HEIGHTxWIDTH, or `whole` for whole images"
Path = pathlib.Path
GROUPS = ("data", "views", "model", "training", "run", "unlabeled images", "mgd", "kd and cwd", "teachers")
DATA, VIEWS, MODEL, TRAINING, RUN, UNLABELED_IMAGES, MGD, KD, TEACHERS = GROUPS

FLAGS = {
    "dataset": Flag(DATA, "shapes is embedded and needs no files", "shapes", choices=tuple(RECIPES)),
    "recipe": Flag(
        DATA,
        "defaults of the flags that are not given: the paper's, or light, for a small GPU or a patient CPU",
        "paper",
        choices=("paper", "light"),
        column=None,  # what it sets has keys of its own
    ),
    "data": Flag(
        DATA, "folder of the data set; needed by all but shapes (default: none)", type=Path, metavar="DIR", column="dataset"
    ),
    "part": Flag(
        DATA,
        "fraction of the training images that keep their mask: 1/K, or 1 for all",
        "1/8",
        metavar="1/K",
        column="partition",
    ),
    "labeled_list": Flag(
        DATA,
        "instead of --part: a file that names the labeled images (default: none)",
        type=Path,
        metavar="FILE",
        column="partition_hash",
    ),
    "unlabeled_list": Flag(
        DATA,
        "with --labeled-list: a file that names the unlabeled images (default: all other training images)",
        type=Path,
        metavar="FILE",
        column="partition_hash",
    ),
    "cache": Flag(
        DATA,
        "folder in which decoded images are kept and found again (default: none)",
        type=Path,
        metavar="DIR",
        column=None,
    ),
    "scales": Flag(
        VIEWS,
        "factors on the image size, one drawn per image",
        type=float,
        nargs="+",
        metavar="FACTOR",
        column="train_scales",
        above=0,
    ),
    "image_scale": Flag(VIEWS, "factor on the size of all images, in evaluation too", 1.0, float, metavar="FACTOR", above=0),
    "window": Flag(VIEWS, WINDOW_HELP, type=window_size, metavar="SIZE"),
    "weights": Flag(
        MODEL,
        "of the backbone: imagenet, none, or a file with a published state dict",
        metavar="imagenet|none|FILE",
    ),
    "stem": Flag(MODEL, "deep gives the paper's parameter counts", "standard", choices=("standard", "deep")),
    "head_width": Flag(MODEL, "channels of ASPP and decoder", type=int, metavar="CHANNELS", at_least=1),
    "separable_head": Flag(MODEL, "depthwise separable ASPP and decoder", type=bool),
    "seed": Flag(TRAINING, "of initialisation, order and augmentation; not of the partition", 0, int, at_least=0),
    "steps": Flag(TRAINING, "optimizer steps", type=int, at_least=1),
    "steps_factor": Flag(TRAINING, "multiplies the steps", 1.0, float, metavar="FACTOR", column="steps", above=0),
    # batch norm needs two images
    "batch": Flag(
        TRAINING,
        "labeled images per step over all processes; the unlabeled images come on top",
        type=int,
        metavar="IMAGES",
        at_least=2,
    ),
    "grad_accum": Flag(
        TRAINING,
        "gradient accumulation: split each step into so many micro-batches",
        1,
        int,
        metavar="MICRO_BATCHES",
        at_least=1,
    ),
    "lr": Flag(
        TRAINING,
        "initial learning rate; decays as (1 - step / steps)^0.9. The default grows in proportion to --batch",
        type=float,
        above=0,
    ),
    "weight_decay": Flag(TRAINING, "not applied to norms and biases", 5e-4, float, at_least=0),
    "crop": Flag(TRAINING, "crop size in pixels, SIDE or HEIGHTxWIDTH", type=crop_size, metavar="SIZE"),
    "ema_decay": Flag(
        TRAINING,
        "mt and students: keep the moving average of the weights, with this decay per step, below 1",
        type=float,
        methods=("mt", *STUDENT_METHODS),
        at_least=0,
        below=1,
    ),
    "logit_adjustment": Flag(
        TRAINING,
        "after the last step, lower the logits of frequent classes, so that rare ones are found: by so many times the "
        "logarithm of the class's share of the labeled pixels "
        "(default: 0.3 for mgd+ and for teachers of --recipe light, otherwise 0)",
        type=float,
        metavar="TAU",
        at_least=0,
    ),
    "ohem": Flag(TRAINING, "supervised loss on hard pixels only", type=bool),
    "refine": Flag(
        TRAINING,
        "students: the last of the steps, this fraction of all, are on the ground truth alone",
        type=float,
        metavar="FRACTION",
        methods=STUDENT_METHODS,
        at_least=0,
        below=1,
    ),
    "cutmix": Flag(TRAINING, "mix the unlabeled views with CutMix", True, methods=UNLABELED),
    "strong_views": Flag(
        TRAINING,
        "change the colours of the unlabeled views and blur them, for the student alone",
        type=bool,
        methods=STUDENT_METHODS,
    ),
    "precision": Flag(
        TRAINING,
        "of autocast (default: bf16 where the hardware is fast at it)",
        choices=("bf16", "fp32"),
    ),
    "out": Flag(RUN, "folder of the run: last.pt, log.jsonl", type=Path, metavar="DIR", required=True, column=None),
    "resume": Flag(RUN, "continue from OUT/resume.pt where it exists", False, column=None),
    "workers": Flag(RUN, "processes of each data loader", default_workers(), int, metavar="N", column=None, at_least=0),
    "device": Flag(RUN, "cuda, cpu, ... (default: cuda where there is one)", column=None),
    "compile": Flag(RUN, "torch.compile the networks; worth its minutes in long runs", False, column=None),
    "tensorboard": Flag(
        RUN, "write OUT/tensorboard from the log, with panels of val images; needs pip install tensorboard", False, column=None
    ),
    "log_every": Flag(RUN, "how often the losses are logged", 20, int, metavar="STEPS", column=None, at_least=1),
    "save_every": Flag(RUN, "how often OUT/resume.pt is written", 200, int, metavar="STEPS", column=None, at_least=1),
    "val_every": Flag(
        RUN,
        "how often to validate; 0: after the last step only",
        0,
        int,
        metavar="STEPS",
        column=None,
        at_least=0,
    ),
    "cps_weight": Flag(
        UNLABELED_IMAGES,
        "cps: weight of the loss on pseudo labels",
        type=float,
        methods=("cps",),
        at_least=0,
    ),
    "conf_thresh": Flag(
        UNLABELED_IMAGES,
        "cps and mgd: ignore pseudo labels below this probability",
        type=float,
        metavar="PROBABILITY",
        methods=("cps", *MGD_METHODS),
        column="threshold",
        at_least=0,
        at_most=1,
    ),
    "mt_weight": Flag(UNLABELED_IMAGES, "mt: weight of the consistency loss", 100.0, float, methods=("mt",), at_least=0),
    "sup_only": Flag(
        UNLABELED_IMAGES,
        "supervised-only warm-up, as a fraction of the steps",
        type=float,
        metavar="FRACTION",
        methods=("mt", "cps"),
        at_least=0,
        at_most=1,
    ),
    "ramp_up": Flag(
        UNLABELED_IMAGES,
        "fraction of the steps at which the unsupervised weight reaches its full value",
        type=float,
        metavar="FRACTION",
        methods=("mt", "cps"),
        at_least=0,
        at_most=1,
    ),
    "lambda_image": Flag(MGD, "λ1 of Eq. 7, weight of the image level", type=float, methods=MGD_METHODS, at_least=0),
    "lambda_region": Flag(MGD, "λ2 of Eq. 7, weight of the region level", type=float, methods=MGD_METHODS, at_least=0),
    "lambda_schedule": Flag(
        MGD,
        "of λ1 and λ2: ramp reaches them after two fifths of the steps, decay takes them to 0 (default: constant)",
        choices=("constant", "ramp", "decay"),
        methods=MGD_METHODS,
    ),
    "lambda_relative": Flag(
        MGD,
        "in place of λ1 and λ2: the gradient of each level has this fraction of the norm of the pixel level's",
        type=float,
        metavar="FRACTION",
        methods=MGD_METHODS,
        at_least=0,
    ),
    "soft_labels": Flag(
        MGD,
        "in place of Eq. 2: cross entropy with the teachers' probabilities at temperature T; 0 is Eq. 2",
        type=float,
        metavar="T",
        methods=MGD_METHODS,
        at_least=0,
    ),
    "image_reduction": Flag(
        MGD,
        "over the classes of the image level; mean is Eq. 4",
        "sum",
        choices=("sum", "mean"),
        methods=MGD_METHODS,
    ),
    "regions": Flag(MGD, "regions per side, H_v = W_v of Eq. 6", 7, int, methods=MGD_METHODS, at_least=1),
    "temperature": Flag(KD, "of the softened probabilities", 4.0, float, methods=("kd", "cwd"), above=0),
    "kd_weight": Flag(KD, "weight of the divergence", 1.0, float, methods=("kd", "cwd"), at_least=0),
    "teacher_bn": Flag(
        TEACHERS,
        "train: normalize with the statistics of each batch",
        "eval",
        choices=("eval", "train"),
        methods=STUDENT_METHODS,
    ),
    "mixed_terms": Flag(
        TEACHERS,
        "the teachers' outputs for the image and region terms: run on the CutMix views (mixed), or CutMix of the outputs for "
        "the clean views (clean; saves a quarter of the teachers' compute)",
        "mixed",
        choices=("mixed", "clean"),
        methods=STUDENT_METHODS,
    ),
    "pseudo_labels": Flag(
        TEACHERS,
        "folder of NAME.png, class indices of some images from any model: one more teacher of the pixel level, alone or "
        "beside T_D and T_W (default: none)",
        type=Path,
        metavar="DIR",
        methods=MGD_METHODS,
    ),
    "grad_norms": Flag(
        RUN,
        "log the norm of each weighted term's gradient",
        False,
        methods=STUDENT_METHODS,
        column=None,
    ),
    # declared by the scripts themselves
    "method": Flag("", ""),
    "role": Flag("", ""),
    "backbone": Flag("", ""),
    "deep": Flag("", "", column="teachers"),
    "wide": Flag("", "", column="teachers"),
    "losses": Flag("", ""),
}


def add_flags(parser: argparse.ArgumentParser, methods: tuple[str, ...], groups: tuple[str, ...] = GROUPS):
    """Add the flags of `groups` that any of `methods` has, each with its default in its help."""
    for title in groups:
        group = parser.add_argument_group(title)
        for name, flag in FLAGS.items():
            if flag.group != title or not {*methods} & {*flag.methods}:
                continue
            more = {key: getattr(flag, key) for key in ("type", "choices", "nargs", "metavar") if getattr(flag, key)}
            if isinstance(flag.default, bool) or flag.type is bool:
                more = {"action": argparse.BooleanOptionalAction}
            action = group.add_argument(f"--{name.replace('_', '-')}", default=flag.default, required=flag.required, **more)
            action.help = flag.help + default_of(name)  # Python 3.10 would add a second default to that of a boolean


def default_of(name: str) -> str:
    """What help says of a flag's default."""
    flag, value = FLAGS[name], VOC_RECIPE.get(name)
    if flag.required or "(default: " in flag.help:
        return ""
    if flag.default is not None:
        return f" (default: {plain(flag.default)})"
    if name not in VOC_RECIPE:
        of = [f"{plain(OF_METHOD[m][name])} for {m}, " for m in flag.methods if name in OF_METHOD.get(m, {})]
        none = "off" if flag.type is bool else "none"
        return f" (default: {''.join(of)}otherwise {none})" if of else f" (default: {none})"
    return f" (default: by --dataset; {plain(value)} for voc)"


def plain(value) -> str:
    """A default as one types it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):  # a crop size
        return "x".join(map(str, dict.fromkeys(value)))
    return " ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)


def recipe_of(args: argparse.Namespace) -> dict:
    """The recipe of the arguments' data set. Raises UserError."""
    if args.recipe == "paper":
        return RECIPES[args.dataset]
    if args.dataset == "shapes":
        raise UserError("--recipe light: shapes is small as it is; leave --recipe out, or give --dataset folder --data DIR")
    return {**RECIPES[args.dataset], **LIGHT_RECIPE}


def fill_from_recipe(args: argparse.Namespace, stage: str):
    """Give every argument that is still None its value by method or data set, if there is one, and check the ranges of all.

    `stage` is teacher or student. Raises UserError.
    """
    recipe = recipe_of(args)
    of_backbone, without = recipe.get("of", {}).get(args.backbone, {}), {} if args.cutmix else recipe.get("no_cutmix", {})
    recipe = {**recipe, **recipe.get(stage, {}), **of_backbone, **without, **OF_METHOD.get(args.method, {})}
    if args.batch is not None:  # the recipe's learning rate is that of its batch
        recipe["lr"] *= args.batch / recipe["batch"]
    missing = [name for name in FLAGS if name in recipe and getattr(args, name, 0) is None]
    for name in sorted(missing, key=lambda name: recipe[name] == "crop"):  # a window of the crop's size follows the crop
        setattr(args, name, args.crop if recipe[name] == "crop" else recipe[name])
    if args.steps_factor > 0:  # what is not is refused below
        args.steps = round(args.steps * args.steps_factor)
    for name, flag in FLAGS.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            if value is not None:
                check_range(name, flag, value)


# ---- values of files that others wrote ----

# The keys of a result's row that are no flag, or hold something else: the kind of their values, and of those of a list.
ROW = {
    **dict.fromkeys(("dataset", "partition", "partition_hash", "role", "backbone", "method", "mgd_ops", "code"), str),
    **dict.fromkeys(("teacher_labels", "weights", "list"), str),
    **{key: [str] for key in ("losses", "teachers", "teacher_roles", "teacher_backbones", "teacher_methods")},
    **{key: [int] for key in ("teacher_steps", "teacher_seeds")},
    "teacher_logit_adjustments": [float],
    **dict.fromkeys(("labeled", "gmacs_backbone", "gmacs_model", "seconds", "miou"), float),
    "steps": int,  # 0 of a network that was not trained
    "scales": [float],
    "flip": bool,
}
KINDS = (str, bool, int, float)
LARGEST = 10**15  # of numbers: more are damage, and overflow where they are drawn


def is_kind(value, kind) -> bool:
    """Whether a value is of a kind of `KINDS`; [kind] is a list of such values. A number is finite and not negative."""
    if isinstance(kind, list):
        return isinstance(value, (list, tuple)) and all(is_kind(item, kind[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 <= value <= LARGEST
    return isinstance(value, kind)


def fits(flag: Flag, value) -> bool:
    """Whether a value is one that its flag takes, as a script leaves it in its arguments."""
    if flag.choices:
        return isinstance(value, str) and value in flag.choices
    if flag.type in (crop_size, window_size):
        sides = isinstance(value, (list, tuple)) and len(value) == 2 and is_kind(value, [int]) and min(value) > 0
        return sides or (flag.type is window_size and value is False)
    kind = bool if isinstance(flag.default, bool) else flag.type
    kind = kind if kind in KINDS else str
    if not is_kind(value, [kind] if flag.nargs else kind):
        return False
    try:
        for item in value if flag.nargs else [value]:
            check_range("", flag, item)
    except UserError:
        return False
    return True


def wrong_argument(args: dict) -> str | None:
    """The first of a checkpoint's arguments that its script could not have left there, or None. All may be None."""
    for name, value in args.items():
        if value is None or name not in FLAGS:
            continue
        flag = FLAGS[name]
        if not (fits(flag, value) if flag.group else is_kind(value, ROW.get(name, str))):  # the scripts' own have no type here
            return f"the argument '{name}' as {shortened(value)}"
    return None


def wrong_column(row: dict) -> str | None:
    """The first entry of a result's row that is not of its kind, or None. All may be None; a setting that `ROW` does not name
    is a text, a number, true or false, or a list of them."""
    settings = {flag.column or name for name, flag in FLAGS.items() if flag.column is not None}
    for key, value in row.items():
        if value is not None and key in ROW and not is_kind(value, ROW[key]):
            return f"'{key}' as {shortened(value)}"
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if key in settings and item is not None and not any(is_kind(item, kind) for kind in KINDS):
                return f"'{key}' as {shortened(value)}"
    zero = next((key for key in ("labeled", "gmacs_backbone", "gmacs_model") if row.get(key) == 0), None)
    return zero and f"'{zero}' as 0"


def shortened(value) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def check_range(name: str, flag: Flag, value):
    """Raise UserError where a value lies outside its flag's range; NaN and infinity always do."""
    bounds = {bound: getattr(flag, bound) for bound in BOUNDS if getattr(flag, bound) is not None}
    infinite = isinstance(value, float) and math.isinf(value)
    if infinite or not all(BOUNDS[bound](value, limit) for bound, limit in bounds.items()):
        allowed = [f"{bound.replace('_', ' ')} {limit}" for bound, limit in bounds.items()]
        raise UserError(f"--{name.replace('_', '-')} {value}: must be {' and '.join(['finite'] * infinite + allowed)}")
