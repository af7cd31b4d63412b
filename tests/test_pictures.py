"""Panels, legends and confusion matrices."""

import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

import datasets
import pictures
import readers


class ManyClasses(datasets.Shapes):
    """Classes with awkward names, of which the images show some: `occur`."""

    def __init__(self, count=150, occur=range(0, 60, 2), size=(64, 48)):
        super().__init__(train=2, val=3)
        self.classes = [f"a class with quite a long name, no. {i}" if i % 2 else f"$x_{i}$ {i}" for i in range(count)]
        self.classes[:4] = ["\u9053\u8def", "\u0637\u0631\u064a\u0642", "\U0001f697", "a_b^{c"]
        self.palette, self.occur, self.size = readers.voc_palette(count), [*occur], size

    def image(self, name):
        return np.full((*self.size, 3), int(name[-1]), np.uint8)

    def mask(self, name):
        return np.resize(np.array([*self.occur, 255], np.uint8), self.size)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, open, and no warning while they are drawn."""
    kept = []

    def save(path, figure):
        figure.savefig(path)
        kept.append(figure)

    monkeypatch.setattr(pictures, "save_figure", save)
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("error", UserWarning)  # of matplotlib, about glyphs and layout
        yield kept
    for figure in kept:
        plt.close(figure)


@pytest.mark.slow
def test_a_legend_shows_the_classes_that_occur_below_panels_that_stay_as_large(figures, tmp_path):
    for data in (ManyClasses(occur=[3, 5]), ManyClasses(), ManyClasses(occur=range(150))):
        masks = [data.mask(name) for name in data.val]
        pictures.draw_panels(tmp_path / "p.png", data, data.val, [("a\nb", masks), ("c", masks)])
        shown = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert len(shown) == len(data.occur)
        assert all(len(text) <= 40 for text in shown) and len(set(shown)) == len(shown)
        assert all(name in shown for i, name in enumerate(data.classes) if i in data.occur and name.startswith("$"))
        legend = figures[-1].legends[0].get_window_extent()
        assert legend.x0 >= 0 and legend.x1 <= figures[-1].bbox.x1 and legend.y0 >= 0
        for axis in figures[-1].axes:
            box = axis.get_window_extent()
            assert box.height >= 150 and box.y0 >= legend.y1


@pytest.mark.parametrize("size", [(1, 500), (900, 1), (1, 1), (3, 2000)])
def test_images_of_one_row_or_column_are_drawn(figures, tmp_path, size):
    data = ManyClasses(6, range(6), size)
    data.classes = datasets.Shapes().classes
    pictures.draw_panels(tmp_path / "p.png", data, data.val, [("a", [data.mask(name) for name in data.val])])
    assert all(min(axis.get_window_extent().size) >= 30 for axis in figures[0].axes)
    assert max(Image.open(tmp_path / "p.png").size) < 5000


@pytest.mark.slow
def test_a_confusion_matrix_shows_the_classes_that_occur(figures, tmp_path):
    classes = ManyClasses().classes
    confusion = torch.zeros(150, 150, dtype=torch.int64)
    confusion[5, 5], confusion[5, 140], confusion[8, 8] = 3, 1, 2
    pictures.draw_confusion(tmp_path / "c.png", confusion, classes, "$t_t$")
    axis = figures[0].axes[0]
    shown = [text.get_text() for text in axis.get_yticklabels()]
    assert shown[1] == classes[8] and len(shown) == 3 and sorted(text.get_text() for text in axis.texts) == ["100", "25", "75"]
    pictures.draw_confusion(tmp_path / "c.png", confusion + 1, classes, "all")
    assert len(figures[1].axes[0].get_yticklabels()) == 150 and 2000 < Image.open(tmp_path / "c.png").width < 10_000


# ---- names in pictures ----


def font_of(characters, path):
    """A font that has those characters, each a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"g{ord(c)}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"g{ord(c)}" for c in characters})
    builder.setupGlyf({name: pen.glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares-1", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_names_are_drawn_with_any_installed_font_or_become_numbers(tmp_path, monkeypatch, capsys):
    from matplotlib import font_manager
    from matplotlib import pyplot as plt

    font_of("\U000f0001\U000f0002", tmp_path / "squares.ttf")
    fonts = [*font_manager.fontManager.ttflist]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    classes = ["road", "\U000f0001\U000f0002 a", "\U000f0003", "tab\t", "$x$", "x" * 50 + "y"]
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = pictures.class_labels(classes)
        assert labels[:5] == ["road", "class 1", "class 2", "class 3", "$x$"] and len(labels[5]) == 40 and labels[5][-1] == "y"
        said = capsys.readouterr().err
        assert "and 2 more" in said and len(said.splitlines()) == 1
        font_manager.fontManager.addfont(tmp_path / "squares.ttf")
        labels = pictures.class_labels(classes)
        assert labels[:4] == ["road", classes[1], "class 2", "class 3"]
        figure = plt.figure(figsize=(2, 2))
        figure.text(0, 0.5, labels[1])
        pictures.save_figure(tmp_path / "a.png", figure)  # without a warning about glyphs
