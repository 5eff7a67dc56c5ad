"""Several networks that answer as one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ensemble(nn.Module):
    r"""Several networks that answer as one: the mean of their logits, or of their probabilities.

    $$ z = \sum_k w_k z_k \quad \text{or} \quad z = \log \sum_k w_k \, \mathrm{softmax}(z_k), \qquad \sum_k w_k = 1 $$

    The mean of the logits is, up to a constant, the logarithm of the geometric mean of the probabilities; it keeps the
    logits' size, and so what a temperature does. As the teacher of a `DistillModule` it is imitated as a whole; the
    networks' own answers are the outputs of the layers `members.0`, `members.1`, ..., which `lkd.losses.MultiTeacher`
    compares with one by one. Each member may come with its own weights, by `lkd.models.load_weights`, which YAML can
    name like any function that makes a network:
    `{class_path: lkd.models.load_weights, init_args: {network: {class_path: ...}, path: best.ckpt}}`.

    Args:
        networks: The members, one at least; each returns logits `(B, K)`, of the same classes.
        weights: One positive weight for each, which are divided by their sum; None: all alike.
        mean_of: What is averaged: `logits`, or `probabilities`, whose logarithms the ensemble then returns.

    Raises:
        ValueError: If there is no member, there are as many weights as members not, or one is not positive.

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
            raise ValueError("an Ensemble needs at least one network")
        weights = [1.0] * len(networks) if weights is None else weights
        if len(weights) != len(networks) or not min(weights) > 0:
            raise ValueError(
                f"an Ensemble of {len(networks)} networks needs as many weights, all greater than 0, got {weights}"
            )
        self.members = nn.ModuleList(networks)
        self.mean_of = mean_of
        self.register_buffer("weights", torch.tensor(weights) / sum(weights), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Classify with all members.

        Args:
            input: What each member takes.

        Returns:
            Logits `(B, K)`, or logarithms of probabilities.

        Raises:
            ValueError: If the members have different numbers of classes.
        """
        answers: list[Tensor] = [member(input) for member in self.members]
        if len(classes := {answer.shape[1] for answer in answers}) > 1:
            raise ValueError(f"the members of an Ensemble must have the same classes, got {sorted(classes)} of them")
        stacked, weights = torch.stack(answers), self.weights.view(-1, 1, 1)
        if self.mean_of == "logits":
            return (weights * stacked).sum(0)
        return (F.log_softmax(stacked, dim=2) + weights.log()).logsumexp(0)
