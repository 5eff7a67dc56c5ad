"""Every public function accepts the shapes in its docstring and no others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lkd import functional as KF
from lkd.losses._shapes import check_shapes
from tests.losses.cases import value
from tests.losses.processes import table

SIZES = {"B": 4, "C": 3, "D": 6, "E": 7, "K": 5, "L": 2, "M": 8, "N": 9, "H": 4, "W": 4, "H'": 2, "W'": 2}
TABLE = table()
Shape = tuple[str, ...]


def _documented(function: Callable[..., Any]) -> dict[str, list[Shape]]:
    """Return the shapes that the docstring allows for each argument that is a tensor or a list of tensors."""
    args = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if "Tensor" in str(parameter.annotation):
            text = re.search(rf"^ +{parameter.name}: (.*(?:\n {{5,}}.*)*)", args, re.MULTILINE)
            shapes = re.findall(r"`\((.*?)\)`", text[1]) if text else []
            assert shapes, f"the docstring of {function.__name__} gives no shape of {parameter.name}"
            found[parameter.name] = [tuple(size for size in re.split(r",\s*", shape) if size) for shape in shapes]
    return found


def _size(name: str, layer: int = 0) -> tuple[int, ...]:
    """Return the sizes of one dimension, such as `4 * B`, `K` or `C_l`; `*` and `...` stand for two dimensions."""
    if name in ("*", "..."):
        return (2, 3)
    factor, _, name = name.rpartition(" * ")
    if name.endswith("_l"):
        return (SIZES[name.removesuffix("_l")] + layer,)
    return (int(factor or 1) * (int(name) if name.isdigit() else SIZES[name]),)


def _shape(shape: Shape, layer: int = 0) -> tuple[int, ...]:
    return tuple(size for name in shape for size in _size(name, layer))


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(len(name))
    if name == "target":
        return torch.randint(SIZES["K"], shape)
    return torch.rand(shape) < 0.5 if name == "masked" else torch.rand(shape) + 0.5


SETTINGS: dict[str, Any] = {"image_sizes": [(8, 8), (8, 8)], "size": (4, 4), "num_classes": SIZES["K"]}
"""Arguments without a default that are not tensors."""


def _call(function: Callable[..., Any], shapes: dict[str, Any]) -> Tensor:
    """Call the function with tensors of the shapes; a list of shapes becomes a list of tensors."""
    settings = SETTINGS.keys() & inspect.signature(function).parameters.keys()
    result: Tensor | tuple[Tensor, ...] = function(
        **{name: SETTINGS[name] for name in settings},
        **{
            name: [_tensor(name, one) for one in shape] if isinstance(shape, list) else _tensor(name, shape)
            for name, shape in shapes.items()
        },
    )
    return result if isinstance(result, Tensor) else torch.stack(result)


def _correct(function: Callable[..., Any]) -> Iterator[tuple[dict[str, Shape], dict[str, Any]]]:
    """Yield the combinations of shapes that the docstring allows, as names of dimensions and as sizes."""
    documented, parameters = _documented(function), inspect.signature(function).parameters
    for choice in product(*documented.values()):
        forms = dict(zip(documented, choice, strict=True))
        if len({len(form) for name, form in forms.items() if len(documented[name]) > 1 and name != "temperature"}) > 1:
            continue  # the alternatives of two arguments correspond to each other
        yield (
            forms,
            {
                name: [_shape(form, 0), _shape(form, 1)]
                if "Sequence" in str(parameters[name].annotation)
                else _shape(form)
                for name, form in forms.items()
            },
        )


def _wrong(forms: dict[str, Shape], documented: dict[str, list[Shape]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield shapes that the docstring does not allow, one argument at a time."""
    for name, form in forms.items():
        shape, allowed = _shape(form), {len(_shape(other)) for other in documented[name]}
        is_open = form[-1:] in (("...",), ("*",))
        yield from ((name, other) for other in [shape[:-1]] if form and not is_open and len(other) not in allowed)
        yield from ((name, other) for other in [(*shape, 2)] if form[-1:] != ("...",) and len(other) not in allowed)
        elsewhere = [size.split(" * ")[-1] for other, sizes in forms.items() if other != name for size in sizes]
        for place, size in enumerate(form):
            if size not in ("*", "...") and (size.split(" * ")[-1] in elsewhere or form.count(size) > 1):
                # one more, and 1, which would broadcast
                yield from ((name, (*shape[:place], other, *shape[place + 1 :])) for other in (shape[place] + 1, 1))


@pytest.mark.parametrize("name", KF.__all__)
def test_documented_shapes(name: str) -> None:
    function = getattr(KF, name)
    documented, tried = _documented(function), 0
    assert documented
    for forms, shapes in _correct(function):
        assert _call(function, shapes).isfinite().all(), shapes
        for argument, wrong in _wrong(forms, documented):
            is_list = isinstance(shapes[argument], list)
            given = {**shapes, argument: [wrong, *shapes[argument][1:]] if is_list else wrong}
            with pytest.raises(ValueError, match=rf"^{name} expects \w+(\[\d\])? of shape .*, got \([\d, ]*\); "):
                _call(function, given)
            tried += 1
    assert tried >= len(documented)


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.criterion().reads_logits])
def test_criteria_reject_other_logit_shapes(name: str) -> None:
    """Criteria check the shape of the logits even if they do not pass them to a public function unchanged.

    Examples are criteria of logit maps, and a teacher with another number of classes.
    """
    case = TABLE[name]
    student, teacher = case.outputs()

    def compared(logits: Tensor) -> Tensor:
        return value(case.criterion(), student, teacher._replace(logits=logits), case.batch())

    if torch.equal(compared(teacher.logits), compared(2 * teacher.logits)):
        return  # it reads features instead of logits
    is_map = teacher.logits.dim() == 4
    other = teacher.logits.mean((2, 3)) if is_map else teacher.logits[:, :, None, None].expand(-1, -1, 2, 2)
    for wrong in (teacher.logits[:, :1], other):
        with pytest.raises(
            ValueError, match=r"\w+ expects \w+ of shape|requires at least 2 classes|reads maps of logits"
        ):
            compared(wrong)


def test_list_lengths() -> None:
    features = [torch.rand(2, 3, 4, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="fsp_loss expects 3 teacher_features, one for each layer, got 2"):
        KF.fsp_loss(features, features[:2])
    for function in (KF.fsp_loss, KF.kdsvd_loss):
        with pytest.raises(ValueError, match="compares consecutive layers and requires at least two, got 1"):
            function(features[:1], features[:1])
    with pytest.raises(ValueError, match="compares 4 singular vectors, but a teacher feature of shape"):
        KF.kdsvd_loss(features, features, num_vectors=4)


def test_compile_and_vmap() -> None:
    """`torch.compile` and `vmap` both work with the shape checks, and `vmap` still rejects invalid shapes."""
    student, teacher = torch.randn(2, 8, 5)
    compiled = torch.compile(KF.dist_loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(student, teacher), KF.dist_loss(student, teacher))
    each = torch.func.vmap(lambda own, other: KF.kd_loss(own[None], other[None]))
    torch.testing.assert_close(each(student, teacher).mean(), KF.kd_loss(student, teacher))
    with pytest.raises(ValueError, match=r"kd_loss expects student_logits of shape \(B, K\), got \(1, 8, 5\)"):
        torch.func.vmap(lambda own, other: KF.kd_loss(own[None], other[None]))(student[None], teacher[None])


def test_misspelt_argument_raises_at_decoration() -> None:
    with pytest.raises(ValueError, match="'logit' is not in list"):
        check_shapes(logit="B K")(KF.standardize)
