"""Progress bars: in a terminal, and nothing where their output is kept."""

import pytest

from timm_autoslim.utils.bars import show_bar


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_shown_in_a_terminal_unless_it_shall_not(shown, terminal):
    assert list(show_bar([1, 2], shown=shown, desc="work")) == [1, 2]
    text = terminal.readouterr().err
    assert ("work:   0%" in text) is shown
    assert text.endswith("\r") is shown  # and is gone


def test_a_pipe_gets_no_bar(capsys):
    assert list(show_bar([1, 2], desc="work")) == [1, 2]
    assert capsys.readouterr().err == ""
