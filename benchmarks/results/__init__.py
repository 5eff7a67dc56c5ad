"""Measure the accuracy of methods, one cell at a time: `python -m benchmarks.results --help`.

To load the student of the best cell, selected by its accuracy on the validation images:

    from benchmarks.results import best_student
    network = best_student("STORE", "resnet56_resnet20_100")
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def best_student(store: str | Path, pair: str, method: str | None = None) -> nn.Module:
    """Load a pair's student with the highest validation accuracy among the cells of a store.

    Args:
        store: Folder of the store, with weights (those in the repository contain results only).
        pair: Name of the pair.
        method: Name of the method; `None` selects the best of all methods.

    Returns:
        The network in eval mode, with the weights of its best checkpoint, rounded to float16.

    Raises:
        ValueError: If no such cell is finished.
    """
    from benchmarks.results.plan import TEACHER
    from benchmarks.results.store import Store
    from lkd.models import load_weights

    results = [
        record
        for record in Store(Path(store)).results()
        if record["pair"] == pair and record["method"] != TEACHER and method in (None, record["method"])
        if record["best"]["weights"] and Store(Path(store)).is_current(record)
    ]
    if not results:
        raise ValueError(f"{store} has no finished cell of {pair}{f' with {method}' if method else ''}")
    best = max(results, key=lambda record: float(record["best"]["val"]))
    module, _, name = best["network"]["class_path"].rpartition(".")
    network = getattr(import_module(module), name)(**best["network"].get("init_args", {}))
    return load_weights(network, Store(Path(store)).weights(best["id"])).eval()
