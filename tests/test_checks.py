"""Faults of a data set that would make a number meaningless are refused; a message names a command that fixes the masks."""

import pathlib
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    COLOURS,
    blocks,
    check,
    classes_of,
    errors,
    indexed,
    masks_of,
    open_folder,
    rewrite,
    rgb,
    save_jpeg,
    save_mask,
    write_lines,
)
from PIL import Image, ImageFilter

import checks
import datasets
import evaluate
import models
import prepare
import readers
from common import UserError

# ---- what makes a number meaningless ----


def fault_binary(root):
    rewrite(root, lambda mask: np.where(mask == 1, 255, 0))
    write_lines(root / "classes.txt", ["background", "object"])
    return "the labeled masks hold only 0 and 255, .* --values 0=0 255=1$"


def fault_binary_without_classes(root):
    expected = fault_binary(root)
    (root / "classes.txt").unlink()
    return expected


def fault_soft_edges(root):
    (root / "classes.txt").unlink()
    soft = ImageFilter.GaussianBlur(1)
    rewrite(root, lambda mask: Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).filter(soft))
    return "different labels, .*soft edges .*classes.txt.* --values 0=0 255=1 --unknown nearest$"


def fault_many_labels(root):
    (root / "classes.txt").unlink()
    rewrite(root, lambda mask: np.arange(40 * 56).reshape(40, 56) % 33)
    return "hold 33 different labels, .*; name every class in classes.txt"


def fault_gap(root):
    (root / "classes.txt").unlink()
    rewrite(root, lambda mask: np.where(mask == 2, 3, mask))
    return "hold the labels 0, 1, 3 but not 2; name every class in classes.txt.* --values 0=0 1=1 3=2 255=ignore$"


def fault_nothing_in_val(root):
    rewrite(root, lambda mask: np.full_like(mask, 255), ["im10", "im11", "im12"])
    return "the val masks hold only 255, .* nothing to evaluate"


def fault_nothing_labeled(root):
    rewrite(root, lambda mask: np.full_like(mask, 255), [f"im{i:02d}" for i in range(8)])
    return "the labeled masks hold only 255, .* nothing to learn"


def fault_one_class_in_val(root):
    rewrite(root, lambda mask: np.where(mask == 2, 255, 1), ["im10", "im11", "im12"])
    return "the val masks show only one class, 'tree'"


def fault_one_class_labeled(root):
    rewrite(root, lambda mask: np.zeros_like(mask), [f"im{i:02d}" for i in range(8)])
    return "the labeled masks show only one class, 'road'"


def fault_palettes(root):
    blocks(root)
    rewrite(root, lambda mask: indexed(mask, (0, 1, 2)))
    rewrite(root, lambda mask: indexed(mask, (2, 0, 1)), ["im05"])
    return "im05.png: its palette gives .* to index .*write the colour of .*prepare.py masks .* --palette .*palette.txt$"


def fault_palettes_of_each_file(root):
    """As programs write that choose a palette for each file: its colours are numbered anew, and no file shows three classes."""
    write_lines(root / "classes.txt", ["background", "cat", "dog"])
    blocks(root)
    for i, path in enumerate(masks_of(root)):
        mask = np.asarray(Image.open(path))
        indexed(np.where(mask == 1 + i % 2, mask, 0), (0, 1 + i % 2, 2 - i % 2)).save(path)
    return r"im01.png: .* gives index 1 the colour \(0, 128, 0\), but .*im00.png the colour \(128, 64, 128\), .*--palette"


def fault_palette_file(root):
    blocks(root)
    rewrite(root, lambda mask: indexed(mask, (1, 0, 2)))
    write_lines(root / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    return "im00.png: its palette gives the colour .*palette.txt to index .*prepare.py masks .* --palette .*palette.txt$"


def fault_background_is_not_black(root):
    blocks(root)
    rewrite(root, lambda mask: indexed(mask, (1, 2, 0)))
    write_lines(root / "classes.txt", ["background", "road", "tree"])
    return "gives the colour .0, 0, 0. to index 2, but the name background of class 0 to index 0"


FAULTS = [value for name, value in globals().items() if name.startswith("fault_")]


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda f: f.__name__)
def test_faults_of_masks_are_refused_by_check_and_before_training(script, folder, spoil):
    expected = spoil(folder)
    code, out = check(script, folder)
    problems = re.findall(r"^problem: (.*)$", out, re.MULTILINE)
    assert code == 1 and re.search(expected, problems[0]) and f"{len(problems)} problem(s)" in out
    with pytest.raises(UserError) as error:
        open_folder(folder)
    assert str(error.value) == problems[0]


def test_a_file_with_the_palette_of_palette_txt_does_not_excuse_another(folder):
    write_lines(folder / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    dataset = datasets.Folder(folder)
    right, wrong = (COLOURS[list(order)].tobytes() for order in ((0, 1, 2), (0, 2, 1)))
    assert checks.palette_clash(dataset, {right: {0: "a.png"}}) is None
    assert "b.png: its palette gives" in checks.palette_clash(dataset, {right: {0: "a.png"}, wrong: {1: "b.png"}})


def test_vocs_masks_have_vocs_palette_or_none(voc):
    dataset = datasets.Voc(voc, few=True)
    groups = {"labeled": dataset.train, "val": dataset.val}
    checks.refuse_faults(dataset, groups)  # grey files
    palette = np.array(readers.voc_palette(256))
    path = dataset.masks[dataset.train[0]]
    mask = np.asarray(Image.open(path))
    with_palette(mask, palette.ravel().tolist()).save(path)
    checks.refuse_faults(dataset, groups)
    palette[[1, 20]] = palette[[20, 1]]
    with_palette(mask, palette.ravel().tolist()).save(path)
    with pytest.raises(
        UserError, match=r"2007_000001.png: its palette gives .*VOC's palette to index .*/SegmentationClass --palette voc$"
    ):
        checks.refuse_faults(dataset, groups)


def test_a_command_for_binary_masks_is_named_only_where_all_masks_are_such(folder):
    def message():
        with pytest.raises(UserError) as error:
            open_folder(folder)
        return str(error.value)

    val = ["im10", "im11", "im12"]
    for value in (255, 0):  # the labeled masks are right
        rewrite(folder, lambda mask, value=value: np.where(np.indices(mask.shape).sum(0) < 9, 255, value), val)
        assert "the val masks " in message() and "prepare.py" not in message()
    rewrite(folder, lambda mask: np.where(mask == 1, 255, 0))
    rewrite(folder, lambda mask: np.full_like(mask, 255), val)
    assert message().endswith("--values 0=0 255=1")


def test_evaluation_refuses_val_masks_without_a_number(folder):
    dataset = datasets.Folder(folder)
    checks.refuse_faults(dataset, {"val": dataset.val})
    for spoil in (fault_one_class_in_val, fault_nothing_in_val):
        expected = spoil(folder)
        with pytest.raises(UserError, match=expected):
            checks.refuse_faults(dataset, {"val": dataset.val})
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate.iou(torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.slow
def test_no_result_file_is_written_where_there_is_nothing_to_evaluate(script, folder, tmp_path):
    model = models.build_model("resnet18", 3, "none", "standard", 16, False)
    args = {
        "dataset": "folder",
        "data": str(folder),
        "backbone": "resnet18",
        "weights": "none",
        "stem": "standard",
        "window": None,
        "head_width": 16,
        "separable_head": False,
        "image_scale": 1.0,
        "scales": [1.0],
        "precision": "fp32",
    }
    row = {
        "method": "sup",
        "role": "student",
        "backbone": "resnet18",
        "partition": "1",
        "labeled": 8,
        "steps": 2,
        "seed": 0,
        "gmacs_model": 1.0,
        "mgd_ops": "torch",
        "head_width": 16,
    }
    of_data = {"classes": ["road", "tree", "car"], "palette": readers.voc_palette(3)}
    torch.save({"model": model.state_dict(), "args": args, "row": row, **of_data}, tmp_path / "m.pt")
    arguments = ["--ckpt", tmp_path / "m.pt", "--json", tmp_path / "r.json"]
    code, _, err = script(evaluate, *arguments)
    assert code == 0, err
    (tmp_path / "r.json").unlink()
    fault_nothing_in_val(folder)
    code, _, err = script(evaluate, *arguments)
    assert code == 2 and "nothing to evaluate" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r.json").exists()


# ---- pseudo labels of files ----


@pytest.fixture
def maps(folder):
    """A folder of pseudo labels for some images of `folder`, one of each group, and for one that it does not have."""
    rng = np.random.default_rng(1)
    for name in ("im00", "im03", "im08", "other"):
        save_mask(folder / "maps" / f"{name}.png", rng.choice([0, 1, 2, 255], (40, 56)))
    return folder / "maps"


def open_maps(folder, labeled=True, unlabeled=True):
    return datasets.open_pseudo_labels(folder / "maps", *open_folder(folder), labeled, unlabeled)


def test_pseudo_labels_are_those_of_the_files(folder, maps, capsys):
    opened = open_maps(folder)
    assert capsys.readouterr().out == f"{maps}: pseudo labels of 2 of 8 labeled and 1 of 2 unlabeled images\n"
    assert [*opened.masks] == ["im00", "im03", "im08"]
    assert all(np.array_equal(opened.mask(name), np.asarray(Image.open(path))) for name, path in opened.masks.items())
    assert [*open_maps(folder, labeled=False).masks] == ["im08"]
    hash = opened.hash
    shutil.copy(maps / "im00.png", maps / "other.png")  # of no image that is used
    assert open_maps(folder).hash == hash
    (maps / "im00.png").rename(maps / "im01.png")
    assert open_maps(folder).hash != hash
    (maps / "im01.png").rename(maps / "im00.png")
    mask = np.array(opened.mask("im00"))
    mask[3, 3] = 2 - mask[3, 3] % 3
    save_mask(maps / "im00.png", mask)
    assert open_maps(folder).hash != hash


def test_pseudo_labels_of_cityscapes_are_class_indices(tmp_path, monkeypatch):
    """And never its label ids, from which its masks are converted."""
    for split in ("train", "val"):
        save_mask(tmp_path / f"gtFine/{split}/a/a_{split}_gtFine_labelIds.png", np.full((4, 6), 7))
        save_jpeg(tmp_path / f"leftImg8bit/{split}/a/a_{split}_leftImg8bit.png", np.random.default_rng(0))
    save_mask(tmp_path / "maps" / "a_train_leftImg8bit.png", np.full((40, 56), 7))  # as predict.py names it
    opened = datasets.PseudoLabels(tmp_path / "maps", datasets.Cityscapes(tmp_path), ["a_train"])
    assert (opened.mask("a_train") == 7).all()


def bad_folder_missing(maps):
    shutil.rmtree(maps)
    return "--pseudo-labels .*maps: no such folder"


def bad_no_file(maps):
    for path in maps.iterdir():
        path.rename(path.with_name(f"{path.stem}_pred.png"))
    return "--pseudo-labels .*maps: holds a PNG for no training image that is used; name them as the images, such as im00.png$"


def bad_size(maps):
    save_mask(maps / "im08.png", np.zeros((20, 28)))
    return "maps/im08.png: is 28x20, its image 56x40; image and mask must have the same size"


def bad_label(maps):
    save_mask(maps / "im03.png", np.full((40, 56), 17))
    fix = "write the indices of these classes, and 255 for all else$"
    return f"maps/im03.png: holds label 17, but the 3 classes of the data set are 0 to 2, and 255 is ignored; {fix}"


def bad_colours(maps):
    rgb(np.zeros((40, 56), np.uint8)).save(maps / "im03.png")
    return "maps/im03.png: has the mode RGB, but a mask holds one class index .* prepare.py masks --masks .*maps-original "


def bad_file(maps):
    (maps / "im08.png").write_bytes(b"junk")
    return r"maps/im08.png: cannot be read as a PNG mask \(UnidentifiedImageError"


def bad_twins(maps):
    shutil.copy(maps / "im03.png", maps / "im03.PNG")
    return "maps/im03.png: has the name of im03.PNG, beside it"


def bad_folder_as_file(maps):
    (maps / "im08.png").unlink()
    (maps / "im08.png").mkdir()
    return r"maps/im08.png: cannot be read \(Is a directory\)"


def bad_nothing(maps):
    for path in maps.iterdir():
        save_mask(path, np.full((40, 56), 255))
    return "maps: the maps hold only 255, which is ignored; give maps that show classes"


def bad_palettes(maps):
    """The masks have another order of colours."""
    rewrite(maps.parent, lambda mask: indexed(np.minimum(mask, 2), (0, 1, 2)))
    for path in maps.iterdir():
        indexed(np.minimum(np.asarray(Image.open(path)), 2), (0, 2, 1)).save(path)
    return "maps/im00.png: its palette gives the colour .* but .*masks/im00.png to index .* --masks .*maps-original "


def bad_palette_file(maps):
    write_lines(maps.parent / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    indexed(np.minimum(np.asarray(Image.open(maps / "im08.png")), 2), (0, 2, 1)).save(maps / "im08.png")
    return "maps/im08.png: its palette gives the colour .* but .*palette.txt to index .* --palette .*palette.txt$"


BAD_MAPS = [value for name, value in globals().items() if name.startswith("bad_")]


@pytest.mark.parametrize("spoil", BAD_MAPS, ids=lambda f: f.__name__)
def test_wrong_pseudo_labels_are_refused_before_training(folder, maps, spoil):
    expected = spoil(maps)
    with pytest.raises(UserError, match=expected) as error:
        open_maps(folder)
    assert "\n" not in str(error.value)


def test_palettes_of_predictions_are_no_fault(folder, maps):
    """predict.py writes the data set's colours, which need not be those of the masks; maps without colours are fine too."""
    rewrite(folder, lambda mask: with_palette(mask, readers.colour_table(COLOURS).ravel().tolist()))
    colours = readers.colour_table(datasets.Folder(folder).palette).ravel().tolist()
    assert colours[3:6] != COLOURS[1].tolist()
    with_palette(np.asarray(Image.open(maps / "im00.png")), colours).save(maps / "im00.png")
    assert len(open_maps(folder).masks) == 3


# ---- what must pass ----


def fine_voc_palettes(root):
    """As VOC's masks: 256 colours, of which few occur, and 255 ignored."""
    palette = [channel for colour in readers.voc_palette(256) for channel in colour]
    rewrite(root, lambda mask: with_palette(mask, palette))


def with_palette(mask, palette):
    image = Image.fromarray(mask)
    image.putpalette(palette)
    return image


def fine_some_files_without_palettes(root):
    rewrite(root, lambda mask: with_palette(mask, readers.colour_table(COLOURS).ravel().tolist()), ["im00", "im10"])


def fine_unused_entries_differ(root):
    """The palettes order colours differently where no index occurs."""
    blocks(root)
    rewrite(root, lambda mask: indexed(mask, (0, 1, 2)))
    swapped = np.vstack([COLOURS, [(9, 9, 9), (200, 0, 0)]])
    rewrite(root, lambda mask: with_palette(mask, swapped.ravel().tolist()), ["im03"])
    other = np.vstack([COLOURS, [(200, 0, 0), (9, 9, 9)]])
    rewrite(root, lambda mask: with_palette(mask, other.ravel().tolist()), ["im04"])


def fine_one_colour_twice_in_all_palettes(root):
    """As where somebody gave colours to some classes only."""
    rewrite(root, lambda mask: with_palette(mask, [0, 0, 0, 128, 0, 0, 0, 0, 0] + [0] * 759))
    rewrite(root, lambda mask: with_palette(np.minimum(mask, 1), [0, 0, 0, 128, 0, 0, 0, 0, 0] + [0] * 759), ["im03"])


def fine_grey_ramps(root):
    """Pillow's palette by default; white is a class's colour in palette.txt and 255 in the masks."""
    write_lines(root / "palette.txt", ["0 0 0", "255 255 255", "2 2 2"])
    rewrite(root, lambda mask: with_palette(mask, np.repeat(np.arange(256), 3).tolist()))


def fine_palette_file_agrees(root):
    fault_background_is_not_black(root)
    write_lines(root / "palette.txt", [" ".join(map(str, COLOURS[i])) for i in (1, 2, 0)])


def fine_palette_file_beside_new_colours_of_right_indices(root):
    write_lines(root / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    rewrite(root, lambda mask: with_palette(mask, readers.colour_table(COLOURS).ravel().tolist()))
    rewrite(root, lambda mask: with_palette(mask, readers.colour_table(COLOURS + 9).ravel().tolist()), ["im03"])


def fine_a_label_that_val_does_not_show(root):
    (root / "classes.txt").unlink()
    rewrite(root, lambda mask: np.where(mask == 1, 2, mask), ["im10", "im11", "im12"])  # training shows 1


def fine_few_bits(root):
    """Masks of 1 bit, as labels 0 and 1."""
    rewrite(root, lambda mask: Image.fromarray(mask == 1))
    write_lines(root / "classes.txt", ["background", "object"])


def fine_resource_forks(root):
    """What zip files from macOS hold beside each file."""
    for path in [*(root / "images").iterdir(), *masks_of(root)]:
        (path.parent / f"._{path.name}").write_bytes(b"junk")
    (root / "masks" / "._im00.jpg").write_bytes(b"junk")


FINE = [value for name, value in globals().items() if name.startswith("fine_")]


@pytest.mark.parametrize("change", FINE, ids=lambda f: f.__name__)
def test_masks_whose_palettes_do_not_contradict_the_labels_pass(script, folder, change):
    change(folder)
    code, out = check(script, folder)
    assert code == 0 and "no problem found" in out and "no image" not in out, out
    open_folder(folder)
    dataset = datasets.Folder(folder)
    checks.refuse_faults(dataset, {"val": dataset.val})  # as evaluate.py


# ---- the commands that messages name ----


def wrong_label(root):
    rewrite(root, lambda mask: np.where(np.indices(mask.shape).sum(0) == 9, 7, mask), ["im03"])


def wrong_rgb(root):
    rewrite(root, rgb)


def wrong_rgb_with_palette(root):
    rewrite(root, lambda mask: rgb(mask).convert("RGBA"))
    write_lines(root / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])


def wrong_grey_rgb(root):
    rewrite(root, lambda mask: Image.fromarray(mask).convert("RGB"))


def wrong_rgb_with_border(root):
    rewrite(root, lambda mask: Image.fromarray(np.vstack([COLOURS, [readers.VOC_BORDER]]).astype(np.uint8)[edged(mask, 3)]))


def edged(mask, value):
    out = mask.copy()
    out[0, :9] = value
    return out


def wrong_one_based(root):
    rewrite(root, lambda mask: edged(mask + 1, 255))


def wrong_one_based_and_unlabeled(root):
    rewrite(root, lambda mask: edged(mask + 1, 0))


def wrong_one_based_without_names(root):
    rewrite(root, lambda mask: edged(mask + 1, 255))
    (root / "classes.txt").unlink()


def wrong_binary_rgb(root):
    rewrite(root, lambda mask: Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).convert("RGB"))
    write_lines(root / "classes.txt", ["background", "object"])


def wrong_levels(root):
    rewrite(root, lambda mask: np.array([0, 128, 255])[mask])


def wrong_jpeg(root):
    for path in masks_of(root):
        Image.fromarray(np.array([0, 255, 0], np.uint8)[np.asarray(Image.open(path))]).save(path.with_suffix(".jpg"))
        path.unlink()
    write_lines(root / "classes.txt", ["background", "object"])


def wrong_artefacts(root):
    """JPEGs saved as PNG."""
    wrong_jpeg(root)
    for path in masks_of(root):
        Image.open(path).save(path.with_suffix(".png"))
        path.unlink()


def wrong_endings(root):
    for path in masks_of(root):
        path.rename(path.with_name(f"{path.stem}_mask.png"))


def wrong_gap(root):
    fault_gap(root)


def wrong_edges(root):
    fault_soft_edges(root)


def wrong_values_of_two(root):
    fault_binary(root)


def wrong_palette_order(root):
    fault_palette_file(root)


WRONG = [value for name, value in globals().items() if name.startswith("wrong_")]

ANSWERS = {"0,0,0": "road", "128,64,128": "tree", "0,128,0": "car", "0": "road", "128": "tree", "255": "car"}  # CLASS


@pytest.mark.parametrize("spoil", WRONG, ids=lambda f: f.__name__)
def test_the_command_that_a_message_names_fixes_the_masks(script, folder, spoil):
    folder = folder.rename(folder.with_name("my data"))  # to be quoted
    blocks(folder)
    old = classes_of(folder)
    spoil(folder)
    (folder / "masks-original").mkdir()  # the name is taken
    with pytest.raises(UserError) as error:
        open_folder(folder)
    words = shlex.split(str(error.value)[str(error.value).index("rename ") :])
    assert words[0] == "rename" and words[2] == "to" and words[4:8] == ["and", "run:", "python", "prepare.py"]
    assert not pathlib.Path(words[3]).exists()
    pathlib.Path(words[1]).rename(words[3])
    pairs = [word.partition("=") for word in words[8:]]
    if "CLASS" in words[-1]:
        assert "replace each CLASS below by a class, or by ignore" in str(error.value)
        assert "give VALUE=NAME or" in errors(script, prepare, *words[8:])
    code, out, err = script(
        prepare, *(f"{key}={ANSWERS[key]}" if name == "CLASS" else key + e + name for key, e, name in pairs)
    )
    assert code == 0, out + err
    code, out = check(script, folder)
    assert code == 0 and open_folder(folder), out
    for name, mask in classes_of(folder).items():  # the classes are the right ones
        assert max((mask == old[name]).mean(), (mask == (old[name] == 1)).mean()) > 0.97, name


@pytest.mark.parametrize("spoil", [*FAULTS, *WRONG], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["plain", "my (own) data; it's"])
def test_every_command_of_a_message_can_be_pasted(script, folder, spoil, name):
    folder = folder.rename(folder.with_name(name))
    blocks(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        open_folder(folder)
    for command in re.findall("python prepare.py .*", str(error.value)):
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0
        words = shlex.split(command)
        pathlib.Path(words[6]).rename(words[4])
        code, out, err = script(prepare, *words[2:])
        if "=CLASS" in command or "into " in str(error.value):  # what is to be done before
            assert code == 2 and ("give VALUE=NAME" in err or "palette.txt: no such file" in err)
        else:
            assert code == 0, out + err


def test_white_levels_without_names_may_be_a_class_or_ignored(folder):
    (folder / "classes.txt").unlink()
    rewrite(folder, lambda mask: np.array([0, 100, 200, *[255] * 253])[mask])
    with pytest.raises(UserError, match=r"replace each CLASS below by .* --values 0=0 100=1 200=2 255=CLASS$"):
        open_folder(folder)


@pytest.mark.parametrize("label", [3, 7])
def test_a_label_without_a_class_may_be_a_class_that_was_not_named(folder, label):
    rewrite(folder, lambda mask: np.where(np.indices(mask.shape).sum(0) == 9, label, mask), ["im03"])
    with pytest.raises(UserError, match=f"holds label {label}, .*if it is a class, name it in classes.txt; if .* run: "):
        open_folder(folder)


def test_labels_that_val_does_not_show_name_classes_txt(folder):
    (folder / "classes.txt").unlink()
    rewrite(folder, lambda mask: np.where(mask == 2, 3, mask), ["im03"])
    with pytest.raises(UserError, match=r"im03.png: holds label 3, but val's masks hold none above 2 and .* no classes.txt"):
        open_folder(folder)
