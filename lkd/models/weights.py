"""Reading trained weights from files that others wrote, without running anything that stands in them."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lkd.features.layers import feature_layers
from lkd.io.refused import UntrustedError, said, shown
from lkd.io.safe_load import read_torch

_SHORTCUT = ".downsample."
"""Part of the names of a projection's weights."""

PRETRAINED = Path(__file__).with_name("pretrained")
"""The folder of the weights that ship with the package."""

_PACKAGED = "lkd:"
_CONTAINERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "model.", "student.", "network.", "net.", "_orig_mod.")
_FINE_TUNE = (
    "; only the head {head} does not fit: to train a new one, let lkd.models.load_weights load the file into the "
    "network, with drop_head: true"
)
_SYNONYMS = (("linear", "fc"), ("shortcut", "downsample"))


def load_weights(network: nn.Module, path: str | Path, drop_head: bool = False) -> nn.Module:
    """Read trained weights into a network.

    The file is a safetensors file, or a PyTorch file with a state dict, alone or under `state_dict`
    (Lightning) or `model` (the CIFAR-100 benchmark); no code in it is run. Prefixes that wrappers leave
    (`module.`, `model.`, `student.`, ...) are taken off, `linear` and `shortcut` are read as `fc` and
    `downsample` (or the other way round) where the network has those, and numbers are cast to the network's
    type. If anything does not fit, the network stays as it was.

    Args:
        network: The network; its weights are changed in place.
        path: The file; or `lkd:NAME` for weights that ship with the package.
        drop_head: Whether the network keeps its own last linear layer, to fine-tune it on other classes; the file's is
            ignored, whatever its shape.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights, would have to run code, or does not fit the network; the
            message then names missing, unexpected and wrongly shaped tensors, and the first whose numbers are not
            finite, or are no weights. Also if a head is to be dropped and the network has no linear layer.

    Example:
        >>> import tempfile
        >>> from lkd.models import resnet8
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": resnet8(num_classes=10).state_dict()}, f"{folder}/best.ckpt")
        ...     network = load_weights(resnet8(num_classes=10), f"{folder}/best.ckpt")
    """
    file, head = _locate(path), feature_layers(network).head
    tensors = _fit_names(_read(file), network)
    if drop_head and not head:
        raise ValueError(f"{type(network).__name__} has no linear layer, so drop_head finds no head; leave it out")
    if drop_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{head}.")}
    _check_fit(tensors, network, file, head, drop_head)
    network.load_state_dict(tensors, strict=False)
    return network


def _locate(path: str | Path) -> Path:
    if str(path).startswith(_PACKAGED):
        name = str(path).removeprefix(_PACKAGED)
        available = sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))
        if name not in available:
            names = ", ".join(_PACKAGED + known for known in available) or "none"
            raise FileNotFoundError(f"no weights {path} ship with lkd; available: {names}")
        return PRETRAINED / f"{name}.safetensors"
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise FileNotFoundError(f"{shown(file)} is a folder; give the path of a weights file in it")
    siblings = [sibling.name for sibling in file.parent.iterdir()] if file.parent.is_dir() else []
    nearest = difflib.get_close_matches(file.name, siblings, n=3)
    hint = f"beside it lie {_some(nearest)}" if nearest else "train it first, or correct the path"
    raise FileNotFoundError(f"there is no weights file {shown(file)}; {hint}")


def _read(file: Path) -> dict[str, Tensor]:
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    entries = content if isinstance(content, Mapping) else {}
    inner = [entries[key] for key in _CONTAINERS if isinstance(entries.get(key), Mapping)]
    for candidate in (*inner, entries):
        tensors = {str(key): value for key, value in candidate.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    found = f"a dictionary of {_some(map(str, entries))}" if entries else f"a {type(content).__name__}"
    raise ValueError(
        f"{shown(file)} holds no weights but {found}; it should hold a state dict, alone or under 'state_dict' or "
        "'model'"
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(file)} is not a safetensors file, or it is damaged ({said(error)})") from error


def _read_torch(file: Path) -> object:
    try:
        return read_torch(file)
    except UntrustedError as error:
        raise ValueError(f"{shown(file)} is not loaded: {error}") from error
    except Exception as error:  # damaged bytes can raise anything in the unpickler
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{shown(file)} is not loaded: reading it would have to run code ({shown(named[1])}); if you trust it, "
                "read it once with torch.load(..., weights_only=False) and save its state dict by itself"
            ) from error
        raise ValueError(
            f"{shown(file)} is not a weights file that PyTorch reads, or it is damaged ({type(error).__name__})"
        ) from error


def _fit_names(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Take off the prefix under which most names are the network's; others (adapters', say) are left out."""
    wanted = network.state_dict().keys()
    candidates = []
    for prefix, names in _by_prefix(tensors).items():
        candidates.append(_rename({name.removeprefix(prefix): tensors[name] for name in names}, wanted))
    return max(candidates, key=lambda candidate: len(candidate.keys() & wanted))


def _by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that begin with each combination of up to four known prefixes, the empty one first."""
    names = list(names)
    found = {"": names}
    for name in names:
        prefix = ""
        for _ in range(4):
            known = next((known for known in _PREFIXES if name.startswith(known, len(prefix))), None)
            if known is None:
                break
            prefix += known
            found.setdefault(prefix, []).append(name)
    return found


def _rename(tensors: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    for pair in _SYNONYMS:
        for theirs, ours in (pair, pair[::-1]):
            if _has_part(wanted, ours) and not _has_part(wanted, theirs) and not _has_part(tensors, ours):
                part = re.compile(rf"(?<![^.]){theirs}(?=\.)")
                tensors = {part.sub(ours, name): tensor for name, tensor in tensors.items()}
    return tensors


def _has_part(names: Iterable[str], part: str) -> bool:
    return any(part in name.split(".") for name in names)


def _check_fit(tensors: Mapping[str, Tensor], network: nn.Module, file: Path, head: str, drop_head: bool) -> None:
    # Files from before PyTorch 0.4.1 do not count BatchNorm's batches.
    optional = "num_batches_tracked"
    if problems := misfit(tensors, network, optional, head if drop_head else ""):
        only_head = head and not drop_head and not misfit(tensors, network, optional, head)
        raise ValueError(
            f"the weights in {shown(file)} do not fit {type(network).__name__}; {problems}; build the network as it "
            "was when it was trained (classes, input channels, depth, shortcuts), or choose its file"
            + (_FINE_TUNE.format(head=head) if only_head else _other_shortcut(tensors, network, optional))
        )
    for name, own in network.state_dict().items():
        if name in tensors and (problem := _flaw(tensors[name], own)):
            raise ValueError(f"{shown(file)} is not loaded: {name} {problem}; choose a file of trained weights")


def _other_shortcut(tensors: Mapping[str, Tensor], network: nn.Module, optional: str) -> str:
    """Return the end of a sentence, if weights fit a ResNet but for its shortcuts."""
    if "shortcut" not in inspect.signature(type(network)).parameters:
        return ""
    own = {name for name in network.state_dict() if not name.endswith(optional)}
    given = {name for name in tensors if not name.endswith(optional)}
    if own == given or any(_SHORTCUT not in name for name in own ^ given):
        return ""
    kind = "A" if own > given else "B"
    return f"; set the network's shortcut to {kind}: the weights were trained with it"


def _flaw(tensor: Tensor, own: Tensor) -> str:
    """Why a tensor cannot be a network's weight, for a message; empty if it can."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.is_quantized or tensor.is_nested or tensor.is_complex() > own.is_complex():
        return f"is {_kind(tensor)}, and should be plain numbers as {own.dtype}"
    if own.is_floating_point() and not (tensor.is_floating_point() or tensor.dtype == own.dtype):
        return f"has numbers of type {tensor.dtype}, which are no weights of type {own.dtype}"
    try:
        cast = tensor.detach().to(own.dtype)
    except (RuntimeError, TypeError):  # types that PyTorch can store and do no more with
        return f"has numbers of type {tensor.dtype}, which cannot be brought to {own.dtype}"
    if cast.isfinite().all():
        return ""
    strange = int((~cast.isfinite() & own.isfinite().cpu()).sum())  # a mask of the network's own may be infinite
    return f"has {strange:,} of {cast.numel():,} numbers that are not finite (NaN or infinite)" if strange else ""


def _kind(tensor: Tensor) -> str:
    special = {"quantized": tensor.is_quantized, "nested": tensor.is_nested, "without content": tensor.is_meta}
    named = [word for word, holds in special.items() if holds]
    return " and ".join(named) or f"a {type(tensor).__name__} of type {tensor.dtype}, {tensor.layout}"


def misfit(tensors: Mapping[str, Tensor], network: nn.Module, optional: str = "", ignored: str = "") -> str:
    """What keeps weights from being loaded, for a message; empty if they fit.

    Args:
        tensors: The weights, by name.
        network: What they are meant for.
        optional: End of the names that may be missing; empty: none.
        ignored: Name of a layer that need not fit; empty: none.
    """
    state = network.state_dict()
    if ignored:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{ignored}.")}
        state = {name: value for name, value in state.items() if not name.startswith(f"{ignored}.")}
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    missing = [name for name in own if name not in tensors and not (optional and name.endswith(optional))]
    unexpected = [name for name in tensors if name not in state]
    reshaped = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(value.shape)} in the network"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(f"{problem}: {_some(names)}" for problem, names in problems.items() if names)


def _some(names: Iterable[str]) -> str:
    listed = [shown(name) for name in names]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more
