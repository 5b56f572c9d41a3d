"""Where a model's code calls functions of torch: a subnet that calls others has taken another path.

This finds questions about sizes that no number can report, such as `if int(c) > 8` and `range(c)`.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

from timm_autoslim.tracing.source import format_line

Site = tuple[str, CodeType, int]  # the running module, the code that calls, and the instruction
_MOST_FRAMES = 8
_PRECALL = dis.opmap.get("PRECALL")  # of Python 3.11: either it or the CALL that follows makes a call, as code warms up
_TO_CALL = 4  # bytes from one to the other
_ARITHMETIC = "timm_autoslim.tracing.sizes"  # a size times a tensor is computed there


def find_site(path: str, frame: Any) -> Site | None:
    """Return where the model's code calls a function of torch; None if torch's own modules call it.

    Args:
        path: the running module.
        frame: the frame that runs, in torch or in the model's code.
    """
    for _ in range(_MOST_FRAMES):
        name = frame.f_globals.get("__name__", "") if frame is not None else "torch.nn.modules"
        if name != _ARITHMETIC:
            if name.startswith(("torch.nn.modules", "timm_autoslim.")):
                return None
            if name.partition(".")[0] != "torch":
                return path, frame.f_code, _find_instruction(frame)
        frame = frame.f_back
    return None


def find_model_site(path: str, frame: Any) -> Site | None:
    """Return where the model's code runs, above frames of torch and of this package; None if it does not."""
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "timm_autoslim"):
        frame = frame.f_back
    return None if frame is None else (path, frame.f_code, _find_instruction(frame))


def _find_instruction(frame: Any) -> int:
    """Return the instruction that a frame runs, the same for each run of a call."""
    instruction: int = frame.f_lasti
    is_before = _PRECALL is not None and frame.f_code.co_code[instruction] == _PRECALL
    return instruction + _TO_CALL if is_before else instruction


def format_site(site: Site) -> str:
    """Return `file:line` of a site."""
    _, code, instruction = site
    lines = [line for start, end, line in code.co_lines() if start <= instruction < end and line is not None]
    return format_line(code.co_filename, lines[0] if lines else code.co_firstlineno)


def find_culprits(groups: Sequence[int], differs: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return the groups that decide whether something differs.

    Args:
        groups: groups that decide it together.
        differs: whether it differs if these alone are narrower.
    """
    if len(groups) < 2:
        return list(groups)
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    culprits = [group for half in halves if differs(half) for group in find_culprits(half, differs)]
    return culprits or list(groups)
