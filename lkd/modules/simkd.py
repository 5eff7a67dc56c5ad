"""Training of a student that reuses the teacher's classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lkd.features.layers import feature_layers
from lkd.losses import SimKD
from lkd.modules.checks import warn_of_unused_outputs
from lkd.modules.distill import DistillModule
from lkd.types import Batch, Outputs


class SimKDModule(DistillModule):
    """A `DistillModule` whose student uses the teacher's classifier, as copied by `lkd.losses.SimKD`.

    In training, validation, test and prediction, the student consists of its own layers up to the last feature map, the
    projector of the criterion, and the teacher's classifier. Its own classifier is neither used nor trained. The
    checkpoint contains all of these; load the whole module (`LightningModule.load_from_checkpoint`), not only the
    weights of the student.

    The arguments are those of `DistillModule`; the criterion must be a `SimKD`, or a `WeightedSum` that contains one.
    The paper uses no loss with the labels, which corresponds to `hard_weight=0`.

    References:
        Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022 (arXiv 2203.14001).
    """

    @property
    def simkd(self) -> SimKD:
        """The `SimKD` criterion, which holds the projector and the teacher's classifier.

        Raises:
            ValueError: If the criterion does not contain a `SimKD`.
        """
        for part in self.criterion.modules():
            if isinstance(part, SimKD):
                return part
        raise ValueError(
            f"SimKDModule requires the criterion lkd.losses.SimKD, got {type(self.criterion).__name__}; change the "
            "criterion, or use DistillModule"
        )

    def forward(self, input: Any) -> Tensor:
        """Compute the logits `(B, K)` of the student with the teacher's classifier."""
        logits: Tensor = self.simkd.predict(self.student_extractor(input)).logits
        return logits

    def student_outputs(self, batch: Batch) -> Outputs:
        """Compute the outputs of the student, with the logits of the teacher's classifier."""
        return self.simkd.predict(super().student_outputs(batch))

    def build(self, example: Any) -> None:
        """Check networks and criterion, and freeze the student's own classifier.

        Args:
            example: One blank input.

        Raises:
            ValueError: If the criterion is not `SimKD`, or the teacher's classifier has fewer classes than the data.
        """
        simkd = self.simkd
        super().build(example)
        classes, in_data = simkd.head.out_features, self._data_attribute("num_classes")
        if in_data is not None and in_data > classes:
            raise ValueError(
                f"the data has {in_data} classes, but the teacher's classifier, which the student uses, has only "
                f"{classes}; use a teacher trained on these classes"
            )
        if not self._is_warned:
            self._is_warned = warn_of_unused_outputs(self._trainer, "teacher's classifier", classes, in_data)
        if own := feature_layers(self.student).head:  # DDP rejects trainable parameters without a gradient
            self.student.get_submodule(own).requires_grad_(False)
