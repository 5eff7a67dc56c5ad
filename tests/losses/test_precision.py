"""Functions of tensors compute in float32 or higher precision."""

from __future__ import annotations

import torch

from lkd import functional as KF


def test_keyword_arguments_are_converted() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 8, 4, 4, generator=generator).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        named = KF.nst_loss(student_feature=ours, teacher_feature=theirs)
        mixed = KF.nst_loss(ours, teacher_feature=theirs)
    assert named.dtype == mixed.dtype == torch.float32
    assert torch.equal(named, KF.nst_loss(ours, theirs))
    assert torch.equal(mixed, named)
