"""Loading of trained weights from untrusted files, without executing code in them."""

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
"""Part of the names of the weights of projection shortcuts."""

PRETRAINED = Path(__file__).with_name("pretrained")
"""Folder of the weights that are included in the package."""

_PACKAGED = "lkd:"
_CONTAINERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "model.", "student.", "network.", "net.", "_orig_mod.")
_FINE_TUNE = (
    "; only the head ({head}) does not match: to train a new head, load the file with lkd.models.load_weights and "
    "drop_head: true"
)
_SYNONYMS = (("linear", "fc"), ("shortcut", "downsample"))


def load_weights(network: nn.Module, path: str | Path, drop_head: bool = False) -> nn.Module:
    """Load trained weights into a network.

    The file is a safetensors file, or a PyTorch file with a state dict, either at the top level or under `state_dict`
    (Lightning), `model` (the CIFAR-100 benchmark), `model_state_dict` or `net`. Code in the file is never executed.
    Prefixes of wrappers (`module.`, `model.`, `student.`, ...) are removed, the names `linear` and `shortcut` are
    converted to `fc` and `downsample` or vice versa as the network requires, and tensors are cast to the dtypes of the
    network. If the weights do not match, the network is not modified.

    Args:
        network: Network whose weights are set in place.
        path: Path of the file, or `lkd:NAME` for weights included in the package.
        drop_head: Whether to ignore the last linear layer in the file, whatever its shape, and keep that of the
            network, as for fine-tuning on other classes.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file contains no weights, requires code to be executed, or does not match the network. The
            message lists missing, unexpected and wrongly shaped tensors, or the first tensor that is not finite or not
            a valid weight. Also if `drop_head` is set and the network has no linear layer.

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
        raise ValueError(f"drop_head requires a linear layer, but {type(network).__name__} has none; omit drop_head")
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
            raise FileNotFoundError(f"{path} is not included in lkd; available weights: {names}")
        return PRETRAINED / f"{name}.safetensors"
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise FileNotFoundError(f"{shown(file)} is a folder; give the path of a weights file")
    siblings = [sibling.name for sibling in file.parent.iterdir()] if file.parent.is_dir() else []
    nearest = difflib.get_close_matches(file.name, siblings, n=3)
    hint = f"similar names: {_some(nearest)}" if nearest else "correct the path, or train the network first"
    raise FileNotFoundError(f"weights file not found: {shown(file)}; {hint}")


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
        f"{shown(file)} contains no weights but {found}; expected a state dict, at the top level or under 'state_dict' "
        "or 'model'"
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(file)} is not a safetensors file, or it is corrupt ({said(error)})") from error


def _read_torch(file: Path) -> object:
    try:
        return read_torch(file)
    except UntrustedError as error:
        raise ValueError(f"{shown(file)} was not loaded: {error}") from error
    except Exception as error:  # corrupt bytes can raise anything in the unpickler
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{shown(file)} was not loaded: it requires code to be executed ({shown(named[1])}); if you trust it, "
                "load it with torch.load(..., weights_only=False) and save only its state dict"
            ) from error
        raise ValueError(
            f"{shown(file)} is not a PyTorch weights file, or it is corrupt ({type(error).__name__})"
        ) from error


def _fit_names(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Remove the prefix under which most names match the network; other tensors, such as adapters, are dropped."""
    wanted = network.state_dict().keys()
    candidates = []
    for prefix, names in _by_prefix(tensors).items():
        candidates.append(_rename({name.removeprefix(prefix): tensors[name] for name in names}, wanted))
    return max(candidates, key=lambda candidate: len(candidate.keys() & wanted))


def _by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by each combination of up to four known prefixes, starting with the empty one."""
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
        for old, new in (pair, pair[::-1]):
            if _has_part(wanted, new) and not _has_part(wanted, old) and not _has_part(tensors, new):
                part = re.compile(rf"(?<![^.]){old}(?=\.)")
                tensors = {part.sub(new, name): tensor for name, tensor in tensors.items()}
    return tensors


def _has_part(names: Iterable[str], part: str) -> bool:
    return any(part in name.split(".") for name in names)


def _check_fit(tensors: Mapping[str, Tensor], network: nn.Module, file: Path, head: str, drop_head: bool) -> None:
    # Files from before PyTorch 0.4.1 lack BatchNorm's num_batches_tracked.
    optional = "num_batches_tracked"
    if problems := misfit(tensors, network, optional, head if drop_head else ""):
        only_head = head and not drop_head and not misfit(tensors, network, optional, head)
        raise ValueError(
            f"the weights in {shown(file)} do not match {type(network).__name__}; {problems}; use the same "
            "architecture as in training (classes, input channels, depth, shortcuts), or another file"
            + (_FINE_TUNE.format(head=head) if only_head else _other_shortcut(tensors, network, optional))
        )
    for name, own in network.state_dict().items():
        if name in tensors and (problem := _flaw(tensors[name], own)):
            raise ValueError(f"{shown(file)} was not loaded: {name} {problem}; use a file with trained weights")


def _other_shortcut(tensors: Mapping[str, Tensor], network: nn.Module, optional: str) -> str:
    """Return a hint for the error message if weights match a ResNet except for its shortcuts, otherwise nothing."""
    if "shortcut" not in inspect.signature(type(network)).parameters:
        return ""
    own = {name for name in network.state_dict() if not name.endswith(optional)}
    given = {name for name in tensors if not name.endswith(optional)}
    if own == given or any(_SHORTCUT not in name for name in own ^ given):
        return ""
    kind = "A" if own > given else "B"
    return f"; the weights were trained with shortcut {kind}: set shortcut of the network to {kind}"


def _flaw(tensor: Tensor, own: Tensor) -> str:
    """Return why a tensor is not a valid weight, for a message; empty if it is valid."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    if not plain or tensor.is_quantized or tensor.is_nested or tensor.is_complex() > own.is_complex():
        return f"is {_kind(tensor)}, expected a dense tensor of type {own.dtype}"
    if own.is_floating_point() and not (tensor.is_floating_point() or tensor.dtype == own.dtype):
        return f"has dtype {tensor.dtype}, expected weights of type {own.dtype}"
    try:
        cast = tensor.detach().to(own.dtype)
    except (RuntimeError, TypeError):  # dtypes that PyTorch can store but not convert
        return f"has dtype {tensor.dtype}, which cannot be converted to {own.dtype}"
    if cast.isfinite().all():
        return ""
    invalid = int((~cast.isfinite() & own.isfinite().cpu()).sum())  # masks of the network may be infinite
    return f"has {invalid:,} of {cast.numel():,} values that are NaN or infinite" if invalid else ""


def _kind(tensor: Tensor) -> str:
    special = {"quantized": tensor.is_quantized, "nested": tensor.is_nested, "without data": tensor.is_meta}
    named = [word for word, holds in special.items() if holds]
    return " and ".join(named) or f"a {type(tensor).__name__} of type {tensor.dtype}, {tensor.layout}"


def misfit(tensors: Mapping[str, Tensor], network: nn.Module, optional: str = "", ignored: str = "") -> str:
    """Describe why weights do not match a network, for a message; empty if they match.

    Args:
        tensors: Weights by name.
        network: Network into which they would be loaded.
        optional: Suffix of names that may be missing. If empty, no name may be missing.
        ignored: Name of a layer that need not match. If empty, all layers must match.
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
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": reshaped}
    return "; ".join(f"{problem}: {_some(names)}" for problem, names in problems.items() if names)


def _some(names: Iterable[str]) -> str:
    listed = [shown(name) for name in names]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more
