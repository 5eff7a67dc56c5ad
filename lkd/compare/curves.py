"""TensorBoard output of a comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from lkd.callbacks.sheet import sheet
from lkd.compare.comparison import Comparison, ScoreComparison
from lkd.compare.metrics import ClassificationMetrics
from lkd.compare.page import shown
from lkd.compare.plots import Plot
from lkd.compare.scores import ScoreMetrics


def write_curves(comparison: Comparison | ScoreComparison, folder: Path, plots: Sequence[Plot]) -> None:
    """Write the scalars of each network as a separate run, and the tables, the plots and the sheets of disagreements.

    Args:
        comparison: The comparison.
        folder: Log directory.
        plots: Plots of the comparison.
    """
    every: Mapping[str, ClassificationMetrics | ScoreMetrics] = comparison.metrics
    for number, (name, metrics) in enumerate(every.items()):
        cost = comparison.costs[name]
        scalars = {
            **_quality(metrics),
            "parameters": cost.parameters,
            "flops": cost.flops,
            **{f"images_per_s_batch_{time.batch_size}": time.throughput for time in cost.times},
        }
        with SummaryWriter(str(folder / _folder(name, number))) as writer:
            for tag, value in scalars.items():
                if value is not None:
                    writer.add_scalar(f"compare/{tag}", value)
    with SummaryWriter(str(folder)) as writer:
        for table in comparison.tables():
            writer.add_text(f"compare/{table.title}", "\n".join(table.markdown()))
        for plot in plots:
            writer.add_figure(f"compare/{plot.title}", plot.figure)
        for name, picture in _disagreements(comparison).items():
            writer.add_image(f"compare/disagreements of {name}", picture)


def _quality(metrics: ClassificationMetrics | ScoreMetrics) -> dict[str, float | None]:
    if isinstance(metrics, ScoreMetrics):
        return {name.replace(" ", "_"): value for name, value in metrics.measures().items()}
    return {
        "acc": metrics.top1.value,
        "nll": metrics.nll,
        "ece": metrics.ece,
        "scaled_ece": metrics.scaled_ece,
        "agreement": None if metrics.agreement is None else metrics.agreement.value,
        "kl": metrics.kl,
    }


def _disagreements(comparison: Comparison | ScoreComparison) -> dict[str, Tensor]:
    """Return one image per network, which shows the samples on which it and the teacher disagree."""
    if isinstance(comparison, ScoreComparison):
        return {name: sheet(rows) for name, rows in comparison.disagreements.items()}
    kept = comparison.predictions.disagreements
    return {name: make_grid(shown(one.image, comparison.data), nrow=6) for name, one in kept.items() if len(one.image)}


def _folder(name: str, number: int) -> str:
    """Return a folder name for a network: its own name if that is a valid folder name."""
    if re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        return name
    return f"{number}_" + re.sub(r"[^\w-]+", "_", name)[:99]
