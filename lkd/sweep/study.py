"""A study: its trials in a storage, shared by all processes that work at it."""

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

from lkd.callbacks.checkpoint import locked
from lkd.sweep.fitting import Outcome, Plan
from lkd.sweep.options import Options
from lkd.sweep.space import Space, grid, suggest

_FACTS, _PLACE, REASON = "lkd: made of", "lkd: place", "lkd: reason"
_FREE = ("ckpt_path", "config", "last_checkpoint", "trainer.default_root_dir", "trainer.enable_", "trainer.log_every")
"""Settings that change nothing in a trial's value."""
_SPACE = "the space's "
_PATIENCE = 60.0  # seconds that SQLite waits for another process


class Claim(NamedTuple):
    """A trial that this process, and no other, works at.

    Args:
        trial: The trial.
        settings: Its settings, by their dotted names.
        goes_on: Whether a process has begun it that is gone.
        lock: What keeps it, to be closed.
    """

    trial: Trial
    settings: dict[str, Any]
    goes_on: bool
    lock: int | None


class Study:
    """The trials of one search, and who works at which.

    Each trial has a folder with a lock, which its process keeps and the system gives back when that process is gone,
    however it ended. Trials are begun and taken up under the lock of the study's folder. So processes that share the
    folder never work at the same trial, nor begin more than are wanted.

    What a new trial tries is drawn by its number and what was measured before it: a study that was interrupted goes on
    as one that was not.

    Args:
        plan: What all trials have in common.
        space: What they differ in.
        options: What the sweep was asked for.

    Attributes:
        name: The run's and the study's.
        folder: Where all of it lies.

    Raises:
        ValueError: If there is a study of that name that is another one, or trials without their study.
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
        """Wait until no other process changes the study or its files, and keep it so."""
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
        """Find the study, or make it."""
        if self.name not in optuna.study.get_all_study_names(self._storage) and (
            left := sorted(self.folder.glob("trial_*"))
        ):
            raise ValueError(
                f"{left[0]} is of a study that {self.folder} has no trace of; give its --storage, another --study "
                f"NAME, or remove {self.folder}"
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
                f"the study in {self.folder} was begun with {', '.join(changes[:4])}{more}; take that of then, give "
                "another --study NAME, or remove the folder if it is of no use"
            )

    def _study(self, number: int = 0) -> optuna.Study:
        """The study, as it draws the trial of a number."""
        sampler = _sampler(self._options.sampler, self.space, self._options.seed, number)
        return optuna.load_study(study_name=self.name, storage=self._storage, sampler=sampler, pruner=self._pruner)

    @property
    def optuna(self) -> optuna.Study:
        """The study as Optuna has it."""
        return self._study()

    @property
    def trials(self) -> list[FrozenTrial]:
        """All that have been begun, by their numbers."""
        return self._study().get_trials(deepcopy=False)

    @property
    def best(self) -> FrozenTrial | None:
        """The best that is complete; of several, the first."""
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        sign = 1 if self.plan.mode == "min" else -1
        return min(done, key=lambda trial: sign * float(trial.value or 0.0), default=None)

    def trial_folder(self, number: int) -> Path:
        """Where a trial's runs lie."""
        return self.folder / f"trial_{number:04}"

    def claim(self, total: int) -> Claim | None:
        """Take up a trial whose process is gone, or begin one.

        Args:
            total: How many there are to be.

        Returns:
            The trial; None if all are done, or others work at them.
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
        except ValueError:  # another process has it
            return None
        if lock is None and not forced:  # who knows
            return None
        trial = Trial(self._study(left.number), left._trial_id)
        claim = Claim(trial, suggest(trial, self.space), True, lock)
        if left.number in self._options.give_up:
            self.finish(claim, Outcome(TrialState.FAIL, reason="given up by --give_up"))
            return None
        trial.set_user_attr(_PLACE, self._place)
        return claim

    def _begun(self) -> Claim:
        study_id = self._storage.get_study_id_from_name(self.name)
        # at one stroke with its place: whoever sees it knows whose it is
        new = create_trial(state=TrialState.RUNNING, user_attrs={_PLACE: self._place})
        trial_id = self._storage.create_new_trial(study_id, template_trial=new)
        number = self._storage.get_trial(trial_id).number
        lock = locked(self.trial_folder(number))
        trial = Trial(self._study(number), trial_id)
        return Claim(trial, suggest(trial, self.space), False, lock)

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Write down what a trial has come to, and give it back."""
        trial = claim.trial
        if self._storage.get_trial(trial._trial_id).state.is_finished():  # taken over, though this process was alive
            print(f"trial {trial.number} has been finished by another process; its value stays", flush=True)
        else:
            if outcome.reason:
                trial.set_user_attr(REASON, outcome.reason)
            trial.study.tell(trial, outcome.value, outcome.state)
        self.give_back(claim)

    @staticmethod
    def give_back(claim: Claim) -> None:
        """Let others take the trial up."""
        if claim.lock is not None:
            os.close(claim.lock)

    def elsewhere(self, trial: FrozenTrial) -> str:
        """Where a trial runs, if that is somewhere else than here."""
        place = str(trial.user_attrs.get(_PLACE, "an unknown place"))
        return "" if place == self._place else place


def _storage(given: str | None, folder: Path) -> BaseStorage:
    """SQLite is whole after a kill and a power cut; on a network's disk, where its locks fail, a journal is better."""
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
    except Exception as error:  # whatever a database's driver raises, if there is one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--storage {given} cannot be opened: {reason}") from error


def _sampler(kind: str, space: Space, seed: int, number: int) -> BaseSampler:
    """What draws the trial of a number, by that number: a new process would else draw the first ones again."""
    if kind == "grid":
        return _Grid(grid(space), seed=seed)
    seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return RandomSampler(seed=seed) if kind == "random" else TPESampler(seed=seed)


class _Grid(GridSampler):
    """Optuna's: a trial's number is its cell's."""

    def after_trial(self, *_: Any) -> None:
        """Nothing: Optuna's stops its own loop here, and this is none of its loops."""


def _pruner(kind: str, plan: Plan) -> BasePruner:
    if kind == "hyperband":
        return HyperbandPruner(max_resource=plan.max_epochs or "auto")
    if kind == "halving":
        return SuccessiveHalvingPruner()
    return MedianPruner() if kind == "median" else NopPruner()


def _facts(plan: Plan, space: Space, options: Options) -> dict[str, Any]:
    """What the trials of a study are made of, by name."""
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
    """What differs, for a sentence; a config may have got settings, and lost some, with a newer lkd."""
    for name in {**now, **begun}:
        both = name in begun and name in now
        if (both or name.startswith(_SPACE)) and begun.get(name) != now.get(name):
            old, new = (str(facts.get(name, "nothing")) for facts in (begun, now))
            yield f"{name} {old[:80]} (now {new[:80]})"
