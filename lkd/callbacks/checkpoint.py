"""Which state of a run is kept as its best."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, for the best by validation.

    Args:
        monitor: Name of a curve; None: the newest is kept.
        mode: Whether `min` or `max` is best; `auto`: the least of a loss, the most of anything else.
        save_top_k: How many of the best are kept; -1: all.
        filename: Without `.ckpt`; None: `best`, or `best-{epoch}` if more than one is kept.
        settings: ModelCheckpoint's other settings.
    """

    def __init__(
        self,
        monitor: str | None = "val/acc",
        mode: Literal["auto", "min", "max"] = "auto",
        save_top_k: int = 1,
        filename: str | None = None,
        **settings: Any,
    ) -> None:
        if mode == "auto":
            mode = "min" if monitor is not None and "loss" in monitor else "max"
        if filename is None:
            filename = "best" if save_top_k == 1 else "best-{epoch}"
        super().__init__(monitor=monitor, mode=mode, save_top_k=save_top_k, filename=filename, **settings)
