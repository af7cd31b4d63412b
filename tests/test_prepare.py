import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import unicodedata

import numpy as np
import pytest
import torch
from conftest import errors, save_mask, write_lines
from PIL import Image, ImageFilter

import checks
import datasets
import evaluate
import models
import prepare
import readers
from common import UserError

COLOURS = np.array([(0, 0, 0), (128, 64, 128), (0, 128, 0)], np.uint8)  # of the three classes


def masks_of(root):
    return sorted((root / "masks").iterdir())


def rewrite(root, change, names=None):
    """Replace masks (of `names`, or all) by change(array)."""
    for path in masks_of(root):
        if names is None or path.stem in names:
            result = change(np.asarray(Image.open(path)))
            (result if isinstance(result, Image.Image) else Image.fromarray(result.astype(np.uint8))).save(path)


def blocks(root):
    """Masks as people draw them: two rectangles on a background, at another place in each."""
    for i, path in enumerate(masks_of(root)):
        mask = np.zeros((40, 56), np.uint8)
        mask[4 : 20 + i, 6:30] = 1
        mask[25:38, 20 + i : 50] = 2
        save_mask(path, mask)


def indexed(mask, order, palette=None):
    """A palette image of the classes `mask`, in which class order[i] has index i; its palette shows the same colours."""
    image = Image.fromarray(np.argsort(order)[mask].astype(np.uint8))
    image.putpalette((COLOURS[list(order)] if palette is None else np.array(palette)).ravel().tolist())
    return image


def training(root, **more):
    args = {"dataset": "folder", "data": root, "part": "1", "cache": None, "labeled_list": None, "unlabeled_list": None}
    return datasets.open_training_data(argparse.Namespace(**{**args, **more}), unlabeled=True)


def check(script, root, *more):
    code, out, err = script(prepare, "check", "--dataset", "folder", "--data", root, "--part", "1", *more)
    assert "Traceback" not in err
    return code, out


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
        training(folder)
    assert str(error.value) == problems[0]


def test_a_file_with_the_palette_of_palette_txt_does_not_excuse_another(folder):
    write_lines(folder / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    dataset = datasets.Folder(folder)
    right, wrong = (COLOURS[list(order)].tobytes() for order in ((0, 1, 2), (0, 2, 1)))
    assert checks.palette_clash(dataset, {right: {0: "a.png"}}) is None
    assert "b.png: its palette gives" in checks.palette_clash(dataset, {right: {0: "a.png"}, wrong: {1: "b.png"}})


def test_a_command_for_binary_masks_is_named_only_where_all_masks_are_such(folder):
    def message():
        with pytest.raises(UserError) as error:
            training(folder)
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
    training(folder)
    dataset = datasets.Folder(folder)
    checks.refuse_faults(dataset, {"val": dataset.val})  # as evaluate.py


@pytest.mark.parametrize("bits,scale", [(2, 85), (4, 17)])
def test_grey_masks_of_few_bits_hold_their_labels(folder, bits, scale):
    """Pillow stretches them to 0..255; written by hand, since Pillow writes no such file."""
    import struct
    import zlib

    mask = np.random.default_rng(0).integers(0, 3, (40, 56), np.uint8)
    per_byte = 8 // bits
    rows = sum(mask[:, i::per_byte].astype(np.uint8) << (8 - bits * (i + 1)) for i in range(per_byte)).astype(np.uint8)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 56, 40, bits, 0, 0, 0, 0)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    (folder / "masks" / "im00.png").write_bytes(png)
    assert np.asarray(Image.open(folder / "masks" / "im00.png")).max() == 2 * scale
    assert np.array_equal(datasets.Folder(folder).mask("im00"), mask)


def test_masks_without_an_image_are_named(script, folder):
    for name in ("nowhere", "elsewhere"):
        save_mask(folder / "masks" / f"{name}.png", np.zeros((9, 9)))
    code, out = check(script, folder)
    assert code == 0 and re.search(r"warning: 2 mask\(s\) have no image: .*elsewhere.png, .*nowhere.png", out)


def test_labels_that_val_does_not_show_name_classes_txt(folder):
    (folder / "classes.txt").unlink()
    rewrite(folder, lambda mask: np.where(mask == 2, 3, mask), ["im03"])
    with pytest.raises(UserError, match=r"im03.png: holds label 3, but val's masks hold none above 2 and .* no classes.txt"):
        training(folder)


# ---- one name in two Unicode forms ----


def test_names_in_two_unicode_forms_are_one(script, folder):
    nfc, nfd = (unicodedata.normalize(form, "caf\xe9 \u00fcber") for form in ("NFC", "NFD"))
    before = training(folder)[1]
    assert nfc != nfd
    forms = iter([(nfc, nfd), (nfd, nfc)])
    for old in ("im00", "im10"):  # labeled and val; of each, image and mask have other forms
        image, mask = next(forms)
        (folder / "images" / f"{old}.png").rename(folder / "images" / f"{old} {image}.png")
        (folder / "masks" / f"{old}.png").rename(folder / "masks" / f"{old} {mask}.png")
    (folder / "images" / "im08.png").rename(folder / "images" / f"im08 {nfd}.png")
    hashes = set()
    for form in (nfc, nfd):
        write_lines(folder / "train.txt", [f"im00 {form}", *(f"im{i:02d}" for i in range(1, 8)), "im09"])
        write_lines(folder / "val.txt", [f"images/im10 {form}.png masks/im10 {form}.png", "im11", "im12"])
        write_lines(folder / "unlabeled.txt", [f"im08 {form}"])
        write_lines(folder / "classes.txt", ["road", form, "car"])
        write_lines(folder / "l.txt", [f"im00 {form}"])
        dataset, part = training(folder)
        assert len(part.labeled) == len(before.labeled) and len(part.unlabeled) == len(before.unlabeled)
        assert dataset.classes[1] == nfc and f"im08 {nfc}" in part.unlabeled and f"im10 {nfc}" in dataset.val
        assert training(folder, labeled_list=folder / "l.txt")[1].labeled == [f"im00 {nfc}"]
        hashes.add(part.hash)
    assert len(hashes) == 1
    assert check(script, folder)[0] == 0
    Image.new("RGB", (56, 40)).save(folder / "images" / f"im00 {nfd}.png")  # beside the same name in the other form
    with pytest.raises(UserError, match=r"has the name of .* accents in another Unicode form"):
        training(folder)


# ---- converting masks ----


def classes_of(root):
    return {path.stem: np.asarray(Image.open(path)) for path in masks_of(root)}


def rgb(mask):
    return Image.fromarray(np.vstack([COLOURS, np.zeros((252, 3), np.uint8), [(255, 255, 255)]]).astype(np.uint8)[mask])


def form_binary(root, old):
    rewrite(root, lambda mask: np.where(mask == 1, 255, 0))
    write_lines(root / "classes.txt", ["background", "object"])
    return {name: np.where(mask == 1, 1, 0) for name, mask in old.items()}, []


def form_levels(root, old):
    rewrite(root, lambda mask: np.array([0, 128, 255])[mask])
    return old, ["--values", "0=road", "128=tree", "255=2"]  # by name and by index


def form_one_bit(root, old):
    """White is 255, however few bits a file has."""
    rewrite(root, lambda mask: Image.fromarray(mask == 1))
    return {name: mask == 1 for name, mask in old.items()}, ["--values", "0=0", "255=1"]


def form_grey_in_three_channels(root, old):
    rewrite(root, lambda mask: Image.fromarray(mask).convert("RGB"))
    return old, []


def form_rgb_by_values(root, old):
    rewrite(root, rgb)
    return old, ["--values", "0,0,0=0", "128,64,128=1", "0,128,0=2"]


def form_rgba_by_palette_txt(root, old):
    rewrite(root, lambda mask: rgb(mask).convert("RGBA"))
    write_lines(root / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    return old, []


def form_permuted_palettes(root, old):
    for i, path in enumerate(masks_of(root)):
        indexed(np.asarray(Image.open(path)), [(0, 1, 2), (2, 0, 1), (1, 2, 0)][i % 3]).save(path)
    write_lines(root / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    return old, []


def form_cvat(root, old):
    """labelmap.txt names the classes in another order than classes.txt, and one that is none."""
    rewrite(root, rgb)
    lines = ["# label:color_rgb:parts:actions", "car:0,128,0::", "road:0,0,0::", "tree:128,64,128::", "background:9,9,9::"]
    write_lines(root / "labelmap.txt", lines)
    return old, ["--palette", root / "labelmap.txt", "--ignore", "background"]


def form_camvid(root, old):
    rewrite(root, rgb)
    for path in masks_of(root):
        path.rename(path.with_name(f"{path.stem}_L.png"))
    write_lines(root / "label_colors.txt", ["0 0 0\troad", "128 64 128\ttree", "0 128 0\t\tcar", "255 255 255\tVoid"])
    return old, ["--palette", root / "label_colors.txt", "--ignore", "Void"]


def form_jpeg(root, old):
    for path in masks_of(root):
        rgb(np.asarray(Image.open(path))).save(path.with_suffix(".jpg"), quality=95, subsampling=0)
        path.unlink()
    write_lines(root / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    return old, ["--unknown", "nearest"]


def form_suffixes(root, old):
    for i, path in enumerate(masks_of(root)):
        folder = path.parent / ("a" if i % 2 else "b")
        folder.mkdir(exist_ok=True)
        path.rename(folder / f"{path.stem}{['_mask', '_L', '.png', '_labelIds', '-seg'][i % 5]}.png")
    return old, []


def form_one_of_two_kinds(root, old):
    for path in masks_of(root):
        shutil.copy(path, path.with_name(f"{path.stem}_color.png"))
        path.rename(path.with_name(f"{path.stem}_index.png"))
    return old, ["--suffix", "_index"]


def form_voc(root, old):
    table = np.array([*readers.voc_palette(21), *[(0, 0, 0)] * 234, readers.VOC_BORDER], np.uint8)
    rewrite(root, lambda mask: Image.fromarray(table[np.where(mask == 2, 255, mask)]))
    write_lines(root / "classes.txt", datasets.VOC_CLASSES)
    return {name: np.where(mask == 2, 255, mask) for name, mask in old.items()}, ["--palette", "voc"]


FORMS = [value for name, value in globals().items() if name.startswith("form_")]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_masks_of_other_forms_become_class_indices(script, folder, form):
    blocks(folder)
    expected, flags = form(folder, classes_of(folder))
    if form is form_binary:
        flags = ["--values", "0=0", "255=1"]
    source = folder / "masks-original"
    (folder / "masks").rename(source)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    arguments = ["masks", "--masks", source, "--out", folder / "masks", *flags]
    code, out, err = script(prepare, *arguments)
    assert code == 0, out + err
    written = classes_of(folder)
    assert written.keys() == expected.keys()
    for name, mask in expected.items():
        assert (written[name] == mask).mean() > (0.97 if form is form_jpeg else 1 - 1e-9), name
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    code, out = check(script, folder)
    assert code == 0, out
    assert script(prepare, *arguments)[0] == 0  # again: what this command wrote is replaced


def test_classes_and_palette_are_written_where_there_are_none(script, folder):
    blocks(folder)
    old = classes_of(folder)
    rewrite(folder, rgb)
    (folder / "classes.txt").unlink()
    (folder / "masks").rename(folder / "export")
    write_lines(folder / "export" / "labelmap.txt", ["road:0,0,0::", "tree:128,64,128::", "car:0,128,0::"])  # found by itself
    assert script(prepare, "masks", "--masks", folder / "export", "--out", folder / "masks")[0] == 0
    dataset = datasets.Folder(folder)
    assert dataset.classes == ["road", "tree", "car"] and dataset.palette == [tuple(c) for c in COLOURS.tolist()]
    assert all(np.array_equal(dataset.mask(name), mask) for name, mask in old.items())
    assert check(script, folder)[0] == 0


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_masks_of_indices_need_no_classes_txt_and_get_none(script, folder, mode):
    """Names then come from val's labels, with the looks for gaps and for levels of grey."""
    old = classes_of(folder)
    rewrite(folder, lambda mask: Image.fromarray(mask).convert(mode))
    (folder / "classes.txt").unlink()
    (folder / "masks").rename(folder / "old")
    arguments = ["masks", "--masks", folder / "old", "--out", folder / "masks"]
    assert script(prepare, *arguments)[0] == 0 and not (folder / "classes.txt").exists()
    assert all(np.array_equal(old[name], mask) for name, mask in classes_of(folder).items())
    assert len(training(folder)[0].classes) == 3
    for path in (folder / "old").iterdir():
        Image.fromarray(np.array([0, 1, 3, *[255] * 253], np.uint8)[old[path.stem]]).convert(mode).save(path)
    assert script(prepare, *arguments)[0] == 0
    with pytest.raises(UserError, match="hold the labels 0, 1, 3 but not 2"):
        training(folder)


def test_a_folder_by_itself_needs_no_images(script, tmp_path):
    for i, ending in enumerate(["_mask", "_L", "_gtFine_labelIds", ""]):
        save_mask(tmp_path / "m" / f"p{i}{ending}.png", np.array([[0, 255]]))
    code, _, err = script(prepare, "masks", "--masks", tmp_path / "m", "--out", tmp_path / "o", "--values", "0=0", "255=1")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["p0.png", "p1.png", "p2.png", "p3.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "o"]  # nothing beside a folder of another name


def test_unknown_colours_are_counted_and_nothing_is_written(script, folder):
    blocks(folder)
    rewrite(folder, rgb)
    odd = np.asarray(Image.open(folder / "masks" / "im03.png")).copy()
    odd[0, :5] = (0, 120, 10)
    Image.fromarray(odd).save(folder / "masks" / "im03.png")
    (folder / "masks").rename(folder / "colours")
    write_lines(folder / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    arguments = ["masks", "--masks", folder / "colours", "--out", folder / "masks"]
    code, out, _ = script(prepare, *arguments)
    assert code == 1 and not (folder / "masks").exists()
    assert re.search(r"0,120,10 +5 pixels, nearest 0,128,0 \(car\), first in .*im03.png", out) and "--unknown ignore" in out
    for flag, label in (("ignore", 255), ("nearest", 2)):
        assert script(prepare, *arguments, "--unknown", flag)[0] == 0
        assert (classes_of(folder)["im03"][0, :5] == label).all()


def test_soft_edges_are_called_so(script, folder):
    blocks(folder)
    old = classes_of(folder)
    soft = ImageFilter.GaussianBlur(1)
    rewrite(folder, lambda mask: Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).filter(soft))
    write_lines(folder / "classes.txt", ["background", "object"])
    (folder / "masks").rename(folder / "soft")
    arguments = ["masks", "--masks", folder / "soft", "--out", folder / "masks", "--values", "0=background", "255=object"]
    code, out, _ = script(prepare, *arguments)
    assert code == 1 and "anti-aliased" in out and "--unknown nearest" in out
    assert script(prepare, *arguments, "--unknown", "nearest")[0] == 0
    assert all(((mask == 1) == classes_of(folder)[name]).mean() > 0.97 for name, mask in old.items())


@pytest.mark.parametrize("kind", [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR], ids=str)
@pytest.mark.parametrize("scale", [0.5, 1.4, 2])
def test_resized_colours_are_called_soft_edges(script, folder, kind, scale):
    """Some filters overshoot the colours of the classes."""
    blocks(folder)
    rewrite(folder, lambda mask: rgb(mask).resize((round(56 * scale), round(40 * scale)), kind))
    write_lines(folder / "palette.txt", [" ".join(map(str, colour)) for colour in COLOURS])
    code, out, _ = script(prepare, "masks", "--masks", folder / "masks", "--out", folder / "new" / "masks", "--palette",
                          folder / "palette.txt", "--images", folder / "images")  # fmt: skip
    assert code == 1 and "anti-aliased" in out, out


def test_what_is_unknown_is_added_where_the_rest_stands(script, folder):
    (folder / "masks").rename(folder / "old")
    arguments = ["masks", "--masks", folder / "old", "--out", folder / "masks"]
    code, out, _ = script(prepare, *arguments, "--values", "0=0", "1=1", "255=255")
    assert code == 1 and "1 value belongs to no class" in out and "add what is missing to --values" in out
    write_lines(folder / "classes.txt", ["road", "tree"])
    code, out, _ = script(prepare, *arguments)
    assert code == 1 and "1 value belongs to no class" in out and "add what is missing to classes.txt" in out
    for path in (folder / "old").iterdir():
        rgb(np.asarray(Image.open(path))).save(path)
    code, out, _ = script(prepare, *arguments, "--values", "0,0,0=0", "128,64,128=1")
    assert code == 1 and "2 colours belong to no class" in out and "add what is missing to --values" in out
    write_lines(folder / "palette.txt", ["0 0 0", "128 64 128"])
    code, out, _ = script(prepare, *arguments)
    assert code == 1 and "add what is missing to the palette" in out


def test_masks_that_somebody_else_wrote_are_kept(script, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.copytree(folder / "masks", folder / "source")
    arguments = ["masks", "--masks", folder / "source", "--out", folder / "masks", "--values", "0=2", "1=1", "2=0", "255=255"]
    code, _, err = script(prepare, *arguments)
    assert code == 2 and "im00.png exists and was not written by this command" in err and "--overwrite" in err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert script(prepare, *arguments, "--overwrite")[0] == 0
    prediction = Image.open(folder / "masks" / "im00.png")
    from result_files import is_ours, save_png

    assert not is_ours(folder / "masks" / "im00.png")  # so that no prediction replaces it
    save_png(folder / "masks" / "im00.png", prediction)
    assert "im00.png exists" in script(prepare, *arguments)[2]  # nor it a prediction


@pytest.mark.parametrize("out", [".", "..", "inside", "../masks"])
def test_the_input_is_never_the_output(script, folder, out):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, _, err = script(prepare, "masks", "--masks", folder / "masks", "--out", folder / "masks" / out, "--overwrite")
    assert code == 2 and "--out" in err and "must not change" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--masks", "nowhere"], "--masks nowhere: no such folder"),
        (["--values", "0"], "--values 0: give VALUE=NAME"),
        (["--values", "0=0", "255"], "--values 255: give VALUE=NAME"),
        (["--values", "0=0", "0=1"], "gives 0 two classes"),
        (["--values", "0=0", "1,1,1=1"], "either values or colours"),
        (["--values", "0=0", "1=bike"], "classes.txt: names no class 'bike'.*--ignore 'bike'"),
        (["--values", "0=0", "1=3"], "classes.txt: names no class '3'"),
        (["--values", "0=0", "1=1", "--palette", "voc"], "give one of the two"),
        (["--palette", "nowhere.txt"], "nowhere.txt: no such file; write one colour 'R G B' per line"),
        (["--values", "0=0", "1=CLASS"], "--values 1=CLASS: give VALUE=NAME or R,G,B=NAME"),
        (["--values", "0=0", "1=255255255"], "2 to 255 classes are possible"),
        (["--values", "0=0", "1=" + "9" * 5000], "2 to 255 classes are possible"),
        (["--values", "0=0", "65536=1"], "--values 65536=1: give VALUE=NAME"),
        (["--ignore", "bike"], "--ignore bike: no such class"),
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--suffix", "_x"], "holds no mask of an image.*--suffix"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_wrong_flags_are_one_line(script, folder, flags, expected):
    source = [] if "--masks" in flags else ["--masks", folder / "masks"]
    code, _, err = script(prepare, "masks", *source, "--out", folder / "new" / "masks", *flags)
    if expected.startswith("classes.txt"):
        shutil.copy(folder / "classes.txt", folder / "new.txt")
        (folder / "new").mkdir(exist_ok=True)
        (folder / "new.txt").rename(folder / "new" / "classes.txt")
        shutil.rmtree(folder / "new" / "masks", ignore_errors=True)
        code, _, err = script(prepare, "masks", *source, "--out", folder / "new" / "masks", *flags)
    assert code == 2 and re.search(expected, err) and len(err.strip().splitlines()) == 1, err
    assert not (folder / "new" / "masks").exists()


def test_transparency_alone_is_no_mask(script, folder):
    blocks(folder)
    white = Image.new("L", (56, 40), 255)
    rewrite(folder, lambda mask: Image.merge("LA", [white, Image.fromarray((mask == 1).astype(np.uint8) * 255)]))
    (folder / "masks").rename(folder / "source")
    arguments = ["masks", "--masks", folder / "source", "--out", folder / "masks"]
    for flags in ([], ["--values", "0=0", "255=1"], ["--values", "0,0,0=0", "255,255,255=1"]):
        code, _, err = script(prepare, *arguments, *flags)
        assert code == 2 and "im00.png: has one colour and shows its classes by transparency" in err


def test_two_masks_of_one_image_are_named(script, folder):
    shutil.copytree(folder / "masks", folder / "source")
    shutil.copy(folder / "source" / "im00.png", folder / "source" / "im00_color.png")
    arguments = ["--masks", folder / "source", "--out", folder / "new", "--images", folder / "images"]
    code, _, err = script(prepare, "masks", *arguments)
    assert code == 2 and re.search("im00_color.png: is a mask of 'im00', and so is .*im00.png; .*--suffix '_color'", err)


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
        training(folder)
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
    assert code == 0 and training(folder), out
    for name, mask in classes_of(folder).items():  # the classes are the right ones
        assert max((mask == old[name]).mean(), (mask == (old[name] == 1)).mean()) > 0.97, name


@pytest.mark.parametrize("spoil", [*FAULTS, *WRONG], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["plain", "my (own) data; it's"])
def test_every_command_of_a_message_can_be_pasted(script, folder, spoil, name):
    folder = folder.rename(folder.with_name(name))
    blocks(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        training(folder)
    for command in re.findall("python prepare.py .*", str(error.value)):
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0
        words = shlex.split(command)
        pathlib.Path(words[6]).rename(words[4])
        code, out, err = script(prepare, *words[2:])
        if "=CLASS" in command or "into " in str(error.value):  # what is to be done before
            assert code == 2 and ("give VALUE=NAME" in err or "palette.txt: no such file" in err)
        else:
            assert code == 0, out + err


def test_colours_are_given_to_classes_by_people_alone(script, folder):
    """Only two colours without names become the indices in their order."""
    path = folder / "masks" / "im00.png"
    colours = np.array([(9, 9, 9), (128, 64, 8), (0, 120, 0)], np.uint8)

    def flags(count):
        Image.fromarray(colours[np.arange(40 * 56).reshape(40, 56) % count]).save(path)
        return readers.flags_for_file(path)

    named = "--values 9,9,9=CLASS 128,64,8=CLASS"
    assert flags(2) == named and flags(3) == "--values 0,120,0=CLASS 9,9,9=CLASS 128,64,8=CLASS"
    (folder / "classes.txt").unlink()
    assert flags(2) == "--values 9,9,9=0 128,64,8=1" and flags(3) == "--values 0,120,0=CLASS 9,9,9=CLASS 128,64,8=CLASS"
    (folder / "old").mkdir()
    path.rename(folder / "old" / "im00.png")
    arguments = ["--masks", folder / "old", "--out", folder / "masks", "--overwrite"]
    assert "--values 0,120,0=CLASS 9,9,9=CLASS 128,64,8=CLASS" in errors(script, prepare, "masks", *arguments)


def test_white_levels_without_names_may_be_a_class_or_ignored(folder):
    (folder / "classes.txt").unlink()
    rewrite(folder, lambda mask: np.array([0, 100, 200, *[255] * 253])[mask])
    with pytest.raises(UserError, match=r"replace each CLASS below by .* --values 0=0 100=1 200=2 255=CLASS$"):
        training(folder)


@pytest.mark.parametrize("label", [3, 7])
def test_a_label_without_a_class_may_be_a_class_that_was_not_named(folder, label):
    rewrite(folder, lambda mask: np.where(np.indices(mask.shape).sum(0) == 9, label, mask), ["im03"])
    with pytest.raises(UserError, match=f"holds label {label}, .*if it is a class, name it in classes.txt; if .* run: "):
        training(folder)


def test_check_lists_labels_that_occur_and_problems_of_a_kind_once(script, folder):
    def rows(out):
        return re.findall(r"^ *\d+ class (\d+) ", out, re.MULTILINE)

    (folder / "classes.txt").unlink()
    rewrite(folder, lambda mask: np.where(mask == 2, 200, mask))
    code, out = check(script, folder)
    assert code == 1 and rows(out) == ["0", "1", "200"] and "image shows" not in out
    write_lines(folder / "classes.txt", ["road", "tree", "car"])
    rewrite(folder, lambda mask: np.where(mask == 200, 20 + mask[5, 5] % 3, mask), [f"im{i:02d}" for i in range(8)])
    code, out = check(script, folder)
    assert code == 1 and out.count("problem: ") == 1 and out.count("\n    and 10 more with the same problem\n") == 1
    assert "no labeled image shows" not in out and "11 problem(s)" in out


# ---- pictures ----


@pytest.mark.parametrize("size", [(1, 700), (700, 1), (1, 1), (3, 5000)], ids=str)
def test_pictures_of_any_size(script, folder, size):
    rng = np.random.default_rng(0)
    for path in (folder / "images").iterdir():
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        if (folder / "masks" / path.name).exists():
            save_mask(folder / "masks" / path.name, rng.integers(0, 3, size))
    _, out = check(script, folder, "--picture", folder / "p.png", "--chart", folder / "c.png")
    sheet = Image.open(folder / "p.png")
    assert "picture: " in out and max(sheet.size) <= 8 * 240 and Image.open(folder / "c.png").size


@pytest.mark.slow
def test_charts_of_many_classes_and_odd_names(script, folder):
    names = ["$\\frac{1}{", "\u9053\u8def", "\u0637\u0631\u064a\u0642", "x" * 200, *(f"class {i}" for i in range(146))]
    write_lines(folder / "classes.txt", names)
    code, out = check(script, folder, "--chart", folder / "c.png")
    assert code == 0 and Image.open(folder / "c.png").height > 150 * 20 and "no val image shows" in out


def test_pictures_replace_nothing_and_fail_before_the_look(script, folder, monkeypatch):
    monkeypatch.setattr(checks, "look_at", None)  # is never reached
    photo = folder / "images" / "im00.png"
    before = photo.read_bytes()
    (folder / "taken").mkdir()
    for flag in ("--picture", "--chart"):
        for path in (photo, folder / "look", folder / "train.txt" / "x.png", folder / "taken.png"):
            (folder / "taken.png").mkdir(exist_ok=True)
            code, _, err = script(prepare, "check", "--dataset", "folder", "--data", folder, "--part", "1", flag, path)
            assert code == 2 and flag in err and len(err.strip().splitlines()) == 1, err
    assert photo.read_bytes() == before


# ---- voc ----


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda voc: (voc / "benchmark_RELEASE/dataset/cls/2010_000007.mat").write_bytes(b"junk"), "7.mat: cannot be read"),
        (lambda voc: shutil.rmtree(voc / "benchmark_RELEASE"), "holds no SBD"),
        (lambda voc: shutil.rmtree(voc / "VOCdevkit"), "holds no VOC2012/JPEGImages"),
        (lambda voc: (voc / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink(), "val.txt: no such file"),
        (lambda voc: (voc / "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png").unlink(), "2007_000001.png: no such mask"),
    ],
    ids=["mat", "sbd", "voc", "list", "mask"],
)
def test_preparation_names_missing_files(script, voc, change, expected):
    change(voc)
    code, _, err = script(prepare, "voc", "--data", voc)
    assert code == 2 and re.search(expected, err) and len(err.strip().splitlines()) == 1


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


def test_a_list_that_somebody_else_made_is_kept(script, voc):
    listed = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train_aug.txt"
    write_lines(listed, ["2007_000001", "2010_000007"])
    code, _, err = script(prepare, "voc", "--data", voc)
    assert code == 2 and "train_aug.txt: does not list the images of" in err and len(readers.read_lines(listed)) == 2
    assert script(prepare, "voc", "--data", voc, "--overwrite")[0] == 0 and len(readers.read_lines(listed)) == 8
    assert script(prepare, "voc", "--data", voc)[0] == 0


def test_commands_are_named(script):
    code, _, err = script(prepare)
    assert code == 2 and "{masks,split,check,voc}" in err


def test_check_warns_where_no_image_is_unlabeled(script, folder):
    """A training with teachers would be refused."""
    flags = ["check", "--dataset", "folder", "--data", folder]
    code, out, _ = script(prepare, *flags, "--part", "1/4")
    assert code == 0 and "no image is unlabeled" not in out
    (folder / "train.txt").write_text("".join(f"im{i:02d}\n" for i in range(8)))  # those that have masks
    code, out, _ = script(prepare, *flags, "--part", "1")
    assert code == 0 and "warning: no image is unlabeled" in out
