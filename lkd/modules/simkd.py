"""Training a student that borrows its teacher's classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lkd.features.layers import feature_layers
from lkd.losses import SimKD
from lkd.modules.checks import warn_of_unused_outputs
from lkd.modules.distill import DistillModule
from lkd.types import Batch, Outputs


class SimKDModule(DistillModule):
    """A `DistillModule` whose student answers with the teacher's classifier, as `lkd.losses.SimKD` has copied it.

    In training, validation, test and prediction the student is its own layers up to the map, the criterion's projector
    and the teacher's classifier. Its own classifier is not used, and does not train. A checkpoint has all of it; to get
    it back, load the whole module (`LightningModule.load_from_checkpoint`), not the student's weights alone.

    The arguments are those of `DistillModule`; the criterion must be a `SimKD`, or a `WeightedSum` with one in it. The
    paper has no loss with the labels: `hard_weight` 0.

    References:
        Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022 (arXiv 2203.14001).
    """

    @property
    def simkd(self) -> SimKD:
        """The criterion that has projector and classifier.

        Raises:
            ValueError: If there is none.
        """
        for part in self.criterion.modules():
            if isinstance(part, SimKD):
                return part
        raise ValueError(
            f"SimKDModule's student answers with what the criterion SimKD keeps, got {type(self.criterion).__name__}; "
            "set criterion to lkd.losses.SimKD, or take DistillModule"
        )

    def forward(self, input: Any) -> Tensor:
        """Logits `(B, K)` of the student, by the teacher's classifier."""
        return self.simkd.answer(self.student_taps(input)).logits

    def student_outputs(self, batch: Batch) -> Outputs:
        """What the student says of a batch, with the logits of the teacher's classifier."""
        return self.simkd.answer(super().student_outputs(batch))

    def build(self, example: Any) -> None:
        """Check networks and criterion; the student's own classifier leaves the training.

        Args:
            example: One blank input.

        Raises:
            ValueError: If the criterion is another, or the teacher's classifier has fewer classes than the data.
        """
        simkd = self.simkd
        super().build(example)
        classes, in_data = simkd.head.out_features, self._data_attribute("num_classes")
        if in_data is not None and in_data > classes:
            raise ValueError(
                f"the data has {in_data} classes, the teacher's classifier, which the student borrows, only {classes}; "
                "take a teacher that was trained for these classes"
            )
        if not self._is_warned:
            self._is_warned = warn_of_unused_outputs(self._trainer, "teacher's classifier", classes, in_data)
        if own := feature_layers(self.student).head:  # DDP refuses parameters that train and get no gradient
            self.student.get_submodule(own).requires_grad_(False)
