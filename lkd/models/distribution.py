"""FCOS head that predicts distributions over the distances to the sides of a box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead, FCOSRegressionHead


class _DistributionBranch(FCOSRegressionHead):  # type: ignore[misc]  # torchvision is not typed
    """Box branch that predicts logits over reg_max + 1 distances for each side."""

    def __init__(self, in_channels: int, num_convs: int, reg_max: int) -> None:
        super().__init__(in_channels, 1, num_convs)
        self.bbox_reg = nn.Conv2d(in_channels, 4 * (reg_max + 1), 3, padding=1)
        nn.init.normal_(self.bbox_reg.weight, std=0.01)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits `(B, N, 4 * (reg_max + 1))` and the centerness `(B, N, 1)`."""
        features = [self.conv(level) for level in x]
        logits, centerness = (
            torch.cat([layer(feature).flatten(2).transpose(1, 2) for feature in features], 1)
            for layer in (self.bbox_reg, self.bbox_ctrness)
        )
        return logits, centerness


class DistributionHead(FCOSHead):  # type: ignore[misc]  # torchvision is not typed
    """FCOS head that predicts box distributions, for example for localization distillation (`lkd.losses.LD`).

    For each side of a box, the head predicts logits over the distances 0, 1, ..., reg_max, in units of the anchor's
    size. The predicted distance is the expected value. The loss consists of the losses of FCOS and the distribution
    focal loss: the cross-entropy with the two integers next to the true distance, averaged over sides and assigned
    anchors, with the authors' weight 0.25.

    Args:
        in_channels: Number of channels of the pyramid, a multiple of 32.
        num_classes: Number of classes, including the background.
        num_convs: Number of convolutions of each branch.
        reg_max: Largest distance, at least 1.

    References:
        Li et al.: Generalized Focal Loss: Learning Qualified and Distributed Bounding Boxes for Dense Object Detection,
        NeurIPS 2020 (arXiv 2006.04388). Class scores and centerness remain those of FCOS.
    """

    def __init__(self, in_channels: int, num_classes: int, num_convs: int, reg_max: int) -> None:
        super().__init__(in_channels, 1, num_classes, num_convs)
        self.regression_head = _DistributionBranch(in_channels, num_convs, reg_max)
        self.reg_max = reg_max

    def forward(self, x: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return class logits, distances, centerness and the logits of the distributions of all anchors."""
        logits, centerness = self.regression_head(x)
        probability = logits.float().unflatten(2, (4, -1)).softmax(3)
        distance = torch.arange(self.reg_max + 1, dtype=torch.float32, device=logits.device)
        return {
            "cls_logits": self.classification_head(x),
            "bbox_regression": (probability * distance).sum(3),
            "bbox_ctrness": centerness,
            "bbox_distribution": logits,
        }

    def compute_loss(
        self,
        targets: Sequence[Mapping[str, Tensor]],
        head_outputs: Mapping[str, Tensor],
        anchors: Sequence[Tensor],
        matched_idxs: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses of FCOS and the distribution focal loss."""
        losses: dict[str, Any] = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        matched = torch.stack(list(matched_idxs)) >= 0
        distance = torch.cat(
            [
                self.box_coder.encode(own[index >= 0], target["boxes"][index[index >= 0]])
                for target, own, index in zip(targets, anchors, matched_idxs, strict=True)
            ]
        )
        logits = head_outputs["bbox_distribution"][matched].view(-1, self.reg_max + 1)
        losses["bbox_distribution"] = 0.25 * distribution_focal_loss(logits, distance.flatten())
        return losses


def distribution_focal_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """Mean cross-entropy with the two integers next to a distance, weighted by their proximity.

    Args:
        logits: Logits over the distances 0, 1, ..., M - 1 `(N, M)`; N may be 0.
        distance: Distances `(N,)`; larger ones count as M - 1.

    Returns:
        Scalar loss in nats; 0 if N is 0.

    References:
        Li et al.: Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), equation 6.

    Example:
        >>> round(distribution_focal_loss(torch.zeros(1, 4), torch.tensor([1.5])).item(), 4)  # log 4
        1.3863
    """
    distance = distance.clamp(0, logits.shape[1] - 1)
    lower = distance.floor().clamp(max=logits.shape[1] - 2).long()
    share = distance - lower
    below, above = (F.cross_entropy(logits, index, reduction="none") for index in (lower, lower + 1))
    return ((1 - share) * below + share * above).sum() / max(1, len(distance))
