"""An ArgumentParser whose errors say what was meant, in one line."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from timm_autoslim.errors import ConfigError

ON_OFF = argparse.BooleanOptionalAction
MANY = 20  # flags, from which on a usage of all of them would hide the error


def share(text: str) -> float:
    """Return a number, or per cent as a share; the type of flags that take shares.

    Raises:
        ValueError: the text is neither.
    """
    text = text.strip()
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def read_input_size(args: argparse.Namespace) -> None:
    """Let --input-size C H W, as timm has it, be --in-chans and --img-size.

    Raises:
        ConfigError: the images are not square, or one of the other two flags says something else.
    """
    if (size := vars(args).pop("input_size")) is None:
        return
    if size[1] != size[2]:
        raise ConfigError(f"--input-size {' '.join(map(str, size))}: needed square images, such as 3 224 224.")
    for name, value in (("in_chans", size[0]), ("img_size", size[1])):
        if getattr(args, name) not in (None, value):
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ConfigError(f"{flag} contradicts --input-size {' '.join(map(str, size))}: give one of them.")
        setattr(args, name, value)


class Parser(argparse.ArgumentParser):
    """Takes whole names of flags only; an unknown one is told with the nearest that there is."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        super().__init__(**kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the flags; those that are left over are an error."""
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [word for word in rest if word.startswith("-")]
            self.error(self._describe_unknown(flags[0].partition("=")[0]) if flags else f"unexpected: {' '.join(rest)}")
        return values

    def _describe_unknown(self, flag: str) -> str:
        near = difflib.get_close_matches(flag, self._list_spellings(), n=1)
        return f"unknown flag {flag}" + (f": did you mean {near[0]}?" if near else "")

    def _list_spellings(self) -> list[str]:
        spellings = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                spellings += [flag for parser in action.choices.values() for flag in parser._list_spellings()]
        return spellings

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit; a long usage is left to --help."""
        if len(self._actions) < MANY:
            self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags.\n")


class KeyValues(ParseKwargs):  # type: ignore[misc]
    """timm's way to read KEY=VALUE; anything else is refused by name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the values as a dict."""
        for text in values:
            if "=" not in text or text.startswith("="):
                raise ConfigError(f"{option_string} {text}: needed KEY=VALUE, such as drop_rate=0.2.")
        super().__call__(parser, namespace, values, option_string)
