"""State machines: whatever a supernet is used for, in whatever order, every call is the extracted model's, or refused.

The one invariant, after every step: each call gives what the extracted model gives, bit for bit, or raises an error of
the library; and the model is as it was, but for what the step is meant to change. State that a forward writes follows
the widest alone. A step is one of many rules: a forward, a backward, an optimizer step, blocks that open and close,
exceptions, interrupts, copies, files, threads, changes of the model, and so on.

The long run: STATES_EXAMPLES=1000 STATES_STEPS=50 pytest -m slow tests/supernet/test_states.py
"""

import contextlib
import copy
import io
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.comparisons import assert_same, snapshot
from helpers.kinds import IMAGES, KINDS, make_kind
from helpers.widths import arbitrary_widths
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from timm_autoslim import AutoSlimError, batch_statistics, convert, cost, sandwich_step
from timm_autoslim.errors import ModelChangedError, WidthError
from timm_autoslim.recipes.benchmarks.lib.interrupts import Interrupt
from timm_autoslim.slicing.tensors import add_slice

seeds = st.integers(0, 20)
MODES = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
modes = st.sampled_from([*MODES])


def count_step():
    """Count a step for the figure in the docs."""
    count_step.total += 1


count_step.total = 0


class Use(RuleBasedStateMachine):
    """Uses of one supernet; `KIND` is that of its model."""

    KIND = "cnn"

    def __init__(self):
        super().__init__()
        self.supernet = convert(make_kind(self.KIND).eval(), torch.zeros(1, *IMAGES))
        self.blocks = []  # those that are open, with their widths
        self.optimizer = None

    def teardown(self):
        while self.blocks:
            self.close_block()

    # -- what the rules share

    @property
    def model(self):
        return self.supernet.model

    def images(self, seed, count=3):
        return torch.randn(count, *IMAGES, generator=torch.Generator().manual_seed(seed))

    def widths(self, seed):
        """Return the widths of a seed: the widest, the narrowest, or any."""
        space = self.supernet.space
        if seed < 2:
            return space.max() if seed else space.min()
        return arbitrary_widths(space, torch.Generator().manual_seed(seed))

    def is_widest(self, widths):
        return widths == self.supernet.space.max()

    def run(self, network, *inputs, mode="plain", **named):
        """Run a network with random numbers that are always the same."""
        torch.manual_seed(0)
        with MODES[mode]():
            return network(*inputs, **named)

    def expect(self, widths, images, mode="plain"):
        """Return what the extracted model returns, and that model."""
        extracted = self.supernet.extract(widths)
        return self.run(extracted, images, mode=mode), extracted

    def check_state(self, widths, before, extracted):
        """Make sure that a call left the model as it was; or, if it was the widest, as the extracted one is now."""
        if not self.is_widest(widths):
            return assert_same(before, snapshot(self.model))
        for (name, value), expected in zip(
            self.model.state_dict().items(), extracted.state_dict().values(), strict=True
        ):
            assert torch.equal(value, expected), name
        return None

    # -- calls

    @rule(seed=seeds, mode=modes, by_name=st.booleans())
    def forward(self, seed, mode, by_name):
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        expected, extracted = self.expect(widths, images, mode)
        before = snapshot(self.model)
        out = self.run(self.supernet, *((images,) if by_name else (images, widths)), mode=mode,
                       **({"widths": widths} if by_name else {}))  # fmt: skip
        assert torch.equal(out, expected)
        assert out.requires_grad == expected.requires_grad
        self.check_state(widths, before, extracted)

    @rule(seed=seeds, mode=modes)
    def forward_without_widths(self, seed, mode):
        """Run the open block's subnet, or the widest."""
        count_step()
        images = self.images(seed)
        widths = self.blocks[-1][1] if self.blocks else self.supernet.space.max()
        assert self.supernet.open_block == (widths if self.blocks else None)
        expected, extracted = self.expect(widths, images, mode)
        before = snapshot(self.model)
        assert torch.equal(self.run(self.supernet, images, mode=mode), expected)
        self.check_state(widths, before, extracted)

    @rule(seed=seeds)
    def subnet(self, seed):
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        expected, _ = self.expect(widths, images)
        before = snapshot(self.model)
        assert torch.equal(self.run(self.supernet.subnet(widths), images), expected)
        assert_same(before, snapshot(self.model))

    @rule(seed=seeds)
    def scored(self, seed):
        """Normalise by the batch, as a search does."""
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        before = snapshot(self.model)
        extracted = self.supernet.extract(widths)
        with torch.no_grad():
            with batch_statistics(extracted):
                expected = self.run(extracted, images)
            with self.supernet.at(widths), batch_statistics(self.model):
                assert torch.equal(self.run(self.supernet, images), expected)
        assert_same(before, snapshot(self.model))

    # -- training

    def compare_gradients(self, widths, before, extracted, mode):
        """Gradients were added where the subnet has weights, and nowhere else."""
        # autocast casts the weight of a module that runs three times once, and adds up the gradients in bfloat16; it
        # casts a slice, which is no leaf, every time, and adds up in float32
        rounded = mode == "autocast" and self.KIND == "shared"
        slices = self.supernet.graph.slices(widths.values_).tensors
        others = dict(extracted.named_parameters())
        for name, parameter in self.model.named_parameters():
            gradient, old = others[name].grad, before[name]
            if gradient is None:
                assert (parameter.grad is None) == (old is None), name
                continue
            total = torch.zeros_like(parameter) if old is None else old.clone()
            if name in slices:
                add_slice(total, gradient, slices[name])
            else:
                total += gradient
            if rounded:
                torch.testing.assert_close(parameter.grad, total, rtol=2**-6, atol=2**-6 * float(total.abs().max()))
            else:
                assert torch.equal(parameter.grad, total), name

    def read_gradients(self):
        return {n: None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()}

    @rule(
        seed=seeds,
        way=st.sampled_from(["call", "block", "subnet", "late", "reentrant", "checkpoint"]),
        mode=st.sampled_from(["plain", "autocast"]),
    )
    def backward(self, seed, way, mode):
        count_step()
        widths, images = self.widths(seed), self.images(seed).requires_grad_()
        extracted, again = self.supernet.extract(widths), way in ("reentrant", "checkpoint")
        if again and self.is_widest(widths):  # its output may depend on state that it moves twice, as in any model
            expected = self.run(checkpoint, extracted, images, use_reentrant=way == "reentrant", mode=mode)
        else:
            expected = self.run(extracted, images, mode=mode)
        expected.square().sum().backward()
        before, state = self.read_gradients(), snapshot(self.model)
        if way == "call":
            out = self.run(self.supernet, images, widths, mode=mode)
        elif way == "subnet":
            out = self.run(self.supernet.subnet(widths), images, mode=mode)
        elif again:
            out = self.run(checkpoint, self.supernet, images, widths, use_reentrant=way == "reentrant", mode=mode)
        else:
            with self.supernet.at(widths):
                out = self.run(self.supernet, images, mode=mode)
                if way == "block":
                    out.square().sum().backward()
        assert torch.equal(out, expected)
        if way != "block":
            out.square().sum().backward()
        self.compare_gradients(widths, before, extracted, mode)
        if way == "subnet" or not self.is_widest(widths):
            assert_same(state, snapshot(self.model))

    @rule(seed=seeds, reentrant=st.booleans())
    def checkpoint_without_widths(self, seed, reentrant):
        """It cannot tell in backward which block was open: it is refused, and changes nothing."""
        count_step()
        images, widths = self.images(seed).requires_grad_(), self.widths(seed)
        with self.supernet.at(widths):
            out = self.run(lambda: checkpoint(self.supernet, images, use_reentrant=reentrant))
        before, state = self.read_gradients(), snapshot(self.model)
        with pytest.raises(WidthError, match="pass them along"):
            out.square().sum().backward()
        after = self.read_gradients()
        for name, gradient in before.items():
            assert after[name] is gradient or torch.equal(after[name], gradient), name
        assert_same(state, snapshot(self.model))

    @rule(momentum=st.booleans())
    def step(self, momentum):
        count_step()
        if self.optimizer is None or momentum != bool(self.optimizer.defaults["momentum"]):
            self.optimizer = torch.optim.SGD(self.supernet.parameters(), 1e-3, momentum=0.9 * momentum)
        self.optimizer.step()

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        count_step()
        self.supernet.zero_grad(set_to_none=to_none)

    @rule(seed=seeds)
    def sandwich(self, seed):
        """All state after a step is that after the forwards of the widest alone."""
        count_step()
        self.supernet.zero_grad()
        images, labels = self.images(seed), torch.arange(3)
        space, loss = self.supernet.space, nn.functional.cross_entropy
        widest = self.supernet.extract()
        step = sandwich_step(
            self.supernet, space, images, labels, loss, generator=torch.Generator().manual_seed(seed), n=3
        )
        assert len(step.losses) == 3
        assert all(torch.isfinite(value) for value in step.losses)
        for _ in range(step.widths.count(space.max())):  # more than one if a random subnet is the widest too
            loss(widest(images), labels).backward()
        for name, buffer in widest.named_buffers():  # the widest alone moved them
            assert torch.equal(self.model.get_buffer(name), buffer), name

    @rule(training=st.booleans())
    def train_or_eval(self, training):
        count_step()
        self.supernet.train(training)

    # -- blocks

    @precondition(lambda self: len(self.blocks) < 3)
    @rule(seed=seeds)
    def open_block(self, seed):
        count_step()
        widths = self.widths(seed)
        block = self.supernet.at(widths)
        block.__enter__()
        self.blocks.append((block, widths))

    @precondition(lambda self: self.blocks)
    @rule()
    def close_block(self):
        count_step()
        block, _ = self.blocks.pop()
        block.__exit__(None, None, None)

    # -- what goes wrong

    @rule(seed=seeds, place=st.integers(0, 30), in_block=st.booleans())
    def exception(self, seed, place, in_block):
        """A module raises in the middle of a forward."""
        count_step()
        widths = self.widths(seed)
        if self.is_widest(widths):
            widths = self.supernet.space.min()

        def fail(*_):
            raise ZeroDivisionError

        modules = [module for module in self.model.modules() if module._parameters] or [self.model]
        handle = modules[place % len(modules)].register_forward_hook(fail)
        before, open_block = snapshot(self.model), self.supernet.open_block
        try:
            if in_block:
                with self.supernet.at(widths):
                    self.supernet(self.images(seed))
            else:
                self.supernet(self.images(seed), widths)
        except ZeroDivisionError:
            pass
        assert_same(before, snapshot(self.model))
        assert self.supernet.open_block == open_block
        handle.remove()

    @rule(seed=seeds, line=st.integers(1, 20000), way=st.sampled_from(["call", "block", "backward", "scored", "copy"]))
    def interrupt(self, seed, line, way):
        count_step()
        widths = self.widths(seed)
        if self.is_widest(widths):
            widths = self.supernet.space.min()
        images = self.images(seed)

        def act():
            if way == "call":
                self.supernet(images, widths)
            elif way == "backward":
                self.supernet(images, widths).sum().backward()
            elif way == "copy":
                copy.deepcopy(self.supernet)
            else:
                with self.supernet.at(widths):
                    if way == "scored":
                        with batch_statistics(self.model), torch.no_grad():
                            self.supernet(images)
                    else:
                        self.supernet(images)

        before, open_block = snapshot(self.model), self.supernet.open_block
        first = Interrupt()
        first.run(act)
        assert_same(before, snapshot(self.model))
        grown = Interrupt(1 + line % max(1, first.lines))
        grown.run(act)
        assert_same(before, snapshot(self.model))
        assert self.supernet.open_block == open_block

    @rule(value=st.sampled_from([None, 0.5, {"stem": 3}, "half", [3]]))
    def wrong_widths(self, value):
        count_step()
        before = snapshot(self.model)
        for call in (lambda: self.supernet(self.images(0), value), lambda: self.supernet.at(value)):
            with contextlib.suppress(AutoSlimError):
                call()
        if not self.model.training:
            assert_same(before, snapshot(self.model))

    # -- copies and files

    @rule(seed=seeds, way=st.sampled_from(["deepcopy", "pickle", "save"]), use=st.booleans())
    def copied(self, seed, way, use):
        """A copy computes the same; it has no open block, and may take the place of the original."""
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        before = snapshot(self.model)
        if way == "deepcopy":
            other = copy.deepcopy(self.supernet)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(self.supernet))
        else:
            file = io.BytesIO()
            torch.save(self.supernet, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert_same(before, snapshot(self.model))
        assert other.open_block is None
        expected, _ = self.expect(widths, images)
        assert torch.equal(self.run(other, images, widths), expected)
        assert_same(before, snapshot(self.model))
        if use and not self.blocks:
            self.supernet, self.optimizer = other, None

    @rule(seed=seeds)
    def loaded(self, seed):
        """Weights are saved, changed, and loaded again."""
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        file = io.BytesIO()
        torch.save(self.supernet.state_dict(), file)
        expected, _ = self.expect(widths, images)
        with torch.no_grad():
            for parameter in self.supernet.parameters():
                parameter.add_(0.1)
        changed, _ = self.expect(widths, images)
        training = self.model.training
        if not (training and self.is_widest(widths)):
            assert torch.equal(self.run(self.supernet, images, widths), changed)
        file.seek(0)
        self.supernet.load_state_dict(torch.load(file))
        if not (training and self.KIND == "writing" and self.is_widest(widths)):
            assert torch.equal(self.run(self.supernet, images, widths), expected)

    @rule(seed=seeds)
    def functional(self, seed):
        """Other tensors stand in for the parameters."""
        count_step()
        if self.KIND in {"lstm", "listed", "shared"}:
            return  # torch's functional_call reaches no list, and does not restore a module that has two names
        widths, images = self.widths(seed), self.images(seed)
        if self.is_widest(widths):
            widths = self.supernet.space.min()
        before = snapshot(self.model)
        leaves = {n: (0.9 * p.detach()).requires_grad_(p.requires_grad) for n, p in self.supernet.named_parameters()}
        other = copy.deepcopy(self.supernet)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.9)
        other.zero_grad()
        values = {name: leaf * 1.0 for name, leaf in leaves.items()}
        if self.KIND in (
            "lstm",
            "listed",
        ):  # their forward reads weights from a list, which functional_call does not reach
            return
        out = self.run(lambda: functional_call(self.supernet, values, (images, widths)))
        expected = self.run(other, images, widths)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(leaves[name].grad, parameter.grad, rtol=1e-5, atol=1e-6)
        assert_same(before, snapshot(self.model))

    # -- threads

    @rule(first=seeds, count=st.integers(2, 4))
    def threads(self, first, count):
        """Threads call subnets of their own while this one has its blocks open."""
        count_step()
        if self.model.training:
            self.supernet.eval()
        choices = [self.widths((first + i) % 21) for i in range(count)]
        images = self.images(first)
        with torch.no_grad():
            expected = [self.expect(widths, images)[0] for widths in choices]
        before, interval = snapshot(self.model), sys.getswitchinterval()

        def call(index):
            widths = choices[index % count]
            with torch.no_grad():
                assert self.supernet.open_block is None
                if index % 3:
                    return torch.equal(self.supernet(images, widths), expected[index % count])
                with self.supernet.at(widths):
                    return torch.equal(self.supernet(images), expected[index % count])

        sys.setswitchinterval(1e-6)
        try:
            with ThreadPoolExecutor(count) as pool:
                results = pool.map(call, range(3 * count))
                assert torch.equal(self.run(self.supernet, images, choices[0], mode="no_grad"), expected[0])
                assert all(results)
        finally:
            sys.setswitchinterval(interval)
        assert_same(before, snapshot(self.model))

    # -- changes of the model

    @rule(seed=seeds)
    def values_change(self, seed):
        count_step()
        parameters = list(self.model.parameters())
        parameters[seed % len(parameters)].data = parameters[seed % len(parameters)].data * 1.01

    @rule(seed=seeds)
    def frozen(self, seed):
        count_step()
        parameters = list(self.model.parameters())
        parameter = parameters[seed % len(parameters)]
        if sum(p.requires_grad for p in parameters) > 2 or not parameter.requires_grad:
            parameter.requires_grad_(not parameter.requires_grad)

    @rule(seed=seeds)
    def double(self, seed):
        """Another type, and back."""
        count_step()
        state = copy.deepcopy(self.model.state_dict())
        self.supernet.double()
        widths, images = self.widths(seed), self.images(seed).double()
        if self.is_widest(widths):
            widths = self.supernet.space.min()
        expected, _ = self.expect(widths, images)
        assert torch.equal(self.run(self.supernet, images, widths), expected)
        self.supernet.float()
        self.model.load_state_dict(state)
        self.optimizer = None

    @rule(seed=seeds)
    def hooked(self, seed):
        """A hook that changes an output works in subnets too."""
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        modules = [module for module in self.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        handle = modules[seed % len(modules)].register_forward_hook(lambda module, args, out: 1.5 * out)
        expected, extracted = self.expect(widths, images)
        before = snapshot(self.model)
        assert torch.equal(self.run(self.supernet, images, widths), expected)
        self.check_state(widths, before, extracted)
        handle.remove()

    @rule(seed=seeds)
    def replaced(self, seed):
        """Another head is refused, where widths are used; with the old one back all is well."""
        count_step()
        widths, images = self.widths(seed), self.images(seed)
        head = self.model.head
        self.model.head = nn.Linear(head.in_features + 1, head.out_features)
        for call in (
            lambda: self.supernet(images, widths),
            lambda: self.supernet.at(widths),
            lambda: self.supernet.extract(widths),
            lambda: cost(self.supernet, widths),
        ):
            with pytest.raises(ModelChangedError, match="convert it again"):
                call()
        self.model.head = head


def make_test(kind):
    """Return the state machine of one kind of model."""
    return type(f"Use{kind.title()}", (Use,), {"KIND": kind})


COMMON = {"deadline": None, "suppress_health_check": [*HealthCheck], "database": None}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "vit" else k for k in KINDS])
def test_a_few_uses_in_any_order_are_right(kind):
    short = settings(max_examples=2, stateful_step_count=6, derandomize=True, **COMMON)
    run_state_machine_as_test(make_test(kind), settings=short)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_uses_in_any_order_are_right(kind, capsys):
    examples, steps = (int(os.environ.get(f"STATES_{name}", n)) for name, n in (("EXAMPLES", 10), ("STEPS", 30)))
    before = count_step.total
    run_state_machine_as_test(
        make_test(kind), settings=settings(max_examples=examples, stateful_step_count=steps, **COMMON)
    )
    with capsys.disabled():
        print(f"\n{kind}: {count_step.total - before:,} steps")
