"""Recording of the seed in loggers and checkpoints."""

from __future__ import annotations

import inspect
import os

from lightning.fabric.utilities.data import AttributeDict

from lkd.modules.replay import ReplayableModule


def global_seed() -> dict[str, int]:
    """Return the seed as `{"seed_everything": seed}`, or an empty dict if `seed_everything` was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {} if seed is None else {"seed_everything": int(seed)}


def inner_arguments(kind: type) -> list[str]:
    """Return the constructor arguments of the base classes that the class itself does not accept.

    If saved as hyperparameters, they would be passed to the class when it is loaded from a checkpoint.
    """
    makers = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    signatures = [inspect.signature(maker).parameters for maker in makers if inspect.isfunction(maker)]
    taken: set[str] = set()
    for parameters in signatures:  # the class's own first
        taken |= set(parameters)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return sorted({name for parameters in signatures for name in parameters} - taken)


class RecordedModule(ReplayableModule):
    """A LightningModule whose loggers and checkpoints record the seed.

    The seed is not an argument of the module, so `hyper_parameters` in a checkpoint, from which `load_from_checkpoint`
    builds the module, does not hold it; `checkpoint["lkd"]` does.
    """

    @property
    def hparams_initial(self) -> AttributeDict:
        """Hyperparameters that loggers record: those of `save_hyperparameters` and the seed."""
        return AttributeDict({**global_seed(), **super().hparams_initial})
