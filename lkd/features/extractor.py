"""Features of named layers of any network."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lkd._compat import AnyDropout, tree_leaves, tree_map
from lkd._moved import renamed
from lkd.features.layers import evaluating, resolve_layers, uncompiled
from lkd.types import Outputs, Probe

_INPUT = ":input"


class FeatureExtractor:
    """Run a network and collect the outputs of selected layers.

    This object is not a module and adds nothing to a state dict. If a layer is called several times in a forward pass,
    its last output is returned. Features that the network later modifies in place are returned unmodified.

    Args:
        network: Any module.
        layers: Layer names as in `network.named_modules()`. The suffix `:input` selects the input of the layer (its
            first argument). `@stages` and similar names stand for the layers of the respective network; see
            `lkd.features.layers.resolve_layers`.
        read: Function that returns the logits in the output of the network, such as `Task.logits`. By default, the
            output is a tensor of logits, or contains them as `.logits` or `["logits"]`.

    Raises:
        ValueError: If the network has no layer of that name.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        >>> outputs = FeatureExtractor(network, ["0", "2:input"])(torch.zeros(5, 4))
        >>> outputs.logits.shape, {name: tuple(feature.shape) for name, feature in outputs.features.items()}
        (torch.Size([5, 2]), {'0': (5, 3), '2:input': (5, 3)})
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str] = (), read: Callable[[Any], Any] | None = None
    ) -> None:
        self.network, self._read = network, read or logits_of
        self.layers = tuple(dict.fromkeys(resolve_layers(network, layers)))
        self._features: dict[str, Any] = {}
        self._copied = frozenset(self.layers)
        self._versions: dict[str, list[int]] | None = None  # only in `probe`: version counters of the saved features
        self._hooks: list[RemovableHandle] = []
        for name in self.layers:
            layer = _find_layer(network, name.removesuffix(_INPUT))
            if name.endswith(_INPUT):
                hook = layer.register_forward_pre_hook(partial(self._save_input, name), with_kwargs=True)
            else:
                hook = layer.register_forward_hook(partial(self._save_output, name))
            self._hooks.append(hook)

    def __call__(self, input: Any) -> Outputs:
        """Run the network.

        Args:
            input: Input of the network.

        Returns:
            Logits, the features of the layers by name, and the unprocessed output of the network.

        Raises:
            ValueError: If the forward pass did not reach a layer.
        """
        self.clear()
        output = self.network(input)
        return self.outputs(self._read(output))._replace(raw=output)

    def clear(self) -> None:
        """Discard the features of the last forward pass."""
        self._features.clear()

    def outputs(self, logits: Any) -> Outputs:
        """Combine logits with the features collected since `clear`, regardless of who called the network.

        Args:
            logits: The logits.

        Returns:
            Logits, and the features of the layers by name.

        Raises:
            ValueError: If the forward pass did not reach a layer.
        """
        if unreached := [name for name in self.layers if name not in self._features]:
            raise ValueError(f"the forward pass of {type(self.network).__name__} did not reach the layers {unreached}")
        return Outputs(logits, {name: self._features[name] for name in self.layers})

    def remove(self) -> None:
        """Remove the hooks from the network and discard the features."""
        for hook in self._hooks:
            hook.remove()
        self.clear()

    def probe(self, input: Any) -> Probe:
        """Run the network once in eval mode, preserving its training modes and statistics.

        Features that are not modified in place during this pass are collected without a copy from then on.

        Args:
            input: A blank input.

        Returns:
            The network and its outputs.
        """
        self._copied, self._versions = frozenset(), {}
        try:
            with torch.no_grad(), evaluating(self.network):
                outputs = self(input)
        finally:
            versions, self._versions = self._versions, None
            self._copied = frozenset(self.layers)
        if not any(isinstance(module, AnyDropout) and module.inplace for module in self.network.modules()):
            self._copied = frozenset(
                name for name, feature in outputs.features.items() if _version(feature) != versions[name]
            )
        return Probe(uncompiled(self.network), outputs)

    def _save_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._save(name, output)

    def _save_input(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._save(name, [*args, *kwargs.values()][0])

    def _save(self, name: str, feature: Any) -> None:
        if self._versions is not None:
            self._versions[name] = _version(feature)
        self._features[name] = tree_map(_clone, feature) if name in self._copied else feature


def _find_layer(network: nn.Module, name: str) -> nn.Module:
    network = uncompiled(network)
    layers: dict[str, nn.Module] = dict(network.named_modules())
    name = name.removeprefix("_orig_mod.")
    if name and name in layers:
        return layers[name]
    known = [layer for layer in layers if layer]
    nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
    raise ValueError(
        f"{type(network).__name__} has no layer {name!r}; nearest names: {', '.join(nearest)}; "
        "all names: dict(network.named_modules())"
    )


def logits_of(output: Any) -> Tensor:
    """Return the logits from the output of a network: a tensor, `.logits`, or `["logits"]`.

    Args:
        output: Output of the network.

    Raises:
        TypeError: If it contains no logits.
    """
    if isinstance(output, dict):
        output = output.get("logits")
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"a network must return logits (a tensor, `.logits` or `['logits']`), got {type(output).__name__}"
        )
    return logits


def tensors_in(predictions: Any) -> list[Tensor]:
    """Return the floating-point tensors in predictions, which are a tensor or a collection of tensors.

    Args:
        predictions: What `Task.logits` returns.
    """
    return [leaf for leaf in tree_leaves(predictions) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _version(feature: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(feature) if isinstance(leaf, Tensor)]


def __getattr__(name: str) -> Any:
    """Provide former names."""
    return renamed(__name__, name)
