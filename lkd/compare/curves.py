"""TensorBoard output of a comparison."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from lkd.compare.comparison import Comparison
from lkd.compare.page import shown
from lkd.compare.plots import Plot
from lkd.compare.tables import tables


def write_curves(found: Comparison, folder: Path, plots: Sequence[Plot]) -> None:
    """Write the scalars of each network as a separate run, and the tables, plots and disputed images.

    Args:
        found: The comparison.
        folder: Log directory.
        plots: Plots of the comparison.
    """
    for number, (name, figures) in enumerate(found.figures.items()):
        cost = found.costs[name]
        scalars = {
            "acc": figures.top1.value,
            "nll": figures.nll,
            "ece": figures.ece,
            "scaled_ece": figures.scaled_ece,
            "agreement": figures.agreement and figures.agreement.value,
            "kl": figures.kl,
            "parameters": cost.parameters,
            "flops": cost.flops,
            **{f"images_per_s_batch_{time.batch_size}": time.throughput for time in cost.times},
        }
        with SummaryWriter(str(folder / _folder(name, number))) as writer:
            for tag, value in scalars.items():
                if value is not None:
                    writer.add_scalar(f"compare/{tag}", value)
    with SummaryWriter(str(folder)) as writer:
        for table in tables(found):
            writer.add_text(f"compare/{table.title}", "\n".join(table.markdown()))
        for plot in plots:
            writer.add_figure(f"compare/{plot.title}", plot.figure)
        for name, disputed in found.predictions.disputed.items():
            if len(disputed.image):
                images = make_grid(shown(disputed.image, found.data), nrow=6)
                writer.add_image(f"compare/disputed by {name}", images)


def _folder(name: str, number: int) -> str:
    """Return a folder name for a network: its own name if that is a valid folder name."""
    if re.fullmatch(r"[\w-][\w.-]{0,99}", name):
        return name
    return f"{number}_" + re.sub(r"[^\w-]+", "_", name)[:99]
