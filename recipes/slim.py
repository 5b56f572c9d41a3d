"""Slim a trained model to some budgets, with one command: no supernet is trained.

    python -m timm_autoslim slim --model NAME --initial-checkpoint FILE --data-dir DIR --budgets macs=50% macs=30%
    accelerate launch -m timm_autoslim slim ...          # the same on several GPUs

The original is tested first. Then, budget by budget: the channels are searched on the trained model itself, the network
is cut out, its layers get the weights that reproduce the original's outputs, and it is fine-tuned with the original as
the teacher, tested and exported. The search for a tighter budget goes on from there (the same metrics, none to more);
one in other metrics starts from the original. At the end every network is loaded again and measured beside the
original.

OUTPUT/EXPERIMENT/exported holds the networks, which timm.create_model loads, and table.md compares them. The same
command goes on after an interruption, and does what is left where there are further --budgets.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from timm_autoslim import (
    Accuracy,
    Budget,
    Found,
    Stage,
    Supernet,
    Team,
    cost,
    describe_luck,
    files,
    parse_budgets,
    plan_stages,
    write_amount,
)
from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.finetune import finetune, finish
from timm_autoslim.recipes.lib.comparison import TURNS, Row, compare_networks, read_original, write_original
from timm_autoslim.recipes.lib.configuration import list_flags, parse_args
from timm_autoslim.recipes.lib.durations import Counts, Stages, estimate_stages, write_time
from timm_autoslim.recipes.lib.guide import write_guide
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import make_evaluation_loader
from timm_autoslim.recipes.lib.models import load_supernet, make_supernet, set_layout
from timm_autoslim.recipes.lib.networks import is_searched, read_networks
from timm_autoslim.recipes.lib.onnx_file import check_onnx
from timm_autoslim.recipes.lib.ownership import own_folder
from timm_autoslim.recipes.lib.processes import describe_processes, make_accelerator
from timm_autoslim.recipes.lib.run_folder import SUPERNET, write_args, write_weights
from timm_autoslim.recipes.lib.settings import (
    FLAGS,
    check_same,
    describe_settings,
    list_remembered,
    take_left_out,
    write_settings,
)
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.splits import SPLIT, count_split, split_training
from timm_autoslim.recipes.lib.stage_folders import check_plan, check_start, choose_start, find_first
from timm_autoslim.recipes.lib.starting_points import (
    check_trained_flags,
    create_starting_model,
    is_trained,
    order_by_images,
)
from timm_autoslim.recipes.lib.teacher import check_unlabelled
from timm_autoslim.recipes.lib.texts import write_count
from timm_autoslim.recipes.lib.validation import describe_chance, evaluate
from timm_autoslim.recipes.search import count_widest, make_conditions, search_networks


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("slim", __doc__, argv)
    run = name_run(args)
    left_out = take_left_out(args, list_flags("slim", argv), run / FLAGS) if has_begun(run) else ""
    flags = list_remembered(args)
    check_flags(args)
    args.run = str(run)
    accelerator = make_accelerator(args, run)
    accelerator.print("\n".join(filter(None, [describe_processes(accelerator), left_out])))
    with own_folder(run, accelerator):
        Slimming(accelerator, args, run, flags).go()
    accelerator.end_training()


def name_run(args: argparse.Namespace) -> Path:
    """Return the folder of the run; without --experiment it is called as the model."""
    return Path(args.output, args.experiment or (args.model or "").rpartition(":")[2].strip("/").replace("/", "-"))


def has_begun(run: Path) -> bool:
    """Whether work was done that other settings would not fit."""
    return any((run / name).exists() for name in ("search", "search-progress.json", "finetune"))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what is no trained model, or no data.

    Raises:
        ConfigError: the flags name no trained weights or no images.
    """
    check_trained_flags(args, "slim", "starts from")
    if args.onnx:
        check_onnx()
    check_unlabelled(args)


class Slimming:
    """All stages of one run; each is skipped where it is finished."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace, run: Path, flags: dict[str, Any]) -> None:
        self.accelerator, self.args, self.run, self.flags = accelerator, args, run, flags
        self.images = open_images(args)
        args.num_classes = self.images.num_classes
        self.stages = Stages(accelerator, run / "durations.json")

    def go(self) -> None:
        """Run the stages that are not finished, and compare the networks."""
        with self.stages:
            self._run_stages(self._test_original())

    def _run_stages(self, plan: list[Stage]) -> None:
        """Come to the network of every budget, and compare them."""
        first = find_first(self.run, plan)
        networks: dict[Budget, Found] = {}
        folders: dict[Budget | None, Path] = {}  # of exported networks
        for stage in plan:
            source, is_first = folders.get(stage.start), stage.budget == first
            networks[stage.budget], folders[stage.budget] = self._slim_to(stage, source, is_first)
        self._compare([networks[stage.budget] for stage in plan if stage.asked])

    # ------------------------------------------------------------------------------------------------ the original

    def _test_original(self) -> list[Stage]:
        """Test the original and make it the supernet of the run; return the searches that lead to the budgets.

        Raises:
            ConfigError: the settings are not those of before, and the work has begun.
        """
        args, run, accelerator = self.args, self.run, self.accelerator
        path = run / "settings.yaml"
        settings = describe_settings(path, args, self.images)
        same = check_same(path, settings, has_begun(run))
        row = read_original(run) if same and (run / SUPERNET).is_file() else None
        count_split(args, len(self.images.train))  # refuses what leaves no images
        supernet = load_supernet(run, args) if row else self._start(args)
        plan = self._plan(supernet)  # refuses budgets out of reach
        check_plan(run, plan)
        accelerator.wait_for_everyone()  # all have read what is written now, when nothing is left to refuse
        if accelerator.is_main_process:
            write_settings(path, settings)
            write_settings(run / FLAGS, self.flags)
        self.stages.count = 2 + 2 * len(plan)
        self.stages.announce("original", f"the original: {args.model}" + (" (tested before)" if row else ""))
        if not row:
            self._set_up(args, run, supernet)
            row = self._measure_original(supernet, plan)
        accelerator.print(
            f"test top-1 {row.top1:.2f} %, {write_amount(row.macs, 2)} MACs, {write_amount(row.params, 3)} params, "
            f"{len(supernet.space)} groups of channels"
        )
        if warning := describe_chance(row.top1, args.num_classes):
            accelerator.print(warning)
        self._check_held_out(supernet)
        accelerator.print(f"Plan: {'; '.join(map(str, plan))}.")
        return plan

    def _measure_original(self, supernet: Supernet, plan: list[Stage]) -> Row:
        """Test and count the original, write down what comes out, and say how long all stages may take."""
        args, run, accelerator = self.args, self.run, self.accelerator
        begin = time.perf_counter()
        model = supernet.to(accelerator.device).model
        loader = accelerator.prepare(make_evaluation_loader(args, self.images.test))
        top1 = evaluate(accelerator, model, loader, "the original")["top1"]
        seconds = (time.perf_counter() - begin) / max(1, len(self.images.test))
        spent = cost(supernet)
        row = Row("original", top1, spent.macs, spent.params, (run / SUPERNET).stat().st_size)
        total = estimate_stages(args, supernet, plan, seconds, self._count_images())
        accelerator.print(f"All stages may take {write_time(total)}: a rough estimate, from this test.")
        if accelerator.is_main_process:
            write_original(run, row)
        accelerator.wait_for_everyone()
        return row

    def _start(self, args: argparse.Namespace) -> Supernet:
        """Make the supernet of a trained model.

        Raises:
            ConfigError: its weights are of other classes than the data.
        """
        set_seed(args.seed)
        if not is_trained(args):
            raise ConfigError(
                f"The weights of {args.model} are not of the {args.num_classes} classes of the data: fine-tune the "
                "model on them first."
            )
        return set_layout(args, make_supernet(args, create_starting_model(args)).to(self.accelerator.device))

    def _set_up(self, args: argparse.Namespace, folder: Path, supernet: Supernet, split: Path | None = None) -> None:
        """Make a run folder of a supernet, and put its channels in order."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            if split:
                files.write_text(folder / SPLIT, split.read_text(encoding="utf-8"))
            else:
                split_training(args, len(self.images.train), folder, anew=True)
        accelerator.wait_for_everyone()
        training, _ = split_training(args, len(self.images.train), folder)
        if args.order:
            order_by_images(accelerator, args, supernet, self.images.train, training)
        if accelerator.is_main_process:
            write_args(folder, args)
            write_weights(folder / SUPERNET, supernet.model)
        accelerator.wait_for_everyone()

    def _plan(self, supernet: Supernet) -> list[Stage]:
        """Return the searches: the metrics in the order of --budgets, which later budgets leave as it is.

        Of the same metrics the widest comes first, for the next search goes on from there.
        """
        team = Team(self.accelerator.process_index, self.accelerator.num_processes, gather_object)
        conditions = make_conditions(self.args, self.args.budgets, team)
        texts = self.args.budgets
        budgets = [budget for text in texts for budget in parse_budgets(supernet, [text], conditions=conditions)]
        widest = count_widest(supernet, budgets, conditions)
        places = {metrics: place for place, metrics in enumerate(dict.fromkeys(frozenset(b.metrics) for b in budgets))}
        budgets_in_order = sorted(dict.fromkeys(budgets), key=lambda b: (places[frozenset(b.metrics)], b.used(widest)))
        return plan_stages(budgets_in_order, widest, from_widest=bool(self.args.choices or self.args.min_width))

    def _count_images(self) -> Counts:
        training, held_out = split_training(self.args, len(self.images.train), self.run)
        ranking = min(len(held_out), self.args.images or len(held_out))
        return Counts(len(training) + len(held_out), ranking, len(self.images.test))

    def _check_held_out(self, supernet: Supernet) -> None:
        """Warn where luck decides which of the subnets seems best."""
        if luck := describe_luck(self._count_images().ranking, len(supernet.space)):
            self.accelerator.print(f"Warning: {luck} Give more images, or a larger --held-out.")

    # ------------------------------------------------------------------------------------------------ one budget

    def _slim_to(self, stage: Stage, source: Path | None, first: bool) -> tuple[Found, Path]:
        """Search the network of one stage, reconstruct, fine-tune and test it; return it and its exported folder."""
        budget = stage.budget
        args, folder = choose_start(self.args, self.run, stage, source, first)
        start = source.name if source else "the original"
        done = is_searched(folder)
        text = f"search {budget.text}"
        self.stages.announce(text, f"{text}, from {start}" + (" (done before)" if done else ""))
        check_start(args, folder, budget)
        if not done:
            if not (folder / SUPERNET).is_file():
                self._set_up(args, folder, self._start(args), split=self.run / SPLIT)
            flags = {"batch_size": self._choose_batch(), "baselines": []}
            if args.divisor and args.refine == "units":  # else the last channels would be no multiples
                flags["refine"] = "choices"
            of_search = argparse.Namespace(**vars(args) | flags)
            original = self.run if args.score_by == "outputs" else None
            search_networks(self.accelerator, of_search, folder, [budget], original)
            self.accelerator.wait_for_everyone()
        (network,) = read_networks(folder).values()
        exported = self.run / ("exported" if stage.asked else "between") / network.name
        result = Accuracy.load(exported)
        done = bool(result and result.widths == network.widths.to_dict())
        what = "reconstruct, fine-tune, test and export" if args.epochs else "reconstruct, test and export"
        self.stages.announce(network.name, f"{what} {network.name}" + (" (done before)" if done else ""))
        if not done:
            if not (folder / SUPERNET).is_file():  # of a search whose network was removed
                self._set_up(args, folder, self._start(args), split=self.run / SPLIT)
            self._finetune(args, folder, network, exported)
        if self.accelerator.is_main_process:  # what only an unfinished network needs, to go on from
            shutil.rmtree(folder / "finetune" / network.name / "checkpoints", ignore_errors=True)
            if folder != self.run:
                (folder / SUPERNET).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return network, exported

    def _finetune(self, args: argparse.Namespace, run: Path, network: Found, exported: Path) -> None:
        folder = run / "finetune" / network.name
        accelerator = make_accelerator(args, folder)  # whose curves lie there
        with own_folder(folder, accelerator):
            if exported.exists():  # it was killed before its test
                finish(accelerator, args, network, exported)
            else:
                finetune(accelerator, args, run, network, exported)
        accelerator.wait_for_everyone()
        accelerator.free_memory()

    def _choose_batch(self) -> int:
        """Return how many held-out images are scored together: an eighth, for the fast search looks at parts."""
        images = self._count_images().ranking
        return max(min(images, 32), min(-(-images // 8), 256))

    # ------------------------------------------------------------------------------------------------ the end

    def _compare(self, networks: list[Found]) -> None:
        """Load every network again, test it, measure it, and write the table."""
        args, run = self.args, self.run
        self.stages.announce("compare", "load the networks again, test and measure them")
        table = compare_networks(self.accelerator, args, run, self.images, networks)
        if self.accelerator.is_main_process:
            write_guide(run, [network.name for network in networks], args.onnx)
            threads = write_count(args.latency_threads, "thread")
            places = f"{run}/exported" + (f", {run}/onnx" if args.onnx else "")
            print(f"\n{table}\nLatency: {args.latency_runtime} on {args.latency_device}, {threads}, batch "
                  f"{args.cost_batch_size}; the median, and the half of {TURNS} turns in the middle.\n"
                  f"{self.stages.describe_times()}\n"
                  f"Networks: {places}. After `import timm_autoslim`, timm loads them: "
                  f"timm.create_model('local-dir:{run}/exported/NAME', pretrained=True)")  # fmt: skip


if __name__ == "__main__":
    run_command(main)
