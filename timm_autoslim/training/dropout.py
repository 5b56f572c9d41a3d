"""Dropout and drop path, disabled for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from timm_autoslim.utils.dropouts import is_dropout
from timm_autoslim.utils.restoring import restoring

_DROP_FUNCTIONS = frozenset(
    (
        *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    )
)


@contextlib.contextmanager
def disable_dropout(model: nn.Module) -> Iterator[None]:
    """Disable dropout and drop path for the length of a block, while BatchNorm still normalises by the batch.

    This covers modules (torch's dropouts; timm's and torchvision's drop path, drop block and patch dropout), and the
    functions of `torch.nn.functional` that a forward calls directly, attention's dropout included.
    """
    modules = [module for module in model.modules() if module.training and is_dropout(module)]
    mode = _IgnoreDropout()

    def restore() -> None:
        mode.active = False  # below another mode that an interrupt left open it stays, without effect
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        if stack and stack[-1] is mode:  # an interrupt may have come while torch had taken it off
            mode.__exit__(None, None, None)
        for module in modules:
            module.training = True

    with restoring(restore):
        for module in modules:
            module.training = False  # not eval(), which would also reach the module's children
        mode.__enter__()  # type: ignore[no-untyped-call]
        yield


class _IgnoreDropout(TorchFunctionMode):
    """Makes the dropout functions return their input: many models call them without a module.

    Attributes:
        active: whether it does.
    """

    active = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not self.active:
            return func(*args, **kwargs)
        if func in _DROP_FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        elif func is F.multi_head_attention_forward:
            kwargs["training"] = False
        return func(*args, **kwargs)
