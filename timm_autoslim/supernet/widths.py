"""The widths of a subnet: one for each channel group of a search space."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from timm_autoslim.errors import WidthError
from timm_autoslim.utils.arguments import as_integer
from timm_autoslim.utils.html import make_html_table


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that share one width.

    Attributes:
        name: path of the module that produces the channels first.
        size: the widest width; a width counts units, and a unit is nearly always one channel of that module (of a
            grouped convolution it is one of the convolution's groups).
        min, divisor: the least width and the divisor that `choices` were made with.
        choices: the widths that are sampled and searched, ascending; the last is `size`.
        floor: the narrowest width that the model can run with; 1 for nearly every model.
        channels: channels that one unit has in the module that names the group.
        producers: paths of all modules that produce channels of this group, in the order of execution.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> group = supernet.space["layer1.0.conv1"]
        >>> group.size, group.divisor, group.choices
        (64, 8, (16, 24, 32, 40, 48, 56, 64))
    """

    name: str
    size: int
    min: int
    divisor: int
    choices: tuple[int, ...]
    channels: int
    producers: tuple[str, ...]
    floor: int = 1

    def check_width(self, width: object) -> int:
        """Return a width of this group as an int.

        Raises:
            WidthError: it is no integer, or is below the floor or above the size.
        """
        number = as_integer(width)
        if number is None or not self.floor <= number <= self.size:
            got, needed = f"the width {width!r}", f"an integer from {self.floor} to {self.size}"
            raise WidthError.at(self.name, got=got, needed=needed)
        return number


@dataclass(frozen=True, repr=False)
class Widths(Mapping[str, int]):
    """The widths of one subnet: a read-only mapping from group name to width, tied to its search space.

    Raises:
        WidthError: a value is no width of its group.

    Example:
        >>> import timm, torch
        >>> from timm_autoslim import convert
        >>> supernet = convert(timm.create_model("resnet10t", num_classes=10), torch.zeros(1, 3, 32, 32))
        >>> widths = supernet.space.uniform(0.5)
        >>> widths["layer1.0.conv1"]
        32
        >>> narrower = widths.replace("layer1.0.conv1", 16)
        >>> narrower["layer1.0.conv1"], narrower == widths
        (16, False)
    """

    values_: tuple[int, ...]
    groups: tuple[ChannelGroup, ...]
    space_id: str

    def __post_init__(self) -> None:
        if len(self.values_) != len(self.groups):
            got, needed = f"{len(self.values_)} widths", f"one for each of {len(self.groups)} groups"
            raise WidthError.at("Widths", got=got, needed=needed)
        for group, value in zip(self.groups, self.values_, strict=True):
            # a search makes many, so the common case takes no call
            if type(value) is not int or not group.floor <= value <= group.size:
                object.__setattr__(self, "values_", tuple(map(ChannelGroup.check_width, self.groups, self.values_)))
                break

    def _find_index(self, name: str) -> int:
        for index, group in enumerate(self.groups):
            if isinstance(name, str) and group.name == name:
                return index
        raise KeyError(name)

    def __getitem__(self, name: str) -> int:
        return self.values_[self._find_index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter([group.name for group in self.groups])

    def __len__(self) -> int:
        return len(self.groups)

    def __hash__(self) -> int:
        return hash((self.values_, self.space_id))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Widths) and (self.values_, self.space_id) == (other.values_, other.space_id)

    def __repr__(self) -> str:
        return f"Widths({self.to_dict()})"

    def _repr_html_(self) -> str:
        rows = [(g.name, width, g.size) for g, width in zip(self.groups, self.values_, strict=True)]
        return make_html_table(["group", "width", "of"], rows)

    def to_dict(self) -> dict[str, int]:
        """Return the widths as a dict, for JSON; `SearchSpace.from_dict` reads it back."""
        return dict(zip(self, self.values_, strict=True))

    def replace(self, name: str, width: int) -> Widths:
        """Return these widths with another width for one group.

        Raises:
            WidthError: there is no such group, or the width is no integer from its floor to its size.
        """
        try:
            index = self._find_index(name)
        except KeyError:
            raise make_group_error(name, list(self)) from None
        return Widths((*self.values_[:index], width, *self.values_[index + 1 :]), self.groups, self.space_id)


def make_group_error(name: object, names: Sequence[str]) -> WidthError:
    """Return the error for a name that is no group, with the groups of similar names."""
    close = difflib.get_close_matches(str(name), names, 3)
    remedy = f"the closest are {close}" if close else f"the groups are {list(names[:8])}..."
    return WidthError.at("the search space", got=repr(name), needed=f"one of the {len(names)} groups", remedy=remedy)


def hash_groups(groups: Iterable[ChannelGroup]) -> str:
    """Return the id of the search space of these groups: the same for the same names and sizes."""
    text = json.dumps([(g.name, g.size) for g in groups])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
