"""Text representation of trials and their settings."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lkd.sweep.space import short_names


def format_state(trial: FrozenTrial) -> str:
    """Return the state of a trial as a lower-case word."""
    return {TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower())


def format_settings(settings: dict[str, Any]) -> str:
    """Return settings with shortened names: `temperature 3.21, distill_weight 0.5`."""
    names = short_names(list(settings))
    return ", ".join(f"{names[key]} {format_value(value)}" for key, value in settings.items())


def format_value(value: Any) -> str:
    """Return the value of a setting; floating-point numbers have four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
