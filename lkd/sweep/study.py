"""Study: trials in a storage that is shared by all processes of a search."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from lkd._compat import trial_id
from lkd.callbacks.checkpoint import locked
from lkd.sweep.fitting import Outcome, Plan
from lkd.sweep.options import Options
from lkd.sweep.space import Space, grid, suggest

_FACTS, _PLACE, REASON = "lkd: made of", "lkd: place", "lkd: reason"
_FREE = ("ckpt_path", "config", "last_checkpoint", "trainer.default_root_dir", "trainer.enable_", "trainer.log_every")
"""Settings that do not affect the value of a trial."""
_SPACE = "the space's "
_PATIENCE = 60.0  # seconds that SQLite waits for another process


class Claim(NamedTuple):
    """Trial that is assigned to this process exclusively.

    Attributes:
        trial: The trial.
        settings: Settings of the trial, by their dotted names.
        resumed: Whether the trial was started by another process, which has ended.
        lock: File descriptor of the lock, to be closed.
    """

    trial: Trial
    settings: dict[str, Any]
    resumed: bool
    lock: int | None


class Study:
    """Trials of a search, and their assignment to processes.

    Each trial has a folder with a lock. The process of the trial holds the lock, and the operating system releases it
    when this process ends in any way. Trials are started and resumed under the lock of the study's folder. Therefore,
    processes that share the folder never train the same trial, and never start more trials than requested.

    The settings of a new trial are sampled from its number and the results of earlier trials, so an interrupted study
    resumes exactly.

    Args:
        plan: Settings that all trials have in common.
        space: Search space.
        options: Options of the sweep.

    Attributes:
        name: Name of the run, followed by that of the study.
        folder: Folder of the study.

    Raises:
        ValueError: If a different study of this name exists, or there are trials without a study.
    """

    def __init__(self, plan: Plan, space: Space, options: Options) -> None:
        self.plan, self.space, self._options = plan, space, options
        self.name = f"{plan.name}/{options.study}"
        self.folder = plan.root / self.name
        self._pruner = _pruner(options.pruner, plan)
        self._place = f"{platform.node()}:{self.folder.resolve()}"
        with self.alone():
            self._storage = _storage(options.storage, self.folder)
            self._open(_facts(plan, space, options))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the study, so that no other process changes the study or its files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows: one process at a time
            yield
            return
        with (self.folder / ".lock").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def _open(self, facts: dict[str, Any]) -> None:
        """Load the study, or create it."""
        if self.name not in optuna.study.get_all_study_names(self._storage) and (
            left := sorted(self.folder.glob("trial_*"))
        ):
            raise ValueError(
                f"{left[0]} belongs to a study that is not in this storage; give the --storage of that study or "
                f"another --study NAME, or remove {self.folder}"
            )
        direction: Literal["minimize", "maximize"] = "minimize" if self.plan.mode == "min" else "maximize"
        study = optuna.create_study(
            study_name=self.name, storage=self._storage, direction=direction, load_if_exists=True
        )
        begun = study.user_attrs.get(_FACTS)
        if begun is None:
            study.set_user_attr(_FACTS, facts)
        elif changes := list(_changes(begun, facts)):
            more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
            raise ValueError(
                f"the study in {self.folder} was started with {', '.join(changes[:4])}{more}; restore these settings, "
                "give another --study NAME, or remove the folder if you no longer need it"
            )

    def _study(self, number: int = 0) -> optuna.Study:
        """Return the Optuna study with the sampler for a trial number."""
        sampler = _sampler(self._options.sampler, self.space, self._options.seed, number)
        return optuna.load_study(study_name=self.name, storage=self._storage, sampler=sampler, pruner=self._pruner)

    @property
    def optuna(self) -> optuna.Study:
        """Study object of Optuna."""
        return self._study()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All started trials, ordered by number."""
        return self._study().get_trials(deepcopy=False)

    @property
    def best(self) -> FrozenTrial | None:
        """Best completed trial, the first one in case of a tie; None if no trial is complete."""
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        sign = 1 if self.plan.mode == "min" else -1
        return min(done, key=lambda trial: sign * float(trial.value or 0.0), default=None)

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / f"trial_{number:04}"

    def claim(self, total: int) -> Claim | None:
        """Assign an interrupted trial or a new trial to this process.

        Args:
            total: Total number of trials.

        Returns:
            The trial; None if all trials are finished or assigned to other processes.
        """
        with self.alone():
            trials = self.trials
            for trial in trials:
                if trial.state == TrialState.RUNNING and (claim := self._taken_up(trial)):
                    return claim
            return self._begun() if len(trials) < total else None

    def _taken_up(self, left: FrozenTrial) -> Claim | None:
        forced = left.number in (*self._options.take_over, *self._options.give_up)
        if left.user_attrs.get(_PLACE) != self._place and not forced:
            return None
        try:
            lock = locked(self.trial_folder(left.number))
        except ValueError:  # locked by another process
            return None
        if lock is None and not forced:  # no locks here, so its process may be running
            return None
        trial = Trial(self._study(left.number), trial_id(left))
        claim = Claim(trial, suggest(trial, self.space), True, lock)
        if left.number in self._options.give_up:
            self.finish(claim, Outcome(TrialState.FAIL, reason="marked as failed by --give_up"))
            return None
        trial.set_user_attr(_PLACE, self._place)
        return claim

    def _begun(self) -> Claim:
        study_id = self._storage.get_study_id_from_name(self.name)
        # created together with its place, so other processes always see to which one it is assigned
        new = create_trial(state=TrialState.RUNNING, user_attrs={_PLACE: self._place})
        new_id = self._storage.create_new_trial(study_id, template_trial=new)
        number = self._storage.get_trial(new_id).number
        lock = locked(self.trial_folder(number))
        trial = Trial(self._study(number), new_id)
        return Claim(trial, suggest(trial, self.space), False, lock)

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Store the result of a trial, and release it."""
        trial = claim.trial
        if self._storage.get_trial(trial_id(trial)).state.is_finished():  # taken over while this process was running
            print(f"trial {trial.number} was already finished by another process; its value is kept", flush=True)
        else:
            if outcome.reason:
                trial.set_user_attr(REASON, outcome.reason)
            trial.study.tell(trial, outcome.value, outcome.state)
        self.give_back(claim)

    @staticmethod
    def give_back(claim: Claim) -> None:
        """Release the lock, so that other processes can resume the trial."""
        if claim.lock is not None:
            os.close(claim.lock)

    def elsewhere(self, trial: FrozenTrial) -> str:
        """Return the machine and folder of a trial; empty if they are those of this process."""
        place = str(trial.user_attrs.get(_PLACE, "an unknown place"))
        return "" if place == self._place else place


def _storage(given: str | None, folder: Path) -> BaseStorage:
    """Open the storage of a study.

    SQLite files survive kills and power failures. On network file systems, where SQLite's locks are unreliable, a
    journal file is preferable.
    """
    given = given or f"sqlite:///{folder / 'study.db'}"
    if "://" not in given:
        path = Path(given)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in (".db", ".sqlite", ".sqlite3"):
            return get_storage(JournalStorage(JournalFileBackend(str(path))))
        given = f"sqlite:///{path}"
    waits = {"connect_args": {"timeout": _PATIENCE}} if given.startswith("sqlite") else {}
    try:
        return get_storage(RDBStorage(given, engine_kwargs=waits))
    except Exception as error:  # database drivers may be missing or raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--storage {given} cannot be opened: {reason}") from error


def _sampler(kind: str, space: Space, seed: int, number: int) -> BaseSampler:
    """Return the sampler for a trial number, seeded by this number; otherwise a new process would repeat samples."""
    if kind == "grid":
        return _Grid(grid(space), seed=seed)
    seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return RandomSampler(seed=seed) if kind == "random" else TPESampler(seed=seed)


class _Grid(GridSampler):
    """Grid sampler in which the number of a trial is the number of its cell."""

    def after_trial(self, *_: Any) -> None:
        """Do not stop the study; the base class would, but `Study.claim` limits the number of trials."""


def _pruner(kind: str, plan: Plan) -> BasePruner:
    if kind == "hyperband":
        return HyperbandPruner(max_resource=plan.max_epochs or "auto")
    if kind == "halving":
        return SuccessiveHalvingPruner()
    return MedianPruner() if kind == "median" else NopPruner()


def _facts(plan: Plan, space: Space, options: Options) -> dict[str, Any]:
    """Return the settings that determine the trials of a study, by name."""
    searched = tuple(f"{key}." for key in space)
    config = {key: value for key, value in _leaves(plan.config) if not f"{key}.".startswith((*_FREE, *searched))}
    ranges = {f"{_SPACE}{key}": _shown(distribution) for key, distribution in space.items()}
    asked = {"--sampler": options.sampler, "--sampler_seed": options.seed, "--pruner": options.pruner}
    return {**ranges, **asked, "checkpoint.mode": plan.mode, **config}


def _leaves(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, config


def _shown(distribution: BaseDistribution) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in distribution._asdict().items())
    return f"{type(distribution).__name__.removesuffix('Distribution')}({settings})"


def _changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield descriptions of changed settings; settings that a newer lkd added or removed are ignored."""
    for name in {**now, **begun}:
        both = name in begun and name in now
        if (both or name.startswith(_SPACE)) and begun.get(name) != now.get(name):
            old, new = (str(facts.get(name, "nothing")) for facts in (begun, now))
            yield f"{name} {old[:80]} (now {new[:80]})"
