"""Criteria that compare the samples of a batch with one another or with a memory."""

from lkd.losses import CC, CRD, PKT, RKD, SP, InstanceCTKD
from tests.losses.cases.base import FeatureCase

VECTORS = {"student": {"a": (6,)}, "teacher": {"c": (9,)}}
MAPS = {"student": {"a": (4, 8, 8), "b": (6, 4, 4)}, "teacher": {"c": (4, 8, 8), "d": (6, 4, 4)}}
SAME = {"student": {"a": (6,)}, "teacher": {"c": (6,)}}
MEMORIES = ("student_memory", "teacher_memory", "targets")


def _crd(num_negatives: int = 16, own_class: bool = False) -> CRD:
    return CRD("a", "c", num_samples=20, feat_dim=5, num_negatives=num_negatives, own_class=own_class)


CASES = {
    "CC": FeatureCase(lambda: CC(["a"], ["c"], feat_dim=5), **VECTORS),
    "CC-bilinear": FeatureCase(
        lambda: CC(["a"], ["c"], feat_dim=None, kernel="bilinear"), **SAME, zero_at_equality=True
    ),
    "CC-maps": FeatureCase(lambda: CC(["a", "b"], ["c", "d"], feat_dim=5, order=4), **MAPS),
    "CC-neighbours": FeatureCase(lambda: CC(["a"], ["c"], feat_dim=5, form="neighbours"), **VECTORS),
    "CC-plain": FeatureCase(lambda: CC(["a"], ["c"], feat_dim=None), **SAME, zero_at_equality=True),
    "CRD": FeatureCase(_crd, **VECTORS, memories=MEMORIES),
    "CRD-all": FeatureCase(lambda: _crd(own_class=True), **VECTORS, memories=MEMORIES),
    "CRD-views": FeatureCase(_crd, **VECTORS, views=2, memories=MEMORIES),
    "InstanceCTKD": FeatureCase(InstanceCTKD, zero_at_equality=True, batch_mean=True, lr=0.2),
    "PKT": FeatureCase(lambda: PKT(["a"], ["c"]), **SAME, zero_at_equality=True),
    "PKT-sizes": FeatureCase(lambda: PKT(["a"], ["c"]), **VECTORS),
    "RKD": FeatureCase(lambda: RKD(["a"], ["c"]), **SAME, zero_at_equality=True),
    "RKD-maps": FeatureCase(lambda: RKD(["a", "b"], ["c", "d"], squared=True), **MAPS, zero_at_equality=True),
    "RKD-sizes": FeatureCase(lambda: RKD(["a"], ["c"]), **VECTORS),
    "SP": FeatureCase(lambda: SP(["a", "b"], ["c", "d"]), **MAPS, zero_at_equality=True),
    "SP-sizes": FeatureCase(lambda: SP(["a"], ["c"]), **VECTORS),
}
