"""Exception types: each one is an `AutoSlimError` and the builtin that fits, so either can be caught."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class AutoSlimError(Exception):
    """Base of every error that timm-autoslim raises on purpose.

    Example:
        >>> from timm_autoslim import AutoSlimError, convert
        >>> try:
        ...     convert("resnet18")
        ... except AutoSlimError as error:
        ...     print(error)
        the model: got a str; needed: an nn.Module, such as timm.create_model('resnet18')
    """

    @classmethod
    def at(cls, where: str, *, got: str, needed: str, remedy: str = "") -> Self:
        """Return an error of this type with a text of four parts: where, what was got, what was needed, what to do.

        Args:
            where: the module, argument, key or file that is at fault.
            got: what stood there.
            needed: what could have stood there.
            remedy: what the user can do next; empty if `needed` says it already.

        Example:
            >>> str(AutoSlimError.at("seed", got="'a'", needed="an integer"))
            "seed: got 'a'; needed: an integer"
        """
        return cls("; ".join(filter(None, (f"{where}: got {got}", f"needed: {needed}", remedy))))


class TraceError(AutoSlimError, ValueError):
    """The model cannot be traced: its forward raised, or it holds a module that cannot be sliced."""


class NothingToSlimError(AutoSlimError, ValueError):
    """The model was traced, and no group of channels may shrink."""


class WidthError(AutoSlimError, ValueError):
    """Widths that are out of range, of another model, or in conflict with each other."""


class BudgetError(AutoSlimError, ValueError):
    """A budget that is malformed, of an unknown unit, or out of reach."""


class LatencyError(AutoSlimError, ValueError):
    """An unknown device or runtime, or a latency table that was measured elsewhere."""


class StaleStatisticsError(AutoSlimError, RuntimeError):
    """BatchNorm statistics that belong to another subnet would have been scored or exported."""


class ModelChangedError(AutoSlimError, RuntimeError):
    """The model of a supernet is no longer the one that was converted: a layer, a shape or a size has changed."""


class EvaluationError(AutoSlimError, RuntimeError):
    """The evaluate callable raised, or returned something that is not a finite number."""


class ArtifactError(AutoSlimError, ValueError):
    """A model that cannot be exported, or a folder that does not describe a slimmed model."""


class ArgumentError(ArtifactError, TypeError):
    """An argument that the base does not take: a TypeError, as the base itself would raise."""


class OutputExistsError(AutoSlimError, FileExistsError):
    """The output folder exists already; nothing was written."""


class ConfigError(AutoSlimError, ValueError):
    """A setting of a recipe, or an argument, that is unknown, of the wrong type or out of range."""


class DataError(AutoSlimError, ValueError):
    """The data are missing, empty, or do not fit the model."""


def quote_error(error: BaseException) -> str:
    """Return the first line of an exception's text, cut to 300 characters."""
    return next(iter(str(error).splitlines()), "")[:300]
