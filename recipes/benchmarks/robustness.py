"""Interrupts at every line, and threads that run other subnets of one model: a table of docs/limits.md.

    python recipes/benchmarks/robustness.py --table docs/limits.md
    python recipes/benchmarks/robustness.py --every 1 --results runs/robustness.jsonl     # each line: hours

Interrupts: KeyboardInterrupt is raised at a line of Python that an action runs, of the library, the model or torch
alike, at one line after the other. After each, the model must be as it was (its modules, their flags, hooks, attributes
and tensors), and the next calls must be right: the outputs of the widest and of narrow subnets, and the gradients of a
training step.

Threads: several threads call one supernet at the same time, with widths that are given, in blocks, and without any, and
the model itself. Each output must be that of its own widths, bit for bit, or a named error.

Results are one JSON line each; a run that is started again goes on with what it lacks.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from timm_autoslim import AutoSlimError, Supernet, Widths, calibrate, convert, sandwich_step, search
from timm_autoslim.recipes.benchmarks.lib.interrupts import Condition, Interrupt
from timm_autoslim.recipes.benchmarks.lib.results import Results, make_parser, put_table

PART = 500  # lines that one result is of
CHECKED = 10  # after every so many interrupts a training step is run too
SWITCH = 1e-6  # seconds after which Python switches between threads


class Subject:
    """A small network with BatchNorm and dropout, its supernet, and what its calls return when nothing interrupts."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = timm.create_model(
            "resnet10t", channels=(8, 16, 24, 32), stem_width=8, num_classes=4, drop_rate=0.1, drop_path_rate=0.1
        )
        self.images, self.labels = torch.randn(4, 3, 32, 32), torch.arange(4)
        self.supernet: Supernet = convert(model, self.images[:1])
        space = self.supernet.space
        self.widths: list[Widths | None] = [None, space.min(), space.uniform(0.5), space.sample(seed_generator())]
        self.outputs = self.forward_all()
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.gradients = self.take_step()
        self.condition = Condition(self.model)

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.supernet.model

    @torch.no_grad()
    def forward_all(self) -> list[Tensor]:
        """Return the outputs of all subnets in evaluation mode."""
        modes = [(module, module.training) for module in self.supernet.modules()]
        outputs = [self.supernet.eval()(self.images, widths) for widths in self.widths]
        for module, training in modes:
            module.training = training
        return outputs

    def take_step(self) -> list[Tensor | None]:
        """Return the gradients of a sandwich step in training mode, from the first state."""
        torch.manual_seed(1)
        self.supernet.train().zero_grad()
        self.run_step()
        gradients = [None if p.grad is None else p.grad.clone() for p in self.supernet.parameters()]
        self.restore()
        return gradients

    def restore(self) -> None:
        """Put the statistics of the first state back, and take the gradients away."""
        self.model.load_state_dict(self.state)
        self.supernet.zero_grad()

    # -- actions

    def run_narrow(self) -> None:
        """Run one forward of the half-wide subnet."""
        with torch.no_grad():
            self.supernet(self.images, self.widths[2])

    def run_block(self) -> None:
        """Open a block, and run forward and backward in it."""
        widths = self.widths[2]
        assert widths is not None
        with self.supernet.at(widths):
            self.supernet(self.images).sum().backward()

    def run_step(self) -> None:
        """Run one sandwich step."""
        sandwich_step(
            self.supernet, self.supernet.space, self.images, self.labels, F.cross_entropy, generator=seed_generator(),
            n=3, regularize_widest_only=True,
        )  # fmt: skip

    def run_search(self) -> None:
        """Search for one step, and score the result."""
        search(
            self.supernet, {"macs": "95%"}, lambda subnet: F.cross_entropy(subnet(self.images), self.labels).item(),
            mode="reference", steps=1, refine="none", progress=False,
        )  # fmt: skip

    def run_calibration(self) -> None:
        """Measure the statistics of the model on one batch."""
        calibrate(self.model, [self.images])

    # -- afterwards

    def list_faults(self, training: bool, gradients: bool = True) -> list[str]:
        """Return what is wrong after an interrupt.

        Args:
            training: whether the action moves statistics.
            gradients: compare those of a training step too, which takes most of the time.
        """
        torch.set_grad_enabled(True)  # an interrupt may leave torch's own no_grad open, in any program
        faults = self.condition.list_changes(self.model, values=not training)
        if training:
            self.restore()
            faults += self.condition.list_changes(self.model)
        self.supernet.zero_grad()
        if self.supernet.open_block is not None:
            faults.append("an open block")
        try:
            if not all(map(torch.equal, self.forward_all(), self.outputs)):
                faults.append("another output")
            if gradients and not all(map(_equal, self.take_step(), self.gradients)):
                faults.append("another gradient")
        except Exception as error:  # whatever an interrupt leads to is a fault
            faults.append(f"the next call raises {type(error).__name__}")
        return faults


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def seed_generator() -> torch.Generator:
    """Return a generator that always draws the same."""
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class Action:
    """What is interrupted.

    Attributes:
        text: what it is.
        run: does it.
        training: whether it moves the statistics of the widest.
        stride: of so many lines one counts, where there are very many.
    """

    text: str
    run: Callable[[Subject], None]
    training: bool = False
    stride: int = 1


ACTIONS = {
    "narrow": Action("a narrow forward", Subject.run_narrow),
    "block": Action("an `at` block, forward and backward", Subject.run_block),
    "step": Action("a sandwich step", Subject.run_step, training=True),
    "calibrate": Action("a calibration", Subject.run_calibration, training=True),
    "search": Action("a search", Subject.run_search, stride=101),
}


def count_lines(action: str) -> int:
    """Return how many lines of Python an action runs, after it has run once."""
    subject = Subject()
    for _ in range(2):
        interrupt = Interrupt()
        interrupt.run(functools.partial(ACTIONS[action].run, subject))
        subject.restore()
    return interrupt.lines


def interrupt_lines(action: str, lines: Iterable[int]) -> list[dict[str, Any]]:
    """Interrupt an action at each of these lines; return where something is wrong afterwards, and what."""
    chosen = ACTIONS[action]
    subject, faults = Subject(), []
    chosen.run(subject)
    subject.restore()
    for index, line in enumerate(lines):
        interrupt = Interrupt(line)
        interrupt.run(functools.partial(chosen.run, subject))
        wrong = subject.list_faults(chosen.training, gradients=index % CHECKED == 0)
        if wrong:
            faults.append({"line": line, "place": interrupt.place, "faults": wrong})
            subject = Subject()
            chosen.run(subject)
            subject.restore()
    return faults


def call_from_threads(calls: int, threads: int) -> dict[str, int]:
    """Call subnets from several threads at once; return how many outputs were right, named errors, and wrong."""
    subject = Subject()
    subject.supernet.eval()
    counts = {"right": 0, "named": 0, "wrong": 0}

    def call(index: int) -> str:
        kind = index % len(subject.widths)
        widths, expected = subject.widths[kind], subject.outputs[kind]
        try:
            with torch.no_grad():
                if widths is None:
                    out = subject.supernet(subject.images) if index // 4 % 2 else subject.model(subject.images)
                elif index // 4 % 2:
                    with subject.supernet.at(widths):
                        out = subject.supernet(subject.images)
                else:
                    out = subject.supernet(subject.images, widths)
        except AutoSlimError:
            return "named"
        except Exception:  # an error without a name is as wrong as another output
            return "wrong"
        return "right" if torch.equal(out, expected) else "wrong"

    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        with ThreadPoolExecutor(threads) as pool, tqdm(total=calls, unit="call", leave=False) as bar:
            for kind in pool.map(call, range(calls)):
                counts[kind] += 1
                bar.update()
    finally:
        sys.setswitchinterval(interval)
    subject.supernet.train()
    counts["wrong"] += bool(subject.list_faults(training=False))
    return counts


def make_table(results: list[dict[str, Any]]) -> str:
    """Return the table, one line for each action."""
    lines = ["| what was tried | places or calls | right | named error | wrong |", "|---|---|---|---|---|"]
    by_action: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_action.setdefault(result["action"], []).append(result)
    for action, parts in by_action.items():
        if action == "threads":
            for row in parts:
                what = f"calls from {row['threads']} threads, Python switching every {SWITCH * 1e6:.0f} us"
                lines.append(f"| {what} | {row['calls']:,} | {row['right']:,} | {row['named']:,} | {row['wrong']:,} |")
            continue
        tried, wrong = sum(part["tried"] for part in parts), sum(len(part["faults"]) for part in parts)
        every = f", one in {parts[0]['every']:,} of {parts[0]['lines']:,} lines" if parts[0]["every"] > 1 else ""
        lines.append(
            f"| KeyboardInterrupt in {ACTIONS[action].text}{every} | {tried:,} | {tried - wrong:,} | | {wrong:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Try what has no result yet, and write the table."""
    parser = make_parser(__doc__, "docs/results/robustness.jsonl")
    parser.add_argument("--actions", nargs="+", choices=[*ACTIONS, "threads"], default=[*ACTIONS, "threads"])
    parser.add_argument("--every", type=int, default=7, help="raise at every so many lines")
    parser.add_argument("--calls", type=int, default=10_000, help="from threads")
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args()
    results = Results(args.results)
    known = {(row["action"], row.get("start"), row.get("every")) for row in results}
    for action in () if args.only_table else args.actions:
        if action == "threads":
            if ("threads", None, None) not in known:
                setting = {"calls": args.calls, "threads": args.threads}
                results.add({"action": action, **setting, **call_from_threads(**setting)})
            continue
        total = next((row["lines"] for row in results if row["action"] == action), None) or count_lines(action)
        every = args.every * ACTIONS[action].stride
        starts = range(1, total + 1, PART * every)
        for start in tqdm([s for s in starts if (action, s, every) not in known], desc=action, unit="part"):
            lines = range(start, min(total + 1, start + PART * every), every)
            faults = interrupt_lines(action, tqdm(lines, unit="line", leave=False))
            row = {"action": action, "lines": total, "every": every, "start": start, "tried": len(lines)}
            results.add({**row, "faults": faults})
    print(make_table(results))
    for row in itertools.chain.from_iterable(row.get("faults", ()) for row in results):
        print(f"line {row['line']}, {row['place']}: {'; '.join(row['faults'])}")
    if args.table:
        put_table(args.table, "robustness", make_table(results))


if __name__ == "__main__":
    main()
