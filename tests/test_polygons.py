"""Outlines of LabelMe and COCO as masks of class indices."""

import base64
import io
import json
import re

import numpy as np
import pytest
from conftest import errors, save_jpeg, write_lines
from PIL import Image

import polygons
import prepare

SIZE = (56, 40)  # width, height
BOX = [[6, 4], [30, 4], [30, 20], [6, 20]]
INNER = [[10, 8], [20, 8], [20, 16], [10, 16]]


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def labelme(shapes, size=SIZE, **more):
    return {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": "x.jpg", "imageData": None,
            "imageWidth": size[0], "imageHeight": size[1], **more}  # fmt: skip


def flat(points):
    return [coordinate for point in points for coordinate in point]


def coco(annotations, images=None, categories=("road", "car")):
    """`annotations`: (image, category, segmentation), both by their numbers from 1."""
    images = images or [{"id": 1, "file_name": "a.png", "width": SIZE[0], "height": SIZE[1]}]
    return {
        "images": images,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "segmentation": outline, "iscrowd": int("counts" in outline)}
            for i, (image, category, outline) in enumerate(annotations)
        ],
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def images(root, *names, size=SIZE, **more):
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(root / "images" / f"{name}.png", **more)


def convert(script, root, source, *flags):
    """(the lines of classes.txt, {name: mask}, what was printed)"""
    code, out, err = script(prepare, "masks", "--masks", source, "--out", root / "masks", *flags)
    assert code == 0, out + err
    masks = {path.stem: np.asarray(Image.open(path)) for path in (root / "masks").iterdir()}
    return (root / "classes.txt").read_text().split(), masks, out


def refused(script, root, source, *flags):
    said = errors(script, prepare, "masks", "--masks", source, "--out", root / "masks", *flags)
    assert not (root / "masks").exists()
    return said


def rectangle(*boxes):
    """A mask of 0 with (left, top, right, bottom, label), borders included."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    for left, top, right, bottom, label in boxes:
        mask[top : bottom + 1, left : right + 1] = label
    return mask


# ---- drawing ----


def test_labelme_draws_in_the_order_of_the_file(script, tmp_path):
    images(tmp_path, "a", "b", "bare")
    write(tmp_path / "export" / "a.json", labelme([shape("road", BOX), shape("car", INNER)]))
    write(tmp_path / "export" / "b.json", labelme([shape("car", INNER), shape("road", BOX)]))
    classes, masks, out = convert(script, tmp_path, tmp_path / "export")
    assert classes == ["background", "car", "road"] and masks.keys() == {"a", "b"}
    assert np.array_equal(masks["a"], rectangle((6, 4, 30, 20, 2), (10, 8, 20, 16, 1)))
    assert np.array_equal(masks["b"], rectangle((6, 4, 30, 20, 2)))
    assert "next: python prepare.py split --data" in out


def test_coco_draws_the_larger_first(script, tmp_path):
    images(tmp_path, "a")
    parts = [flat(INNER), flat([[40, 30], [50, 30], [50, 36], [40, 36]])]  # one object of two parts
    for annotations in ([(1, 2, parts), (1, 1, [flat(BOX)])], [(1, 1, [flat(BOX)]), (1, 2, parts)]):
        classes, masks, _ = convert(script, tmp_path, write(tmp_path / "coco.json", coco(annotations)))
        assert classes == ["background", "road", "car"]
        assert np.array_equal(masks["a"], rectangle((6, 4, 30, 20, 1), (10, 8, 20, 16, 2), (40, 30, 50, 36, 2)))


def test_the_masks_pass_the_check(script, tmp_path):
    """Of a folder whose images and JSON files lie together."""
    images(tmp_path, "a", "b", "c")
    for name in "ab":
        write(tmp_path / "images" / f"{name}.json", labelme([shape("road", BOX), shape("car", INNER)]))
    convert(script, tmp_path, tmp_path / "images")
    assert script(prepare, "split", "--data", tmp_path)[0] == 0
    code, out, _ = script(prepare, "check", "--dataset", "folder", "--data", tmp_path, "--part", "1")
    assert code == 0 and "1 labeled, 1 unlabeled, 1 val images" in out


@pytest.mark.parametrize(
    "drawn, expected",
    [
        (shape("road", [[30, 20], [6, 4]], "rectangle"), rectangle((6, 4, 30, 20, 1))),
        (shape("road", BOX, "rectangle"), rectangle((6, 4, 30, 20, 1))),
        (shape("road", [[-9, -9], [99, -9], [99, 9], [-9, 9]]), rectangle((0, 0, 55, 9, 1))),  # beyond the image
        (shape("road", [[-1e30, 5], [1e30, 5], [1e30, 9], [-1e30, 9]]), rectangle((0, 5, 55, 9, 1))),
        (shape("road", BOX, None), rectangle((6, 4, 30, 20, 1))),  # of old versions
    ],
    ids=["rectangle", "four corners", "outside", "far outside", "no type"],
)
def test_shapes_of_labelme(script, tmp_path, drawn, expected):
    write(tmp_path / "export" / "a.json", labelme([drawn]))
    assert np.array_equal(convert(script, tmp_path, tmp_path / "export")[1]["a"], expected)


def test_a_circle_has_its_centre_and_its_radius(script, tmp_path):
    write(tmp_path / "export" / "a.json", labelme([shape("road", [[28, 20], [28, 30]], "circle")]))
    mask = convert(script, tmp_path, tmp_path / "export")[1]["a"]
    y, x = np.mgrid[:40, :56]
    distance = np.hypot(x - 28, y - 20)
    assert (mask[distance < 9.3] == 1).all() and (mask[distance > 10.7] == 0).all()


def test_a_mask_of_labelme_lies_where_its_first_point_says(script, tmp_path):
    pixels = np.random.default_rng(0).random((9, 7)) > 0.5
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    code = base64.b64encode(file.getvalue()).decode()
    write(tmp_path / "export" / "a.json", labelme([shape("road", [[5, 6], [11, 14]], "mask", mask=code)]))
    mask = convert(script, tmp_path, tmp_path / "export")[1]["a"]
    assert np.array_equal(mask[6:15, 5:12] == 1, pixels) and mask.sum() == pixels.sum()


def encoded(counts):
    """COCO's compressed run lengths, written from its definition: differences to the number two before, in pieces of 5 bits."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            piece, value = value & 31, value >> 5
            last = value == (-1 if piece & 16 else 0)
            text += chr(48 + piece + 32 * (not last))
            if last:
                break
    return text


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_go_down_the_columns(script, tmp_path, compressed):
    expected = np.random.default_rng(0).random(SIZE[::-1]) > 0.7
    expected[:, 20:40] = True  # long runs, and great differences between them
    column = expected.T.ravel()
    ends = np.flatnonzero(np.diff(column)) + 1
    counts = np.diff([0, *([0] if column[0] else []), *ends, column.size]).tolist()
    runs = {"size": [40, 56], "counts": encoded(counts) if compressed else counts}
    mask = convert(script, tmp_path, write(tmp_path / "coco.json", coco([(1, 1, runs)])))[1]["a"]
    assert np.array_equal(mask == 1, expected)


def test_compressed_run_lengths_of_the_definition():
    """The worked example of the format: 6 is '6', and -1 is one piece with the sign."""
    assert polygons.run_lengths("6") == [6] and polygons.run_lengths("O") == [-1]
    assert polygons.run_lengths(encoded([0, 5, 1000, 3, 70000])) == [0, 5, 1000, 3, 70000]


# ---- sizes ----


def exif(orientation):
    entries = Image.Exif()
    entries[0x0112] = orientation
    return entries


def test_outlines_belong_to_the_upright_image(script, tmp_path):
    images(tmp_path, "a", exif=exif(6))  # stored as 56x40, shown as 40x56
    write(tmp_path / "shown" / "a.json", labelme([shape("road", [[0, 0], [9, 0], [9, 50], [0, 50]])], size=(40, 56)))
    mask = convert(script, tmp_path, tmp_path / "shown")[1]["a"]
    assert mask.shape == (56, 40) and (mask[:51, :10] == 1).all() and mask.sum() == 510
    # of a tool that does not know orientations: the first row as stored is the right column as shown
    write(tmp_path / "stored" / "a.json", labelme([shape("road", [[0, 0], [50, 0], [50, 9], [0, 9]])]))
    _, masks, out = convert(script, tmp_path, tmp_path / "stored")
    assert np.array_equal(masks["a"], mask[:, ::-1]) and "1 mask(s) turned as the EXIF orientation" in out
    # the size as stored, the outlines as shown: nobody knows
    write(tmp_path / "mixed" / "a.json", labelme([shape("road", [[0, 0], [9, 0], [9, 50], [0, 50]])]))
    said = errors(script, prepare, "masks", "--masks", tmp_path / "mixed", "--out", tmp_path / "masks")
    assert re.search("a.json: states 56x40 pixels for 'a', but .*a.png has 40x56 when its EXIF orientation is applied", said)


def test_the_image_gives_a_size_that_is_missing_and_contradicts_one_that_is_wrong(script, tmp_path):
    source = write(tmp_path / "export" / "a.json", labelme([shape("road", BOX)], size=(None, None)))
    assert "a.json: states no size of the image 'a'; give the folder of it with --images" in refused(
        script, tmp_path, source.parent
    )
    images(tmp_path, "a")
    assert convert(script, tmp_path, source.parent)[1]["a"].shape == (40, 56)
    write(source, labelme([shape("road", BOX)], size=(112, 80)))
    said = errors(script, prepare, "masks", "--masks", source.parent, "--out", tmp_path / "masks")
    assert re.search("states 112x80 pixels for 'a', but .*a.png has 56x40; export", said)


# ---- classes ----


def test_a_list_orders_the_classes_and_knows_other_spellings(script, tmp_path):
    write_lines(tmp_path / "labels.txt", ["__ignore__", "_background_", "road", "car"])
    marks = [shape("Road ", BOX), shape("CAR", INNER), shape("__ignore__", [[0, 30], [9, 30], [9, 39], [0, 39]])]
    source = write(tmp_path / "export" / "a.json", labelme([*marks, shape("_background_", [[6, 4], [7, 4], [7, 5], [6, 5]])]))
    classes, masks, _ = convert(script, tmp_path, source.parent, "--classes", tmp_path / "labels.txt")
    assert classes == ["background", "road", "car"]
    expected = rectangle((6, 4, 30, 20, 1), (10, 8, 20, 16, 2), (0, 30, 9, 39, 255), (6, 4, 7, 5, 0))
    assert np.array_equal(masks["a"], expected)


def test_a_later_export_keeps_the_classes(script, tmp_path):
    """classes.txt beside the masks, which the first conversion wrote, says the order."""
    write(tmp_path / "first" / "a.json", labelme([shape("road", BOX)]))
    assert convert(script, tmp_path, tmp_path / "first")[0] == ["background", "road"]
    write(tmp_path / "second" / "a.json", labelme([shape("car", BOX)]))
    code, out, _ = script(prepare, "masks", "--masks", tmp_path / "second", "--out", tmp_path / "masks")
    assert code == 1 and re.search(
        r"1 label\(s\) are no class of .*classes.txt:\n +car +1 outline\(s\), first in .*a.json", out
    )
    write_lines(tmp_path / "classes.txt", ["background", "road", "car"])
    assert convert(script, tmp_path, tmp_path / "second")[1]["a"].max() == 2


def test_unknown_labels_write_nothing_unless_they_are_ignored(script, tmp_path):
    write_lines(tmp_path / "names.txt", ["background", "road"])
    source = write(tmp_path / "coco.json", coco([(1, 1, [flat(BOX)]), (1, 2, [flat(INNER)])]))
    flags = ["--classes", tmp_path / "names.txt"]
    code, out, _ = script(prepare, "masks", "--masks", source, "--out", tmp_path / "masks", *flags)
    assert code == 1 and "problem: add what is missing to" in out and not (tmp_path / "masks").exists()
    for i, more in enumerate([["--unknown", "ignore"], ["--ignore", "car"]]):
        mask = convert(script, tmp_path / f"{i}", source, *flags, *more)[1]["a"]
        assert np.array_equal(mask, rectangle((6, 4, 30, 20, 1), (10, 8, 20, 16, 255)))


@pytest.mark.parametrize("place", ["classes.txt", "names.txt"])
def test_a_class_that_is_ignored_keeps_its_index(script, tmp_path, place):
    """The others do not move up, since classes.txt says what they are."""
    write_lines(tmp_path / place, ["background", "car", "road"])
    source = write(tmp_path / "coco.json", coco([(1, 1, [flat(BOX)]), (1, 2, [flat(INNER)])]))
    flags = ["--classes", tmp_path / place] if place == "names.txt" else []
    classes, masks, _ = convert(script, tmp_path, source, "--ignore", "car", *flags)
    assert classes == ["background", "car", "road"]
    assert np.array_equal(masks["a"], rectangle((6, 4, 30, 20, 2), (10, 8, 20, 16, 255)))


def test_two_lists_of_classes_must_agree(script, tmp_path):
    write_lines(tmp_path / "classes.txt", ["background", "car", "road"])
    write_lines(tmp_path / "names.txt", ["background", "road", "car"])
    source = write(tmp_path / "coco.json", coco([ROAD]))
    assert "names.txt: differs from" in refused(script, tmp_path, source, "--classes", tmp_path / "names.txt")


def test_the_pixels_outside_are_background_or_ignored(script, tmp_path):
    content = coco([(1, 1, [flat(BOX)]), (1, 2, [flat(INNER)])])
    content["images"].append({"id": 2, "file_name": "nothing.png", "width": 8, "height": 8})
    source = write(tmp_path / "coco.json", content)
    classes, masks, out = convert(script, tmp_path / "one", source)
    assert classes == ["background", "road", "car"] and not masks["nothing"].any()
    assert "1 image(s) without an outline are all background, first 'nothing'; add --empty skip" in out
    classes, masks, _ = convert(script, tmp_path / "two", source, "--background", "ignore")
    assert classes == ["road", "car"] and np.array_equal(masks["a"] == 255, rectangle((6, 4, 30, 20, 1)) == 0)
    assert masks.keys() == {"a"}  # a mask of 255 alone says nothing
    assert convert(script, tmp_path / "three", source, "--empty", "skip")[1].keys() == {"a"}
    classes, masks, _ = convert(script, tmp_path / "four", source, "--background", "car")
    assert classes == ["car", "road"]
    said = errors(script, prepare, "masks", "--masks", source, "--out", tmp_path / "one" / "masks", "--empty", "skip")
    assert "nothing.png: is a mask of an image that has no outline now; remove it" in said


def test_coco_orders_classes_by_number_and_lists_those_that_no_image_shows(script, tmp_path):
    content = coco([(1, 1, [flat(BOX)])], categories=("zebra", "ant"))
    content["categories"].reverse()
    assert convert(script, tmp_path, write(tmp_path / "c.json", content))[0] == ["background", "zebra", "ant"]


def test_labels_are_utf8_with_or_without_a_mark(script, tmp_path):
    source = write(
        tmp_path / "export" / "a.json", "\ufeff" + json.dumps(labelme([shape("\u9053\u8def", BOX)]), ensure_ascii=False)
    )
    assert convert(script, tmp_path, source)[0] == ["background", "\u9053\u8def"]


# ---- what cannot be drawn ----


def test_shapes_without_an_area_are_counted_and_left_out(script, tmp_path):
    marks = [shape("road", BOX), shape("p", [[1, 1]], "point"), shape("car", [[1, 1], [9, 9]]), shape("q", [[2, 2]], "point")]
    write(tmp_path / "export" / "a.json", labelme(marks))
    classes, masks, out = convert(script, tmp_path, tmp_path / "export")
    assert classes == ["background", "road"] and np.array_equal(masks["a"], rectangle((6, 4, 30, 20, 1)))
    assert re.search("note: 2 times a point, left out, first in .*a.json\n", out) and "1 times a polygon of 2 points" in out
    annotations = [(1, 1, [flat(BOX), [1, 1, 5, 5]]), (1, 2, [[1, 1, 5, 5]]), (1, 2, [])]
    _, masks, out = convert(script, tmp_path / "coco", write(tmp_path / "coco.json", coco(annotations)))
    assert np.array_equal(masks["a"], rectangle((6, 4, 30, 20, 1)))
    assert "a polygon of fewer than 3 points, left out" in out and "a box without an outline, left out" in out


def test_images_that_are_not_listed_get_no_mask_and_listed_ones_without_image_are_named(script, tmp_path):
    images(tmp_path, "a", "bare")
    listed = [{"id": i, "file_name": f"train/{name}.png", "width": 56, "height": 40} for i, name in ((1, "a"), (2, "gone"))]
    content = coco([(1, 1, [flat(BOX)]), (2, 1, [flat(BOX)])], listed)
    _, masks, out = convert(script, tmp_path, write(tmp_path / "coco.json", content))
    assert masks.keys() == {"a"} and "1 image(s) are not in the folder of the images and were left out, first 'gone'" in out


def entry(file, number=1, **more):
    return {"id": number, "file_name": file, "width": 56, "height": 40, **more}


ROAD = (1, 1, [flat(BOX)])
WRONG = {
    "damaged": ("{", "cannot be read as JSON .*; export it again"),
    "empty": ("", "cannot be read as JSON"),
    "other": ({"objects": []}, "holds neither the shapes of LabelMe nor .* of COCO"),
    "a list": ([1], "holds neither the shapes of LabelMe"),
    "points": (labelme([shape("road", "abc")]), "holds a shape that cannot be read .*fix it in LabelMe"),
    "nan": (labelme([shape("road", [[1, 1], [float("nan"), 5], [5, 5]])]), "a coordinate that is not finite"),
    "infinite circle": (labelme([shape("road", [[1, 1], [float("inf"), 5]], "circle")]), "a coordinate that is not finite"),
    "label": (labelme([shape(None, BOX)]), "holds a shape that cannot be read"),
    "empty label": (labelme([shape(" ", BOX)]), "holds a shape that cannot be read .*a label ' '"),
    "size": (labelme([shape("road", BOX)], size=(-5, 7)), "an image size of -5x7"),
    "huge": (labelme([shape("road", BOX)], size=(10**6, 10**6)), "an image size of 1000000x1000000"),
    "bad mask": (labelme([shape("road", [[1, 1], [5, 5]], "mask", mask="abc")]), "holds a shape that cannot be read"),
    "nothing": (labelme([]), "holds no outline of an image$"),
    "points alone": (labelme([shape("p", [[1, 1]], "point")]), "holds no outline of an image; it has 1 times a point$"),
    "case": (labelme([shape("Car", BOX), shape("car", INNER)]), "the labels 'Car' and 'car' differ in capital letters alone"),
    "one class": (labelme([shape("_background_", BOX)]), r"holds 1 class\(es\) \(background\); 2 to 255 are needed"),
    "parent": (coco([ROAD], [entry("../a.png")]), "the image '../a.png' lies outside the folder"),
    "absolute": (coco([ROAD], [entry("/etc/a.png")]), "the image '/etc/a.png' lies outside the folder"),
    "drive": (coco([ROAD], [entry("C:\\a.png")]), "lies outside the folder"),
    "backslash": (coco([ROAD], [entry("x\\..\\..\\a.png")]), "lies outside the folder"),
    "same name": (coco([ROAD], [entry("x/a.png"), entry("y/a.png", 2)]), "'y/a.png' and 'x/a.png' have one name"),
    "same id": (coco([ROAD], [entry("a.png"), entry("b.png")]), "have one name or number"),
    "no name": (coco([ROAD], [{"id": 1}]), "holds an image or category that cannot be read .*KeyError"),
    "unknown image": (coco([(7, 1, [flat(BOX)])]), "annotation 0 cannot be read .*there is no image_id 7"),
    "unknown category": (coco([(1, 7, [flat(BOX)])]), "annotation 0 cannot be read .*there is no category_id 7"),
    "boxes": (coco([(1, 1, [])]), "holds no outline of an image; it has 1 times a box without an outline"),
    "odd": (coco([(1, 1, [[1, 2, 3, 4, 5, 6, 7]])]), "annotation 0 cannot be read"),
    "short runs": (coco([(1, 1, {"size": [40, 56], "counts": [5, 6]})]), "runs of 11 pixels for 56x40"),
    "negative runs": (coco([(1, 1, {"size": [40, 56], "counts": [2250, -10]})]), "annotation 0 cannot be read"),
    "other size": (coco([(1, 1, {"size": [4, 5], "counts": [10, 10]})]), "runs for 5x4 pixels"),
    "bad runs": (coco([(1, 1, {"size": [40, 56], "counts": "\u1234"})]), "annotation 0 cannot be read"),
    "null": (coco([]) | {"annotations": [None]}, "annotation None cannot be read"),
    "strings": (coco([(1, 1, ["abc"])]), "annotation 0 cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_drawn_is_one_line(script, tmp_path, case):
    content, expected = WRONG[case]
    source = write(tmp_path / "export" / "a.json", content)
    assert re.search(expected, refused(script, tmp_path, source).strip())


def test_two_files_of_one_image_are_named(script, tmp_path):
    for folder in "xy":
        write(tmp_path / "export" / folder / "a.json", labelme([shape("road", BOX)]))
    assert re.search("y/a.json: has the name of .*x/a.json; keep one", refused(script, tmp_path, tmp_path / "export"))
    for folder in "xy":
        write(tmp_path / "export" / folder / "a.json", coco([ROAD]))
    assert "all of COCO must be in one; give it as --masks" in refused(script, tmp_path, tmp_path / "export")


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--suffix", "_x"], "--suffix: --masks .* holds JSON files of outlines; leave this flag out"),
        (["--unknown", "nearest"], "--unknown nearest: --masks .* holds JSON files of outlines"),
        (["--ignore", "bike"], "--ignore bike: no such label; there are road"),
        (["--classes", "absent.txt"], "absent.txt: no such file; write one class per line"),
        (["--classes", "few.txt"], "few.txt: names no class 'background' for the pixels outside .* --background ignore"),
        (["--background", "Road"], "the labels 'Road' and 'road' differ in capital letters alone"),
        (["--images", "absent"], "--images absent: no such folder"),
        (["--images", "others"], "holds no outline of an image; its first image is 'a', but --images has no such one"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_wrong_flags_are_one_line(script, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "few.txt", ["road", "car"])
    save_jpeg(tmp_path / "others" / "b.jpg", np.random.default_rng(0))
    source = write(tmp_path / "export" / "a.json", labelme([shape("road", BOX)]))
    assert re.search(expected, refused(script, tmp_path, source.parent, *flags))


def test_colours_are_not_of_a_json_file_but_of_masks_beside_one(script, folder):
    (folder / "masks").rename(folder / "old")
    source = write(folder / "old" / "meta.json", {"classes": []})
    assert "holds JSON files of outlines; leave this flag out" in refused(script, folder, source, "--values", "0=0", "1=1")
    assert "meta.json: holds neither the shapes of LabelMe nor" in refused(script, folder, folder / "old")
    assert len(convert(script, folder, folder / "old", "--values", "0=0", "1=1", "2=2", "255=ignore")[1]) == 11


def test_flags_of_outlines_need_outlines(script, folder):
    (folder / "masks").rename(folder / "old")
    assert "--background: --masks" in refused(script, folder, folder / "old", "--background", "road")


def test_masks_that_somebody_else_wrote_are_kept(script, folder):
    before = (folder / "masks" / "im00.png").read_bytes()
    source = write(folder / "export" / "im00.json", labelme([shape("road", BOX)]))
    flags = ["masks", "--masks", source, "--out", folder / "masks", "--background", "tree"]
    assert "im00.png exists and was not written by this command" in errors(script, prepare, *flags)
    assert (folder / "masks" / "im00.png").read_bytes() == before
    assert script(prepare, *flags, "--overwrite")[0] == 0 and (folder / "masks" / "im00.png").read_bytes() != before
