"""YAML without what makes a few lines of it endless: objects that hold themselves, or one another again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from lkd.io.refused import Node, UntrustedError, said, shown, weigh

_LONGEST = 2**20  # characters; lkd's own longest config has 4,000
_LARGEST = 10**5  # values, each counted as often as it is named
_DEEPEST = 100
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: Any, load: Callable[[Any], Any] = yaml.safe_load) -> Any:
    """The content of a YAML text, of which no tag makes an object.

    Args:
        text: The text.
        load: What reads it, once it has been looked through.

    Raises:
        yaml.YAMLError: If it is no YAML, or too large, written out; has a key twice; or a value that cannot be read.
    """
    try:
        if len(text) > _LONGEST:
            raise yaml.YAMLError(f"a text of {len(text):,} characters is no config")
        weigh(_outline(text), _LARGEST)
        return load(text)
    except yaml.YAMLError:
        raise
    except UntrustedError as error:
        raise yaml.YAMLError(f"{error} (through its & and *)") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        # PyYAML's own, of a date or number
        raise yaml.YAMLError(f"a value in it cannot be read ({said(error)})") from error


def _outline(text: Any) -> list[Node]:
    """Which values hold which.

    From the parser's events, as PyYAML's composers call themselves for each level: the one in C until it crashes.
    """
    made: list[Node] = []
    named: dict[str, Node | None] = {}
    path: list[tuple[Node, set[str] | None]] = [([], None)]  # containers that are not ended; keys, of a mapping
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
                raise yaml.YAMLError(f"it has the key {shown(event.value)} twice, again in line {line}")
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
            raise yaml.YAMLError("it is nested too deep")
        holder.append(node)
    return made
