"""Measure the host time of a training step: the Python overhead when the device does the computation.

    python -m benchmarks.host [--steps 2000] [--out FILE]

`lkd fit` trains tiny networks with TensorBoard, progress bar, metrics and checkpoints. Replays of the captured step and
of the captured batch are replaced with no-ops, so only the Python code of lkd and Lightning remains. Lightning alone is
timed, too. A GPU waits for the host only if its step takes less time than this.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.speed import TINY, machine
from lkd import devices

HEAD = (
    "# Host time per step",
    "`python -m benchmarks.host` measures the Python overhead of a training step on a device that runs the whole step\n"
    "as a graph: the graphs of the step and of the batch are replaced with no-ops.",
)
"""Title and introduction of the report."""


class Hollow:
    """Capture whose replays first execute the function, so that checks pass, and later do nothing.

    Attributes:
        is_hollow: Whether replays do nothing.
    """

    scalar = torch.float64
    is_hollow = False

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Run the function."""
        return function()

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run the function; a replay runs it again, into the same tensors."""
        result = function()

        def replay() -> None:
            if not Hollow.is_hollow:
                for own, new in zip(tree_leaves(result), tree_leaves(function()), strict=True):
                    if isinstance(own, Tensor):
                        own.copy_(new)

        return result, replay


class Clock(L.Callback):
    """Time steps in rounds, first without and then with a profiler, and stop the run.

    Attributes:
        rounds: Seconds per step in each round of the latest run.
        profile: Profile of one more round of each run.
        steps: Number of steps of ten rounds.
    """

    rounds: ClassVar[list[float]] = []
    profile: ClassVar[cProfile.Profile] = cProfile.Profile()
    steps: ClassVar[int] = 2000

    def __init__(self) -> None:
        self._seen = 0
        self._since = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start a round or end the run."""
        warm_up, size = 50, Clock.steps // 10
        number, place = divmod(self._seen - warm_up, size)
        self._seen += 1
        if number < 0 or place:
            return
        Hollow.is_hollow = True
        now = time.perf_counter()
        if 0 < number <= 10:
            Clock.rounds.append((now - self._since) / size)
        if number == 10:
            Clock.profile.enable()
        if number == 11:
            Clock.profile.disable()
            trainer.should_stop = True
        self._since = time.perf_counter()


class Empty(L.LightningModule):
    """A module whose training step does nothing, as in a replay that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a loss without computing anything."""
        return self.weight

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Do nothing."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        """Run the step only."""
        closure()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create an optimizer that is never used."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lightning_alone() -> list[float]:
    """Time `Empty` in a Trainer without logger, progress bar and checkpoints; return the seconds per step."""
    Clock.rounds = []
    settings: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[Clock()], enable_model_summary=False, **settings)
    trainer.fit(Empty(), repeat(torch.zeros(1), 100 + 12 * Clock.steps // 10))
    return Clock.rounds


def spread(seconds: list[float]) -> str:
    """Describe the median and range of times per step, in milliseconds."""
    times = [1e3 * value for value in seconds]
    return f"{statistics.median(times):.2f} ms ({min(times):.2f} to {max(times):.2f})"


def shares(profile: cProfile.Profile) -> dict[str, float]:
    """Compute the share of the profiled self time by package.

    Args:
        profile: Profile of training steps.
    """
    found: Counter[str] = Counter()
    for (path, _, _), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        names = ("lightning", "torchmetrics", "tensorboard", "torch", "rich", "lkd")
        found[next((name for name in names if f"/{name}/" in path), "Python and built-in functions")] += own
    total = sum(found.values())
    return {name: seconds / total for name, seconds in found.most_common()}


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    Clock.steps = options.steps
    devices.step_capture = lambda device: Hollow()
    from lkd.__main__ import main as run

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tiny.yaml").write_text(TINY.replace("IMAGES", "26600"))
        here = Path.cwd()
        os.chdir(folder)
        callbacks = "--trainer.callbacks+=benchmarks.host.Clock"
        code = run(["fit", "--config=tiny.yaml", callbacks, "--trainer.accelerator=cpu"])
        os.chdir(here)
    if code:
        raise SystemExit(code)
    times = Clock.rounds
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares(Clock.profile).items() if share >= 0.01)
    lines = [
        *HEAD,
        f"Host time per step: {spread(times)}, with TensorBoard, progress bar, metrics and checkpoints.",
        f"Lightning alone: {spread(lightning_alone())}, with an empty training step and no callbacks.",
        f"Medians and ranges of {len(times)} rounds of {options.steps // 10} steps.",
        f"Self time by package, according to the profiler: {parts}.",
        machine(),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    import benchmarks.host

    benchmarks.host.main()  # the run imports its callback from this module
