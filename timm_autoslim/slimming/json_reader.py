"""Read values from a JSON file, each checked, with errors that say where in the file one is wrong."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from timm_autoslim.errors import ArtifactError

_MOST = 2**63 - 1


@dataclass(frozen=True)
class JsonValue:
    """A value of a JSON file.

    Attributes:
        where: the file, and the value's place in it, for messages.
        value: the value, as `json.loads` returns it.
    """

    where: str
    value: Any

    @classmethod
    def read(cls, path: Path, needed: str) -> JsonValue:
        """Read a file.

        Raises:
            ArtifactError: the file cannot be read, or is no JSON; the text says that `needed` was needed.
        """
        try:
            return cls(str(path), json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ArtifactError.at(str(path), got=f"no file that can be read ({error})", needed=needed) from None
        except (ValueError, RecursionError) as error:
            raise ArtifactError.at(str(path), got=f"no JSON that can be read ({error})", needed=needed) from None

    def refuse(self, needed: str) -> NoReturn:
        """Raise an ArtifactError that says what was needed here."""
        raise ArtifactError.at(self.where, got=reprlib.repr(self.value), needed=needed)

    def object(self, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, JsonValue]:
        """Return the members of an object that has all `required` names, and no others but `optional` ones.

        Raises:
            ArtifactError: it is no such object.
        """
        members = self.members()
        missing = [name for name in required if name not in members]
        unknown = [name for name in members if name not in required and name not in optional]
        if missing or unknown:
            faults = [f"no {missing[0]!r}"] if missing else []
            faults += [f"an unknown {unknown[0][:40]!r}"] if unknown else []
            names = reprlib.repr([*required, *optional])
            raise ArtifactError.at(self.where, got=" and ".join(faults), needed=f"the keys {names}")
        return members

    def members(self) -> dict[str, JsonValue]:
        """Return the members of an object, by name."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return {name: JsonValue(f"{self.where}.{name[:40]}", value) for name, value in self.value.items()}

    def items(self) -> list[JsonValue]:
        """Return the items of a list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [JsonValue(f"{self.where}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        """Return a text."""
        if not isinstance(self.value, str):
            self.refuse("a text")
        return self.value

    def integer(self, least: int = 0) -> int:
        """Return an integer from `least` on."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not least <= self.value <= _MOST:
            self.refuse(f"an integer from {least} on")
        return self.value

    def number(self, above: float = -math.inf) -> float:
        """Return a finite number above another."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > _MOST or not value > above:
            self.refuse("a finite number" if above == -math.inf else f"a finite number above {above:g}")
        return value
