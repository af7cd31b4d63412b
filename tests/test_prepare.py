import re
import shutil

import numpy as np
import pytest
from conftest import COLOURS, blocks, check, classes_of, indexed, masks_of, open_folder, rewrite, rgb, save_mask, write_lines
from PIL import Image, ImageFilter

import checks
import datasets
import prepare
import readers
from common import UserError

# ---- check ----


def test_masks_without_an_image_are_named(script, folder):
    for name in ("nowhere", "elsewhere"):
        save_mask(folder / "masks" / f"{name}.png", np.zeros((9, 9)))
    code, out = check(script, folder)
    assert code == 0 and re.search(r"warning: 2 mask\(s\) have no image: .*elsewhere.png, .*nowhere.png", out)


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


def test_check_warns_where_no_image_is_unlabeled(script, folder):
    """A training with teachers would be refused."""
    flags = ["check", "--dataset", "folder", "--data", folder]
    code, out, _ = script(prepare, *flags, "--part", "1/4")
    assert code == 0 and "no image is unlabeled" not in out
    (folder / "train.txt").write_text("".join(f"im{i:02d}\n" for i in range(8)))  # those that have masks
    code, out, _ = script(prepare, *flags, "--part", "1")
    assert code == 0 and "warning: no image is unlabeled" in out


# ---- converting masks ----


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
    assert len(open_folder(folder)[0].classes) == 3
    for path in (folder / "old").iterdir():
        Image.fromarray(np.array([0, 1, 3, *[255] * 253], np.uint8)[old[path.stem]]).convert(mode).save(path)
    assert script(prepare, *arguments)[0] == 0
    with pytest.raises(UserError, match="hold the labels 0, 1, 3 but not 2"):
        open_folder(folder)


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
        (["--values", "0=0", "1=bike"], "classes.txt: names no class 'bike'.*--ignore bike"),
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
    assert code == 2 and re.search("im00_color.png: is a mask of 'im00', and so is .*im00.png; .*--suffix _color", err)


# ---- pictures of check ----


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


def test_a_list_that_somebody_else_made_is_kept(script, voc):
    listed = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train_aug.txt"
    write_lines(listed, ["2007_000001", "2010_000007"])
    code, _, err = script(prepare, "voc", "--data", voc)
    assert code == 2 and "train_aug.txt: does not list the images of" in err and len(readers.read_lines(listed)) == 2
    assert script(prepare, "voc", "--data", voc, "--overwrite")[0] == 0 and len(readers.read_lines(listed)) == 8
    assert script(prepare, "voc", "--data", voc)[0] == 0


def test_prepare_without_a_command_names_its_commands(script):
    code, _, err = script(prepare)
    assert code == 2 and "{masks,split,check,voc}" in err


@pytest.mark.parametrize("link", ["masks/im00.png", "classes.txt", "palette.txt"])
def test_a_conversion_writes_nothing_behind_a_link(script, folder, tmp_path, link):
    out, outside = tmp_path / "new" / "masks", tmp_path / "outside"
    out.mkdir(parents=True)
    outside.mkdir()
    (out.parent / link).symlink_to(outside / "made")
    arguments = ["--masks", folder / "masks", "--out", out, "--values", "0=a", "1=b", "2=c", "255=ignore", "--overwrite"]
    code, _, err = script(prepare, "masks", *arguments)
    assert not list(outside.iterdir())
    assert (code == 2 and "leads out of that folder by a link" in err) if link.startswith("masks") else code == 0, err
