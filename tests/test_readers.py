"""Reading images, masks, lists and palettes, in the forms in which people have them."""

import functools
import io
import os
import pickle
import struct
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from conftest import check, errors, open_folder, saved, write_lines
from PIL import Image

import backbones
import checks
import datasets
import prepare
import readers
import result_files
import run_folder
from common import UserError

# ---- images ----


def read(path):
    return np.asarray(readers.open_image(path))


RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))

DEEP, WORDS, FLOATS = (RAMP.astype(dtype) for dtype in (np.uint16, np.int32, np.float32))


@pytest.mark.parametrize(
    "values,suffix,tags",
    [
        (RAMP, "png", {}),
        (DEEP * 257, "png", {}),
        (DEEP * 257, "tif", {}),
        (DEEP * 257, "pgm", {}),
        (DEEP, "tif", {}),
        (DEEP * 16 + 15, "png", {}),
        (DEEP * 16 + 15, "tif", {}),
        (DEEP * 4, "tif", {281: 1023}),
        (DEEP * 64, "tif", {281: 16383}),
        (WORDS, "tif", {}),
        (WORDS * 257, "tif", {}),
        (WORDS * 16, "tif", {}),
        (WORDS * 0x01010101, "tif", {339: 1}),
        (FLOATS / 255, "tif", {}),
        (FLOATS, "tif", {}),
        (FLOATS * 257, "tif", {}),
        (FLOATS * 4, "tif", {341: 1020.0}),
        ((RAMP > 127), "png", {}),
        ((RAMP > 127), "tif", {}),
    ],
)
def test_grey_values_have_their_brightness(tmp_path, values, suffix, tags):
    path = saved(values, tmp_path / f"a.{suffix}", **({"tiffinfo": tags} if tags else {}))
    if 339 in tags:  # SampleFormat, which Pillow writes as signed
        signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, form, 0) for form in (2, 1))
        path.write_bytes(path.read_bytes().replace(signed, unsigned))
    expected = RAMP if values.dtype != bool else np.where(values, 255, 0)
    image = read(path)
    assert image.shape == (4, 256, 3) and np.abs(image - expected[..., None].astype(int)).max() <= 1


@pytest.mark.parametrize(
    "values,tags,expected",
    [
        (FLOATS - 5, {}, "from -5 to 250"),
        (FLOATS / 100, {}, "up to 2.55"),
        (FLOATS * 1e6, {}, "up to 2.55e\\+08"),
        (np.full((3, 3), np.nan, np.float32), {}, "not finite"),
        (np.full((3, 3), np.inf, np.float32), {}, "not finite"),
        (WORDS * 10000, {}, "up to 2.55e\\+06"),
        (WORDS - 7, {339: 2}, "from -7 to 248"),
    ],
)
def test_grey_values_without_a_white_are_refused(tmp_path, values, tags, expected):
    path = saved(values, tmp_path / "a.tif", **({"tiffinfo": tags} if tags else {}))
    with pytest.raises(UserError, match=f"a.tif: holds .*{expected}.*; save it with") as error:
        readers.open_image(path)
    assert "\n" not in str(error.value)


def png_of_16_bits(values):
    """An RGB PNG of (H, W, 3) uint16; Pillow writes none."""
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits(tmp_path):
    values = np.stack([DEEP, DEEP[:, ::-1], DEEP // 2], 2)
    (tmp_path / "a.png").write_bytes(png_of_16_bits(values * 257))
    assert np.abs(read(tmp_path / "a.png") - values.astype(int)).max() <= 1
    (tmp_path / "b.png").write_bytes(png_of_16_bits(values * 16))  # 12 bits, of which Pillow keeps 4
    with pytest.raises(UserError, match=r"b.png: holds 16-bit colours.*12-bit"):
        readers.open_image(tmp_path / "b.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["LA", "RGBA", "CMYK", "YCbCr", "P", "PA"])
def test_other_forms_have_their_colours(tmp_path, mode):
    colours = np.zeros((4, 256, 3), np.uint8)
    colours[:, 128:] = 204  # a colour of the web's palette, to which Pillow converts
    image = Image.fromarray(colours).convert(mode if mode != "PA" else "P")
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    more = {"transparency": bytes([0] * 3 + [255] * 253)} if mode == "PA" else {}
    image.save(tmp_path / f"a.{suffix}", **more)
    assert np.abs(read(tmp_path / f"a.{suffix}") - colours.astype(int)).max() <= 2


def exif_bytes(orientation, entries=()):
    """An EXIF entry that begins with the orientation; more entries are (tag, type, count, 4 bytes)."""
    packed = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1 + len(entries)) + packed + struct.pack("<I", 0)


UNWRITABLE = (0x111, 9, 1, struct.pack("<i", -3))  # a signed number in a tag that has none

BROKEN = [b"Exif\0\0II*\0" + bytes(2), b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]

TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", TURNED)
def test_images_and_masks_are_turned_by_their_orientation_alone(tmp_path, suffix, orientation):
    """Also where the rest of the entry cannot be written back."""
    array = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    plain, turned = io.BytesIO(), tmp_path / f"a.{suffix}"
    format = {"jpg": "JPEG"}.get(suffix, suffix)
    Image.fromarray(array).save(plain, format=format)
    Image.fromarray(array).save(turned, exif=exif_bytes(orientation, [UNWRITABLE]))
    expected = TURNED[orientation](np.asarray(Image.open(plain).convert("RGB")))
    assert np.array_equal(read(turned), expected)
    assert readers.upright_size(turned) == expected.shape[1::-1]
    if suffix == "png":
        mask = array[..., 0] % 3
        Image.fromarray(mask).save(turned, exif=exif_bytes(orientation, [UNWRITABLE]))
        assert np.array_equal(readers.open_mask(turned), TURNED[orientation](mask))


@pytest.mark.filterwarnings("ignore")  # of Pillow, which warns of the broken entry
@pytest.mark.parametrize("exif", [*BROKEN, exif_bytes(77), exif_bytes(6)[:20]], ids=range(len(BROKEN) + 2))
def test_a_broken_exif_entry_turns_nothing(tmp_path, exif):
    array = np.random.default_rng(0).integers(0, 3, (6, 9), np.uint8)
    path = saved(array, tmp_path / "a.png", exif=exif)
    assert np.array_equal(readers.open_mask(path), array) and readers.upright_size(path) == (9, 6)
    assert np.array_equal(read(path)[..., 0], array)


def test_own_images_come_as_upright_rgb(folder):
    files = sorted((folder / "images").iterdir())
    array = np.zeros((40, 56, 3), np.uint8)
    array[:20, :28] = (200, 100, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(array).save(files[0], exif=exif)
    Image.fromarray(array[..., 0]).save(files[1])
    Image.fromarray(array).convert("P").save(files[2])
    Image.fromarray(np.dstack([array, array[..., 0]])).save(files[3])
    dataset = datasets.Folder(folder)
    assert dataset.image("im00").shape == (56, 40, 3) and tuple(dataset.image("im00")[0, -1]) == (200, 100, 50)
    for name in ("im01", "im02", "im03"):
        assert dataset.image(name).shape == (40, 56, 3)
    assert tuple(dataset.image("im01")[0, 0]) == (200, 200, 200)


@pytest.mark.parametrize(
    "error", [KeyError("x"), struct.error("short\nread"), MemoryError(), RecursionError("deep"), OSError("cut")]
)
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_whatever_is_raised_while_a_file_is_read_is_one_line_with_its_name(folder, monkeypatch, error, kind):
    def broken(path, *args, **more):
        if path == folder / kind / "im03.png":
            raise error
        return opened(path, *args, **more)

    opened = Image.open
    monkeypatch.setattr(Image, "open", broken)
    dataset = datasets.Folder(folder)
    groups = {"labeled": dataset.train[:5]}
    for call in (lambda: checks.refuse_faults(dataset, groups), lambda: (dataset.image("im03"), dataset.mask("im03"))):
        with pytest.raises(UserError, match=rf"im03.png: .*{type(error).__name__}.*; replace it") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_large_images_need_no_warning_and_larger_ones_are_refused(tmp_path):
    Image.new("1", (12000, 8000)).save(tmp_path / "large.png")
    assert readers.upright_size(tmp_path / "large.png") == (12000, 8000)
    Image.new("1", (40000, 8000)).save(tmp_path / "huge.png")
    for read in (readers.upright_size, readers.open_image, readers.open_mask):
        with pytest.raises(UserError, match=r"huge\.png: has 40000x8000 pixels, more than"):
            read(tmp_path / "huge.png")


# ---- masks and their colours ----


def test_a_mask_turned_by_exif_is_turned_like_its_image(folder):
    mask = np.arange(40 * 56).reshape(40, 56) % 3
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / "im00.png", exif=exif)
    assert np.array_equal(datasets.Folder(folder).mask("im00"), np.rot90(mask, -1))


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


def test_voc_palette():
    assert readers.voc_palette(21)[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert readers.voc_palette(21)[20] == (0, 64, 128)


# ---- lists and names ----


@pytest.mark.parametrize(
    "line,name",
    [
        ("2007_000032", "2007_000032"),
        ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", "2007_000032"),
        ("JPEGImages/2007_000032.jpg\tSegmentationClassAug/2007_000032.png", "2007_000032"),
        ("leftImg8bit/train/jena/jena_000078_000019_leftImg8bit.png", "jena_000078_000019"),
        ("/images/train/jena_000078_000019.png\t/segmentation/train/jena_000078_000019_gtFine.png", "jena_000078_000019"),
        ("my photo", "my photo"),
        ("images/my photo.jpg masks/my photo.png", "my photo"),
        ("v1.2", "v1.2"),
        ("v1.2.JPEG", "v1.2"),
    ],
)
def test_lists_in_the_forms_people_have(tmp_path, line, name):
    write_lines(tmp_path / "list.txt", [line])
    assert readers.read_names(tmp_path / "list.txt", {name, "my", "other"}) == [name]


def test_names_in_two_unicode_forms_are_one(script, folder):
    nfc, nfd = (unicodedata.normalize(form, "caf\xe9 \u00fcber") for form in ("NFC", "NFD"))
    before = open_folder(folder)[1]
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
        dataset, part = open_folder(folder)
        assert len(part.labeled) == len(before.labeled) and len(part.unlabeled) == len(before.unlabeled)
        assert dataset.classes[1] == nfc and f"im08 {nfc}" in part.unlabeled and f"im10 {nfc}" in dataset.val
        assert open_folder(folder, labeled_list=folder / "l.txt")[1].labeled == [f"im00 {nfc}"]
        hashes.add(part.hash)
    assert len(hashes) == 1
    assert check(script, folder)[0] == 0
    Image.new("RGB", (56, 40)).save(folder / "images" / f"im00 {nfd}.png")  # beside the same name in the other form
    with pytest.raises(UserError, match=r"has the name of .* accents in another Unicode form"):
        open_folder(folder)


# ---- files that lie or would do harm (docs/reliability.md) ----


def test_an_image_that_another_program_would_draw_is_refused(tmp_path, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *args, **more: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("a program was started"))
    Image.new("L", (8, 8)).save(tmp_path / "a.png", format="EPS")
    for read in (readers.open_image, readers.open_mask, readers.upright_size, readers.read_colours):
        with pytest.raises(UserError, match=r"a\.png: is EPS, which another program"):
            read(tmp_path / "a.png")


def test_pipes_and_devices_are_refused_and_links_followed(folder):
    (folder / "images" / "im00.png").unlink()
    os.mkfifo(folder / "images" / "im00.png")  # a reader would wait for its writer
    with pytest.raises(UserError, match=r"im00\.png: is a pipe or a device"):
        open_folder(folder)
    (folder / "images" / "im00.png").unlink()
    (folder / "images").rename(folder.parent / "far away")
    (folder / "images").symlink_to(folder.parent / "far away")
    (folder.parent / "far away" / "im00.png").symlink_to("im01.png")
    open_folder(folder)
    (folder / "classes.txt").unlink()
    (folder / "classes.txt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"classes\.txt: is a pipe or a device"):
        open_folder(folder)


def test_a_text_file_beyond_its_limit_is_refused_unread(folder):
    with open(folder / "train.txt", "wb") as file:
        file.truncate(2**40)  # a hole, which takes no space
    with pytest.raises(UserError, match=r"train\.txt: has 1,099,511,627,776 bytes, more than"):
        datasets.Folder(folder)


def test_no_entry_of_a_list_leads_out_of_the_images(folder):
    """Its folders are never used: ../im00.png is im00, wherever it points, and what is no image of the data set is refused."""
    Image.new("RGB", (5, 5)).save(folder.parent / "im00.png")
    write_lines(folder / "train.txt", ["../im00.png", "/etc/im01.png", "..\\..\\im02.png"])
    dataset = datasets.Folder(folder)
    assert dataset.train == ["im00", "im01", "im02"]
    assert all(dataset.images[name].parent == folder / "images" for name in dataset.train)
    assert dataset.image("im00").shape == (40, 56, 3)
    for entry in ("../../etc/passwd", "/etc/passwd", "..", "im00\0.png", "$(touch made)"):
        write_lines(folder / "train.txt", [entry])
        with pytest.raises(UserError, match=r"entry 1: .* is no image of this data set") as error:
            datasets.Folder(folder)
        assert str(error.value).isprintable()


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, form):
    made, path = tmp_path / "made", tmp_path / "a.pt"
    content = {"model": {"a": torch.zeros(2)}, "args": {}, "classes": [], "row": RunsCode(made)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["row"]))
        pickle.loads(path.read_bytes()).close()
        assert made.exists()  # it is one
        made.unlink()
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for read in (run_folder.load_checkpoint, backbones.read_state_dict):
        with pytest.raises(UserError, match=r"a\.pt: is a pickle of Python objects|a\.pt: cannot be read"):
            read(path)
    assert not made.exists() and not result_files.is_ours(path)


@pytest.mark.parametrize(
    "content,reason",
    [
        (torch.zeros(1).expand(2**40), "a tensor of 1,099,511,627,776 numbers, of which fewer are stored"),
        (torch.eye(3).to_sparse(), "a tensor that is sparse"),
        (torch.zeros(3, device="meta"), "without data"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
        (functools.reduce(lambda inner, _: [inner, inner], range(25), 0), "more than 100,000 values"),
        (functools.reduce(lambda inner, _: [inner], range(50), 0), "lists in lists, 33 deep"),
    ],
    ids=["expanded", "sparse", "meta", "complex", "many", "deep"],
)
def test_what_a_file_of_tensors_may_hold(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(readers, "MAX_VALUES", 10**5)
    torch.save({"a": content}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=reason):
        readers.open_tensors(tmp_path / "a.pt", "a.pt")


def test_a_file_of_tensors_that_would_unpack_to_more_than_it_has_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**7)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert torch.equal(readers.open_tensors(tmp_path / "a.pt", "a")["a"], torch.zeros(10**7))
    assert (tmp_path / "b.pt").stat().st_size < 10**6
    with pytest.raises(UserError, match="its parts claim"):
        readers.open_tensors(tmp_path / "b.pt", "b")
