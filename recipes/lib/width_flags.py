"""The flags that limit the widths of a model's groups, for recipes and for inspect."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.parser import share

_FORMS = "widths of all groups, such as 25%% 50%%, or of those that a glob matches, such as 'layer1=[8,16,50%%]'"


class Choices(argparse.Action):
    """Widths for all groups, or by glob: numbers of channels, and shares as 0.25 or 25%."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store what `convert` takes as `choices`."""
        setattr(namespace, self.dest, read_choices(values))


def read_choices(value: Any) -> list[Any] | dict[str, list[Any]]:
    """Return widths as `convert` takes them: a list for all groups, or lists by glob; an empty dict for none.

    Args:
        value: words of a command line (`25% 50%` or `GLOB=[8,16]`), or what a YAML file holds: these words, a list or a
            mapping.

    Raises:
        ConfigError: it is neither.

    Example:
        >>> read_choices(["25%", "0.5", "32"]), read_choices(["layer1=[8,50%]", "layer2=16"])
        (['25%', 0.5, 32], {'layer1': [8, '50%'], 'layer2': [16]})
    """
    if isinstance(value, Mapping):
        return {str(glob): _read_list(widths) for glob, widths in value.items()}
    words = list(value) if isinstance(value, list | tuple) else [value]
    globs = [word for word in words if isinstance(word, str) and "=" in word]
    if globs and len(globs) < len(words):
        rest = next(word for word in words if word not in globs)
        raise ConfigError(f"--choices {globs[0]} beside {rest}: needed {_FORMS.replace('%%', '%')}.")
    if empty := [word for word in globs if word.startswith("=")]:
        raise ConfigError(f"--choices: {empty[0]} has no glob; needed {_FORMS.replace('%%', '%')}.")
    if globs:
        return {glob: _read_list(widths) for glob, _, widths in (word.partition("=") for word in globs)}
    return [width for word in words for width in _read_list(word)] or {}


def _read_list(value: Any) -> list[Any]:
    """Return the widths of one list: of a text such as "[8,50%]" or of a list; of one width too."""
    if isinstance(value, str):
        return [_read_width(text) for text in value.strip().removeprefix("[").removesuffix("]").split(",")]
    return [_read_width(item) for item in (value if isinstance(value, Iterable) else [value])]


def _read_width(value: Any) -> Any:
    """Return a number of channels as an int, a share as a float or as a text of per cent; `convert` checks its range.

    Raises:
        ConfigError: the text is none of them.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        number = share(text)
    except ValueError:
        got = f"--choices: {text!r} is no width" if text else "--choices: a list of no width"
        raise ConfigError(f"{got}; needed {_FORMS.replace('%%', '%')}.") from None
    return text if text.endswith("%") else int(text) if re.fullmatch(r"[+-]?\d+", text) else number


def add_width_flags(group: argparse._ActionsContainer) -> None:
    """Flags that limit the widths: `freeze`, `min`, `divisor` and `choices` of `convert`."""
    group.add_argument("--freeze", nargs="*", default=[], metavar="GLOB", help="modules that keep all channels")
    group.add_argument("--min-width", type=share, metavar="SHARE", help="narrowest share of every group's channels")
    group.add_argument("--divisor", type=int, help="widths are multiples of this")
    group.add_argument(
        "--choices",
        nargs="*",
        default={},
        action=Choices,
        metavar="WIDTH|GLOB=[...]",
        help=f"{_FORMS}; numbers of channels, or shares; wins over the two above",
    )
