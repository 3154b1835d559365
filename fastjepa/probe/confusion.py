"""The confusion matrix of a probe as a picture: which classes its features do not tell apart."""

from pathlib import Path

import numpy as np

NAMED = 40  # classes whose names are still readable along the edges
COUNTED = 15  # classes whose shares are still readable in the cells


def confusion_picture(table: np.ndarray, classes: tuple[str, ...], title: str, path: Path) -> None:
    """A PNG of int64 [K, K], true classes in rows; each row as shares of its videos, an empty one grey."""
    from matplotlib.figure import Figure

    count = len(classes)
    totals = table.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, table / np.maximum(totals, 1), np.nan)
    side = float(np.clip(2.2 + 0.55 * count if count <= COUNTED else 3.5 + 0.2 * count, 4.0, 10.0))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    if count <= NAMED:
        axes.set_xticks(
            range(count), classes, rotation=45 if count <= COUNTED else 90, ha="right" if count <= COUNTED else "center"
        )
        axes.set_yticks(range(count), classes)
        axes.tick_params(length=0, labelsize=9 if count <= COUNTED else 6)
    axes.set(xlabel="said by the probe", ylabel="true class")
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    if count <= COUNTED:
        for row, column in np.argwhere(np.nan_to_num(shares) >= 0.005):
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share > 0.55 else "#333333",
            )
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
