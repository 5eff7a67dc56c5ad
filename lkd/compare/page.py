"""Self-contained HTML page of a comparison."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from lkd.callbacks.sheet import sheet
from lkd.compare.comparison import Comparison, ScoreComparison
from lkd.compare.plots import Plot
from lkd.pages import as_svg, rendered
from lkd.tasks.visualization import displayable


class _Picture(NamedTuple):
    source: str
    position: int
    label: str
    teacher: str
    network: str
    right: str


def page(comparison: Comparison | ScoreComparison, plots: Sequence[Plot]) -> str:
    """Render a comparison as a page with tables, plots, and images on which networks and teacher disagree.

    Args:
        comparison: The comparison.
        plots: Plots of the comparison.

    Returns:
        HTML without external resources.
    """
    pictures: dict[str, list[_Picture]] = {}
    sheets: dict[str, str] = {}
    if isinstance(comparison, Comparison):
        names = [name for name in comparison.metrics if name in comparison.predictions.disagreements]
        pictures = {name: list(_pictures(comparison, name)) for name in names}
    else:
        sheets = {name: _as_png(sheet(rows)) for name, rows in comparison.disagreements.items()}
    return rendered(
        "compare",
        comparison=comparison,
        tables=comparison.tables(),
        plots=[(plot.title, plot.note, as_svg(plot.figure)) for plot in plots],
        pictures=pictures,
        sheets=sheets,
    )


def _pictures(comparison: Comparison, name: str) -> Iterator[_Picture]:
    predictions, names = comparison.predictions, comparison.class_names
    disagreements = predictions.disagreements[name]
    images = shown(disagreements.image, comparison.data)
    for image, position in zip(images, disagreements.position.tolist(), strict=True):
        label = int(predictions.target[position])
        teacher_choice = _choice(predictions.logits[str(comparison.teacher)][position])
        choice = _choice(predictions.logits[name][position])
        right = {teacher_choice[0]: "teacher", choice[0]: "network"}.get(label, "neither")
        teacher, network = (f"{names[chosen]} {100 * sure:.0f}%" for chosen, sure in (teacher_choice, choice))
        truth = names[label] if label >= 0 else "no label"
        yield _Picture(_as_png(image), position, truth, teacher, network, right)


def _choice(logits: Tensor) -> tuple[int, float]:
    sure, chosen = logits.softmax(0).max(0)
    return int(chosen), float(sure)


def shown(image: Tensor, data: Any) -> Tensor:
    """Undo the normalization of images, for display.

    Args:
        image: Images `(B, C, H, W)` from the data module.
        data: Data module. Without `mean` and `std`, each image is rescaled to the full range instead.

    Returns:
        Images `(B, 1, H, W)` or `(B, 3, H, W)` with values in [0, 1].
    """
    return displayable(image, getattr(data, "mean", None), getattr(data, "std", None))


def _as_png(image: Tensor) -> str:
    file = io.BytesIO()
    to_pil_image(image).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
