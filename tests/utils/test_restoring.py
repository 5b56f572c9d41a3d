"""Changes that are taken back, wherever an interrupt comes."""

import pytest

from timm_autoslim.recipes.benchmarks.lib.interrupts import Interrupt
from timm_autoslim.utils.restoring import restoring, restoring_on_error


@pytest.mark.parametrize("error", [None, ValueError])
def test_what_was_changed_is_restored_once(error):
    calls = []

    def act():
        with restoring(lambda: calls.append("restored")):
            calls.append("changed")
            if error is not None:
                raise error

    if error is None:
        act()
    else:
        with pytest.raises(error):
            act()
    assert calls == ["changed", "restored"]


def test_an_interrupt_at_any_line_restores_all():
    values = {"a": 1, "b": 1}

    def restore():
        values["a"] = 1
        values["b"] = 1

    def change():
        values["a"] = 2
        values["b"] = 2

    def act():
        with restoring(restore):
            change()

    interrupt = Interrupt()
    interrupt.run(act)
    assert interrupt.lines > 20
    for line in range(1, interrupt.lines + 1):
        assert not Interrupt(line).run(act)
        assert values == {"a": 1, "b": 1}, line


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_restores_and_an_end_without_one_does_not(error):
    calls = []

    def act(fail):
        with restoring_on_error(lambda: calls.append("restored")):
            calls.append("changed")
            if fail:
                raise error

    act(fail=False)
    assert calls == ["changed"]
    with pytest.raises(error):
        act(fail=True)
    assert calls == ["changed", "changed", "restored"]
