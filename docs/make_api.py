"""Write docs/api.md, the API reference, from the signatures and docstrings of the package: python docs/make_api.py."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import timm_autoslim
from timm_autoslim import errors

PAGE = Path(__file__).parent / "api.md"
HEAD = """# API

Made from the docstrings by `python docs/make_api.py`. All names below are in `timm_autoslim` itself, but for the
errors, which are in `timm_autoslim.errors`. Images are (N, C, H, W).
"""
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Attributes):$")


def render() -> str:
    """Return the whole page: functions, classes, errors, each in alphabetical order."""
    names = [(name, getattr(timm_autoslim, name)) for name in sorted(timm_autoslim.__all__, key=str.lower)]
    parts = [HEAD, "## Functions\n"]
    parts += [_function(name, value, "###") for name, value in names if inspect.isfunction(value)]
    parts.append("## Classes\n")
    parts += [_class(name, value) for name, value in names if inspect.isclass(value) and not _is_error(value)]
    parts.append("## Errors\n")
    kinds = [value for value in vars(errors).values() if inspect.isclass(value) and _is_error(value)]
    for kind in kinds:
        parents = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        parts.append(f"- **{kind.__name__}** ({parents}): {_join(inspect.getdoc(kind) or '')}")
    return "\n".join(parts) + "\n"


def _is_error(value: Any) -> bool:
    return issubclass(value, errors.AutoSlimError)


def _class(name: str, kind: type) -> str:
    parts = [f"### {name}\n", _text(kind)]
    own = [(key, value) for key, value in vars(kind).items() if not key.startswith("_") and inspect.getdoc(value)]
    fields = set(getattr(kind, "__dataclass_fields__", ()))
    for key, value in own:
        if isinstance(value, property):
            parts.append(f"#### {name}.{key}\n\n{_text(value)}")
        elif inspect.isroutine(value) and key not in fields:
            parts.append(_function(f"{name}.{key}", value, "####"))
    return "\n".join(parts)


def _function(name: str, function: Any, level: str) -> str:
    return f"{level} {name}\n\n```text\n{_signature(name, function)}\n```\n\n{_text(function)}"


def _signature(name: str, function: Any) -> str:
    """Return the signature as it stands in the source, on one line, or with an argument a line where that is long."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    node: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _arguments(node.args)
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _arguments(args: ast.arguments) -> list[str]:
    def shown(arg: ast.arg, default: ast.expr | None) -> str:
        kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
        equals = (" = " if kind else "=") + ast.unparse(default) if default else ""
        return f"{arg.arg}{kind}{equals}"

    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    lines = [
        shown(arg, default) for arg, default in zip(plain, defaults, strict=True) if arg.arg not in ("self", "cls")
    ]
    if args.vararg:
        lines.append(f"*{shown(args.vararg, None)}")
    elif args.kwonlyargs:
        lines.append("*")
    lines += [shown(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [*lines, f"**{shown(args.kwarg, None)}"] if args.kwarg else lines


def _text(value: Any) -> str:
    """Return a docstring as Markdown: its sections become lists, the rest stays."""
    lines, inside = [], False
    for line in (inspect.getdoc(value) or "").splitlines():
        section = SECTION.match(line)
        if section:
            inside = True
            lines.append(f"**{section[1]}**\n")
        elif inside and re.match(r" {4}\S", line):
            entry = re.match(r" {4}([\w*., ]+?): (.*)", line)
            lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"- {line.strip()}")
        elif inside and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


def _join(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
