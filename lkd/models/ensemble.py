"""Ensembles of networks."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ensemble(nn.Module):
    r"""Ensemble of several networks, which averages their logits or their probabilities.

    $$ z = \sum_k w_k z_k \quad \text{or} \quad z = \log \sum_k w_k \, \mathrm{softmax}(z_k), \qquad \sum_k w_k = 1 $$

    The mean of the logits equals, up to a constant, the logarithm of the geometric mean of the probabilities. It
    preserves the scale of the logits, and thus the effect of a temperature. A `DistillModule` with an ensemble as
    teacher imitates the averaged outputs. The logits of the individual networks are the outputs of the layers
    `members.0`, `members.1`, ..., to which `lkd.losses.MultiTeacher` compares the student one by one. Weights of a
    member can be loaded with `lkd.models.load_weights`, which can be used in YAML like any function that returns a
    network: `{class_path: lkd.models.load_weights, init_args: {network: {class_path: ...}, path: best.ckpt}}`.

    Args:
        networks: Members, at least one; each returns logits `(B, K)` of the same classes.
        weights: Positive weight of each member, normalized to sum to 1. `None` weights all members equally.
        mean_of: Quantity that is averaged: `logits`, or `probabilities`, in which case the ensemble returns their
            logarithms.

    Raises:
        ValueError: If there are no members, the number of weights differs from the number of members, or a weight is
            not positive.

    Example:
        >>> ensemble = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], weights=[3.0, 1.0])
        >>> ensemble(torch.zeros(2, 4)).shape, ensemble.weights.tolist()
        (torch.Size([2, 3]), [0.75, 0.25])
    """

    weights: Tensor

    def __init__(
        self,
        networks: list[nn.Module],
        weights: list[float] | None = None,
        mean_of: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__()
        if not networks:
            raise ValueError("Ensemble requires at least one network")
        weights = [1.0] * len(networks) if weights is None else weights
        if len(weights) != len(networks) or not min(weights) > 0:
            raise ValueError(
                f"Ensemble requires one weight greater than 0 for each of its {len(networks)} networks, got {weights}"
            )
        self.members = nn.ModuleList(networks)
        self.mean_of = mean_of
        self.register_buffer("weights", torch.tensor(weights) / sum(weights), persistent=False)

    def extra_repr(self) -> str:
        """Settings of the ensemble, for `repr` and for the identification of cached logits."""
        return f"mean_of={self.mean_of!r}"

    def forward(self, input: Tensor) -> Tensor:
        """Compute the averaged logits of all members.

        Args:
            input: Input of each member.

        Returns:
            Logits `(B, K)`, or logarithms of the averaged probabilities.

        Raises:
            ValueError: If the members have different numbers of classes.
        """
        logits: list[Tensor] = [member(input) for member in self.members]
        if len(classes := {member_logits.shape[1] for member_logits in logits}) > 1:
            raise ValueError(f"all members of Ensemble must have the same number of classes, got {sorted(classes)}")
        stacked, weights = torch.stack(logits), self.weights.view(-1, 1, 1)
        if self.mean_of == "logits":
            return (weights * stacked).sum(0)
        return (F.log_softmax(stacked, dim=2) + weights.log()).logsumexp(0)
