"""Every error is ours and a builtin's, and its text says where, what was got, what was needed and what to do."""

import inspect

import pytest

from timm_autoslim import AutoSlimError, errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AutoSlimError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_can_be_caught_as_ours_and_as_a_builtin(kind):
    builtins = [base for base in kind.__mro__ if base.__module__ == "builtins" and base is not object]
    assert builtins[0] is Exception if kind is AutoSlimError else builtins[0] not in (Exception, BaseException)
    assert kind.__doc__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_text_has_four_parts_of_which_the_remedy_may_be_left_out(kind):
    error = kind.at("seed", got="'a'", needed="an integer", remedy="leave it out for 0")
    assert type(error) is kind
    assert str(error) == "seed: got 'a'; needed: an integer; leave it out for 0"
    assert str(kind.at("seed", got="'a'", needed="an integer")) == "seed: got 'a'; needed: an integer"


def test_an_unknown_argument_is_an_artifact_error_too():
    assert issubclass(errors.ArgumentError, errors.ArtifactError)
    assert issubclass(errors.ArgumentError, TypeError)
