"""Pictures of results: panels of predictions, the confusion matrix, and legends with class names in any script."""

import functools
import pathlib
import sys
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch

from common import printable
from readers import colour_table
from result_files import PNG_CHUNK
from run_folder import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_panels(path: pathlib.Path, dataset, names: list[str], columns: list[tuple[str, list[np.ndarray]]]):
    """Write a PNG with a legend and one row per image: image, ground truth, and the prediction of each model (Fig. 4)."""
    palette = colour_table(dataset.palette)
    heads = ["image", "ground truth", *(head for head, _ in columns)]
    aspect = min(3.0, max(0.25, np.divide(*dataset.image(names[0]).shape[:2])))
    figure, axes = plt.subplots(
        len(names), len(heads), squeeze=False, layout="constrained", figsize=(2 * len(heads), 2 * aspect * len(names) + 0.4)
    )
    occur = np.zeros(256, bool)
    for r, name in enumerate(names):
        masks = [dataset.mask(name), *(masks[r] for _, masks in columns)]
        for mask in masks:
            occur[np.unique(mask)] = True
        for axis, cell, head in zip(axes[r], [dataset.image(name), *(palette[mask] for mask in masks)], heads, strict=True):
            thin = max(cell.shape[:2]) > 8 * min(cell.shape[:2])  # such as one row of pixels, which would be a hairline
            axis.imshow(cell, interpolation="nearest", aspect="auto" if thin else "equal")
            axis.set_axis_off()
            if r == 0:
                axis.set_title(head, fontsize=8, parse_math=False)
    add_legend(figure, dataset.classes, dataset.palette, np.flatnonzero(occur[: len(dataset.classes)]))
    save_figure(path, figure)


def add_legend(figure, classes: Sequence[str], palette, shown: Sequence[int]):
    """A legend of the classes `shown`, sorted indices, below a figure with constrained layout, which grows by its height."""
    if len(shown) == 0:
        return
    labels = class_labels(classes)
    patches = [plt.Rectangle((0, 0), 1, 1, color=np.array(palette[i]) / 255) for i in shown]

    def draw(columns):
        """The legend and its width and height in inches."""
        legend = figure.legend(
            patches, [labels[i] for i in shown], loc="outside lower center", ncols=columns, fontsize=7, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        return legend, *legend.get_window_extent(figure.canvas.get_renderer()).size / figure.dpi

    trial, width, _ = draw(1)  # how wide an entry is
    trial.remove()
    figure.set_figwidth(max(figure.get_figwidth(), width))
    _, _, height = draw(max(1, int(figure.get_figwidth() / (width + 0.2))))  # 0.2 inches between columns
    figure.set_figheight(figure.get_figheight() + height)


def draw_confusion(path: pathlib.Path, confusion: torch.Tensor, classes: list[str], title: str):
    """Write a PNG of the confusion matrix of the classes that occur; a row is a true class, in percent of its pixels."""
    occur = (confusion.sum(0) + confusion.sum(1)).nonzero()[:, 0]
    percent = (100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1))[occur][:, occur].numpy()
    names, n = class_labels(classes), len(occur)
    names = [names[i] for i in occur]
    side, size, least = (0.4, 8, 0.5) if n <= 50 else (0.2, 6, 5)  # of a cell in inches, of the font, in percent
    figure, axis = plt.subplots(figsize=(2.5 + side * n, 2 + side * n), layout="constrained")
    axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.argwhere(percent >= least):
        axis.text(
            j,
            i,
            f"{percent[i, j]:.0f}",
            ha="center",
            va="center",
            fontsize=size - 1,
            color="white" if percent[i, j] > 50 else "black",
        )
    axis.set_xticks(range(n), names, rotation=90, fontsize=size, parse_math=False)
    axis.set_yticks(range(n), names, fontsize=size, parse_math=False)
    axis.set(xlabel="predicted", ylabel="true (rows sum to 100%)")
    axis.set_title(title, fontsize=9, parse_math=False)
    save_figure(path, figure)


def save_figure(path: pathlib.Path, figure, dpi: int = 100):
    """Write a matplotlib figure as a PNG that `is_ours`, whole or not at all, and close it."""
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=dpi, metadata=PNG_CHUNK)
    finally:
        plt.close(figure)


# ---- names ----


def class_labels(classes: Sequence[str]) -> list[str]:
    """The names of classes for a picture, at most 40 characters each. A name that no installed font can draw becomes `class 3`,
    with a note on stderr."""
    able = drawable(classes)
    labels = [name if can else f"class {i}" for i, (name, can) in enumerate(zip(classes, able, strict=True))]
    if not all(able):
        first = printable(classes[able.index(False)])
        more = f" and {able.count(False) - 1} more class names" if able.count(False) > 1 else ""
        note_once(f"note: no font here can draw '{first}'{more}; the pictures show the class's number instead")
    return [label if len(label) <= 40 else f"{label[:20]}…{label[-19:]}" for label in labels]


@functools.cache
def note_once(text: str):
    print(text, file=sys.stderr)


def drawable(texts: Sequence[str]) -> list[bool]:
    """Whether matplotlib can draw each of `texts`. Installed fonts with missing characters are added to `font.family`."""
    from matplotlib import font_manager

    def has(path: str, characters: set[str]) -> set[str]:
        try:
            font = font_manager.get_font(path)
            font.set_size(10, 100)  # fails for fonts of bitmaps, as of colour emoji
            return {c for c in characters if font.get_char_index(ord(c))}
        except (RuntimeError, OSError, ValueError):
            return set()

    missing = set("".join(texts))
    families = [*matplotlib.rcParams["font.family"]]
    unfit = ("Last Resort", "STIXNonUnicode", "cm")  # matplotlib's own, whose glyphs are boxes or symbols of formulas
    for family in families:
        missing -= has(font_manager.findfont(font_manager.FontProperties(family=[family])), missing)
    for font in font_manager.fontManager.ttflist if missing else ():
        fit = font.style == "normal" and font.name not in families and not font.name.startswith(unfit)
        if fit and (found := has(font.fname, missing)):
            families.append(font.name)
            missing -= found
    matplotlib.rcParams["font.family"] = families
    return [missing.isdisjoint(text) for text in texts]
