"""Which module of a model runs: one stack, kept by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# path, module, arguments by position and by name
Enter = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None]
# path, module, what it returned
Leave = Callable[[str, nn.Module, Any], None]


class ModuleStack:
    """The modules of a model that run now.

    Attributes:
        paths: their paths, the outermost first; the first entry, "", stands for the caller of the model.
        interrupted: the innermost module that raised last, until another is entered; None if none did.

    Example:
        >>> from torch import nn, zeros
        >>> model, stack = nn.Sequential(nn.ReLU()), ModuleStack()
        >>> stack.follow(model, enter=lambda path, module, args, kwargs: print(stack.paths))
        >>> out = model(zeros(1))
        ['', '']
        ['', '', '0']
        >>> stack.paths
        ['']
    """

    def __init__(self) -> None:
        self.paths: list[str] = [""]
        self.interrupted: str | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def path(self) -> str:
        """The innermost module that runs."""
        return self.paths[-1]

    @property
    def idle(self) -> bool:
        """Whether no module runs."""
        return len(self.paths) == 1

    def follow(self, model: nn.Module, enter: Enter | None = None, leave: Leave | None = None) -> None:
        """Keep the stack while `model` runs, and call `enter` and `leave` for every module of it.

        `leave` is not called for a module that raises.
        """
        for path, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(path, enter), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaving(path), always_call=True))
            self._handles.append(module.register_forward_hook(self._returning(path, leave)))

    def release(self) -> None:
        """Take all hooks out again."""
        while self._handles:
            self._handles.pop().remove()

    def _entering(self, path: str, enter: Enter | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.paths.append(path)
            self.interrupted = None
            if enter is not None:
                enter(path, module, args, kwargs)

        return hook

    def _leaving(self, path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.paths.pop()
            if self.interrupted is None:
                self.interrupted = path  # unless it returns: then the next hook runs

        return hook

    def _returning(self, path: str, leave: Leave | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.interrupted = None
            if leave is not None:
                leave(path, module, out)

        return hook
