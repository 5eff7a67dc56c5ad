"""Static tensors of a captured function: signatures, copying, and restoring."""

from __future__ import annotations

import torch

from lkd.devices.capture import Snapshot, copy_into, flat, signature


def test_inputs_that_require_separate_graphs() -> None:
    image = torch.zeros(2, 3)
    inputs = [
        (image,),
        (image.half(),),
        (image[:1],),
        (image.to("meta"),),
        [image],
        (image, 1),
        (image, 1.0),
        (image, 2),
    ]
    assert len({repr(signature(one)) for one in inputs}) == len(inputs)
    assert signature((image + 1, {"a": 1})) == signature((image, {"a": 1}))


def test_tensors_of_all_dtypes_are_copied() -> None:
    static = (
        torch.zeros(2),
        {"target": torch.zeros(2, dtype=torch.int64), "mask": torch.zeros(2, dtype=torch.bool)},
        3,
    )
    new = (torch.ones(2), {"target": torch.tensor([4, 5]), "mask": torch.tensor([True, False])}, 3)
    places = [static[0].data_ptr(), static[1]["target"].data_ptr(), static[1]["mask"].data_ptr()]
    copy_into(static, new)
    assert static[0].tolist() == [1, 1]
    assert static[1]["target"].tolist() == [4, 5]
    assert static[1]["mask"].tolist() == [True, False]
    assert [static[0].data_ptr(), static[1]["target"].data_ptr(), static[1]["mask"].data_ptr()] == places


def test_snapshot_restores_tensors() -> None:
    weight, count = torch.nn.Parameter(torch.ones(3)), torch.tensor(7)
    before = Snapshot([weight, count])
    with torch.no_grad():
        weight.mul_(2)
        count.add_(1)
    before.restore()
    assert weight.tolist() == [1, 1, 1]
    assert count == 7


def test_flat_returns_one_vector_per_dtype() -> None:
    found = flat([torch.zeros(2, 2), torch.ones(1, dtype=torch.int64), torch.ones(3)])
    assert [(vector.dtype, vector.tolist()) for vector in found] == [
        (torch.float32, [0, 0, 0, 0, 1, 1, 1]),
        (torch.int64, [1]),
    ]
