"""Image grids, curves and GIFs as files: PNG, and PDF for curves; the same bytes for the same data.

Images are uint8, 0 to 255, and are shown as they are: nothing is rescaled to its own minimum and maximum, so any two
panels can be compared.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from experiment import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST_COLOUR, SECOND_COLOUR, MARK_COLOUR = "#0072b2", "#d55e00", "#555555"  # distinct to the colour-blind
STYLE: dict[str, object] = {}  # rcParams of every figure


def to_uint8(images: Tensor) -> Tensor:
    """Grey values in [0, 1] as the nearest of 0 .. 255; any shape."""
    return (images.clamp(0, 1) * 255).round().byte()


def tile(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images (n, 28, 28) uint8, row by row, as one (height, width) uint8 picture with white gaps of `gap` pixels.

    Raises ValueError if n is no multiple of `columns`, or the images are not uint8.
    """
    images = images.cpu().numpy()
    n, height, width = images.shape
    if images.dtype != np.uint8 or n % columns:
        raise ValueError(f"{n} images of {images.dtype} do not fill rows of {columns} with uint8")
    grid = np.full((n // columns, columns, height + gap, width + gap), 255, np.uint8)
    grid[:, :, :height, :width] = images.reshape(n // columns, columns, height, width)
    picture = grid.transpose(0, 2, 1, 3).reshape(n // columns * (height + gap), columns * (width + gap))
    return picture[: picture.shape[0] - gap, : picture.shape[1] - gap]


def save_grid(path: Path, images: Tensor, columns: int, scale: int = 4) -> None:
    """Write images (n, 28, 28) uint8 as <path>.png, row by row, each pixel `scale` pixels wide."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile(images, columns).repeat(scale, 0).repeat(scale, 1)).save(buffer, "PNG", optimize=True)
    write(path.with_name(f"{path.name}.png"), buffer.getvalue())


def save_gif(path: Path, pictures: Sequence[np.ndarray], milliseconds: int = 150) -> None:
    """Write (height, width) uint8 pictures as <path>.gif, endless, in 16 greys, the last for 2 s; of none, nothing."""
    from PIL import Image

    greys = [Image.fromarray((np.round(picture / 17) * 17).astype(np.uint8)) for picture in pictures]
    if greys:
        buffer = io.BytesIO()
        durations = [milliseconds] * (len(greys) - 1) + [2000]
        greys[0].save(buffer, "GIF", save_all=True, append_images=greys[1:], duration=durations, loop=0)
        write(path.with_name(f"{path.name}.gif"), buffer.getvalue())


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """A figure of this size in inches, drawn without a display, and its panels row by row; columns share an x axis.

    It looks the same everywhere: a notebook's MPLBACKEND, which need not exist here, and anybody's matplotlibrc are
    put out of force. STYLE holds what is to differ from matplotlib's own defaults.
    """
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"  # read at import, and an error if it is unknown
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(matplotlib.rcParamsDefault)  # without `backend`, which would choose one anew
    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns, sharex="col", squeeze=False).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def save_figure(path: Path, fig: "Figure", pdf: bool = True) -> None:
    """Write a figure as <path>.png and, unless told not to, .pdf; without dates, which would change the bytes."""
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None}))[: 1 + pdf]:
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=200, metadata=metadata)
        write(path.with_name(f"{path.name}.{kind}"), buffer.getvalue())


def save_training_curves(
    path: Path, history: list[dict], keys: Sequence[str], ylabel: str, title: str, legend: str = "lower right"
) -> None:
    """Write the history's two figures of merit `keys` (training, validation) per epoch; of no history, nothing.

    The axis spans the values from epoch 1 on: epoch 0 would flatten the curves, and is given as text. A run that has
    only epoch 0 shows that. legend: its corner, the one that the curves leave free.
    """
    if not history:
        return
    fig, (ax,) = figure(4.2, 2.9)
    epochs = [row["epoch"] for row in history]
    for key, colour, label, style in zip(keys, (FIRST_COLOUR, SECOND_COLOUR), ("training", "validation"), ("-", "--")):
        ax.plot(epochs, [row[key] for row in history], style, color=colour, label=label, marker=".", markersize=4)
    if len(history) > 1:
        shown = [row[key] for row in history[1:] for key in keys]
        margin = 0.04 * (max(shown) - min(shown)) or 1
        ax.set_ylim(min(shown) - margin, max(shown) + margin)
        near_legend = 0.98, 0.74 if legend.startswith("upper") else 0.26
        ax.annotate(
            f"untrained (epoch 0): {history[0][keys[1]]:.4g}, off the scale", near_legend, xycoords="axes fraction",
            ha="right", va="center", color=MARK_COLOUR, fontsize=8,
        )  # fmt: skip
    ax.set(xlabel="epoch", ylabel=ylabel, title=title)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc=legend)
    save_figure(path, fig)
