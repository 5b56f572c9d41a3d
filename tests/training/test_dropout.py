"""Dropout is disabled for the length of a block, in modules and in functions, and all flags are restored."""

import contextlib

import torch
from torch import nn
from torch.nn import functional as F

from timm_autoslim.recipes.benchmarks.lib.interrupts import Interrupt
from timm_autoslim.training.dropout import disable_dropout


def test_functions_and_attention_do_not_drop_inside_the_block():
    x = torch.randn(4, 6, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.9, batch_first=True).train()
    parallel = nn.TransformerEncoderLayer(8, 2, dropout=0.9, batch_first=True).train()
    calls = [
        lambda: F.dropout(x, 0.9), lambda: F.dropout(input=x, p=0.9), lambda: torch.dropout(x, 0.9, True),
        lambda: F.dropout1d(x, 0.9), lambda: F.alpha_dropout(x, 0.9, True),
        lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.9),
        lambda: F.scaled_dot_product_attention(x, x, x, None, 0.9), lambda: attention(x, x, x)[0], lambda: parallel(x),
    ]  # fmt: skip
    for call in calls:
        assert not torch.equal(call(), call())
        with disable_dropout(nn.ModuleList((attention, parallel))):
            assert torch.equal(call(), call())
        assert not torch.equal(call(), call())
    with disable_dropout(attention):
        torch.testing.assert_close(
            F.scaled_dot_product_attention(x, x, x, None, 0.9), F.scaled_dot_product_attention(x, x, x)
        )


def test_flags_of_modules_are_restored_after_an_error():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval(), nn.BatchNorm1d(3))
    with contextlib.suppress(ArithmeticError), disable_dropout(model):
        assert [module.training for module in model] == [False, False, True]
        raise ArithmeticError
    assert [module.training for module in model] == [True, False, True]


def test_an_interrupt_at_any_line_leaves_dropout_as_it_was():
    model, inputs = nn.Sequential(nn.Dropout(0.5)).train(), torch.ones(64)

    def act():
        with disable_dropout(model):
            model(inputs)
            torch.dropout(inputs, 0.5, True)

    act()  # what Python and torch do once alone is done
    interrupt = Interrupt()
    interrupt.run(act)
    for line in range(1, interrupt.lines + 1):
        assert not Interrupt(line).run(act), line
        assert model[0].training
        assert 0 < model(inputs).count_nonzero() < 64
        assert 0 < torch.dropout(inputs, 0.5, True).count_nonzero() < 64
