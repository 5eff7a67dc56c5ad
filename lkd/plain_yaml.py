"""YAML without what makes a few lines of it endless: objects that hold themselves, or one another again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from lkd.untrusted import Node, UntrustedError, shown, weigh

_LONGEST = 2**20  # characters; lkd's own longest config has 4,000
_LARGEST = 10**5  # values, each counted as often as it is named
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
        node = yaml.compose(text, Loader=_LOADER)
        made: dict[int, Node] = {}
        if node is not None:
            _outline(node, made)
            weigh(list(made.values()), _LARGEST)
        return load(text)
    except yaml.YAMLError:
        raise
    except UntrustedError as error:
        raise yaml.YAMLError(f"{error} (through its & and *)") from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deep") from error
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:  # PyYAML's, of a date or number
        raise yaml.YAMLError(f"a value in it cannot be read ({' '.join(str(error).split())})") from error


def _outline(node: yaml.Node, made: dict[int, Node]) -> Node | None:
    """Which values hold which, of a node and all that it holds."""
    if isinstance(node, yaml.ScalarNode):
        return None
    if id(node) not in made:
        own = made[id(node)] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        pairs = isinstance(node, yaml.MappingNode)
        for part in (value for pair in node.value for value in pair) if pairs else node.value:
            own.append(_outline(part, made))  # noqa: PERF401  # a value may hold this one, unfinished
    return made[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise yaml.YAMLError(
                    f"it has the key {shown(key.value)} twice, again in line {key.start_mark.line + 1}"
                )
            seen.add((key.tag, key.value))
