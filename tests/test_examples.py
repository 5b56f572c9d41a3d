"""The examples in public docstrings: every public class and function has one, and each of them runs."""

import doctest
import importlib
import inspect

import pytest
import torch
from helpers.marks import slow_but

import timm_autoslim

MODULES = ("errors", "files", "plot")  # public modules, beside the names of the package itself


def is_documented(value):
    return inspect.isclass(value) or inspect.isfunction(value)


def list_public():
    """Return the public classes and functions, by the name that they are imported by."""
    public = {name: getattr(timm_autoslim, name) for name in timm_autoslim.__all__}
    for module in MODULES:
        members = vars(importlib.import_module(f"timm_autoslim.{module}"))
        public |= {f"{module}.{name}": value for name, value in members.items() if not name.startswith("_")}
    return {
        name: value
        for name, value in public.items()
        if is_documented(value) and value.__module__.startswith("timm_autoslim")
    }


PUBLIC = list_public()


def list_examples():
    """Return the examples of all public objects and of their public methods, each by its name."""
    examples = {}
    for name, value in PUBLIC.items():
        module = importlib.import_module(value.__module__)
        for test in doctest.DocTestFinder(exclude_empty=True).find(value, name, module, vars(module)):
            private = any(part.startswith("_") for part in test.name.split("."))
            if test.examples and not private:
                examples[test.name] = test
    return examples


EXAMPLES = list_examples()


@pytest.mark.parametrize("name", [name for name in PUBLIC if name in timm_autoslim.__all__])
def test_every_public_class_and_function_has_an_example(name):
    assert "\nExample:\n    >>> " in inspect.getdoc(PUBLIC[name])


LONG = ("slim", "reconstruct")  # each trains or searches for more than half a second


@pytest.mark.parametrize("name", slow_but([name for name in EXAMPLES if name not in LONG], EXAMPLES))
def test_examples_run_and_print_what_they_say(name):
    torch.manual_seed(0)
    lines = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = runner.run(EXAMPLES[name], out=lines.append, clear_globs=False)
    finally:
        torch.set_num_threads(threads)
    assert not result.failed, "".join(lines)


def test_an_example_that_is_wrong_fails():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1
