"""YAML loading with limits on nesting and aliases, because a few lines with aliases can fill the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from lkd.io.refused import Node, UntrustedError, said, shown, weigh

_LONGEST = 2**20  # characters; the longest config of lkd has 4,000
_LARGEST = 10**5  # values, with aliases expanded
_DEEPEST = 100
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: Any, load: Callable[[Any], Any] = yaml.safe_load) -> Any:
    """Load a YAML text; tags create no objects.

    Args:
        text: The text.
        load: Function that parses the text after it was checked.

    Raises:
        yaml.YAMLError: If the text is not valid YAML, is too large when expanded, or has a duplicate key or an
            unreadable value.
    """
    try:
        if len(text) > _LONGEST:
            raise yaml.YAMLError(f"the text has {len(text):,} characters; a config may have at most {_LONGEST:,}")
        weigh(_outline(text), _LARGEST)
        return load(text)
    except yaml.YAMLError:
        raise
    except UntrustedError as error:
        raise yaml.YAMLError(f"{error} (through its anchors & and aliases *)") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        # raised by PyYAML for invalid dates and numbers
        raise yaml.YAMLError(f"a value in it cannot be read ({said(error)})") from error


def _outline(text: Any) -> list[Node]:
    """Return which values contain which others.

    It uses the events of the parser, because PyYAML's composers are recursive; the one in C recurses until it crashes.
    """
    made: list[Node] = []
    named: dict[str, Node | None] = {}
    path: list[tuple[Node, set[str] | None]] = [([], None)]  # open containers, and the keys of those that are mappings
    for event in yaml.parse(text, Loader=_LOADER):
        node: Node | None = None
        if isinstance(event, yaml.CollectionEndEvent):
            path.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        holder, keys = path[-1]
        if keys is not None and len(holder) % 2 == 0 and isinstance(event, yaml.ScalarEvent):
            if event.value in keys:
                line = event.start_mark.line + 1
                raise yaml.YAMLError(f"duplicate key {shown(event.value)} in line {line}")
            keys.add(event.value)
        if isinstance(event, yaml.AliasEvent):
            node = named.get(event.anchor)
        elif isinstance(event, yaml.CollectionStartEvent):
            node = []
            made.append(node)
            path.append((node, set() if isinstance(event, yaml.MappingStartEvent) else None))
        if event.anchor is not None:
            named[event.anchor] = node
        if len(path) > _DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        holder.append(node)
    return made
