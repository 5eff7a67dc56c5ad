"""Reading named layers of any network."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from lkd.features.layers import evaluating, resolve_layers, uncompiled
from lkd.types import Outputs, Probe

_INPUT = ":input"


class FeatureTaps:
    """Run a network and keep what some of its layers returned.

    It is no module and adds nothing to a state dict. A layer that is called several times in one forward pass
    shows its last output. A feature that the network later changes in place is kept as it was.

    Args:
        network: Any module whose output is a tensor of logits, or has them as `.logits` or `["logits"]`.
        layers: Names as in `network.named_modules()`; with `:input` behind the name, what goes into the layer
            (its first argument). `@stages` and the like stand for the network's own: see
            `lkd.features.layers.resolve_layers`.

    Raises:
        ValueError: If the network has no layer of that name.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        >>> outputs = FeatureTaps(network, ["0", "2:input"])(torch.zeros(5, 4))
        >>> outputs.logits.shape, {name: tuple(feature.shape) for name, feature in outputs.features.items()}
        (torch.Size([5, 2]), {'0': (5, 3), '2:input': (5, 3)})
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()) -> None:
        self.network = network
        self.layers = tuple(dict.fromkeys(resolve_layers(network, layers)))
        self._features: dict[str, Any] = {}
        self._copied = frozenset(self.layers)
        self._versions: dict[str, list[int]] | None = None  # while probing: each feature's version when it was saved
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
            input: What the network takes.

        Returns:
            Its logits, and the features of the layers by name.

        Raises:
            ValueError: If a layer was not reached.
        """
        self.clear()
        return self.outputs(logits_of(self.network(input)))

    def clear(self) -> None:
        """Forget the features of the last forward pass."""
        self._features.clear()

    def outputs(self, logits: Tensor) -> Outputs:
        """Join logits with the features of the forward pass that has run since `clear`, by whatever called the network.

        Args:
            logits: The logits.

        Returns:
            The logits, and the features of the layers by name.

        Raises:
            ValueError: If a layer was not reached.
        """
        if unreached := [name for name in self.layers if name not in self._features]:
            raise ValueError(f"the forward pass of {type(self.network).__name__} did not reach the layers {unreached}")
        return Outputs(logits, {name: self._features[name] for name in self.layers})

    def remove(self) -> None:
        """Remove the hooks from the network; afterwards no features are kept."""
        for hook in self._hooks:
            hook.remove()
        self.clear()

    def probe(self, input: Any) -> Probe:
        """Run the network once in eval mode, leaving its modes and statistics as they were.

        Features that this pass did not change in place are from then on kept without a copy.

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
        if not any(isinstance(module, _DropoutNd) and module.inplace for module in self.network.modules()):
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
    """The logits in what a network returned: a tensor, `.logits`, or `["logits"]`.

    Args:
        output: What the network returned.

    Raises:
        TypeError: If there are none.
    """
    if isinstance(output, dict):
        output = output.get("logits")
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"a network must return logits (a tensor, `.logits` or `['logits']`), got {type(output).__name__}"
        )
    return logits


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _version(feature: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(feature) if isinstance(leaf, Tensor)]
