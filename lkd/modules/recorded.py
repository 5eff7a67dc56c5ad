"""Recording of the seed in loggers and checkpoints."""

from __future__ import annotations

import os

from lightning.fabric.utilities.data import AttributeDict

from lkd.modules.replay import ReplayableModule


def global_seed() -> dict[str, int]:
    """Return the seed as `{"seed_everything": seed}`, or an empty dict if `seed_everything` was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {} if seed is None else {"seed_everything": int(seed)}


class RecordedModule(ReplayableModule):
    """A LightningModule whose loggers and checkpoints record the seed.

    The seed is not an argument of the module, so `hyper_parameters` in a checkpoint, from which `load_from_checkpoint`
    builds the module, does not hold it; `checkpoint["lkd"]` does.
    """

    @property
    def hparams_initial(self) -> AttributeDict:
        """Hyperparameters that loggers record: those of `save_hyperparameters` and the seed."""
        return AttributeDict({**global_seed(), **super().hparams_initial})
