"""Fine-tune one network of a search as an ordinary model, test it, and export it.

    python recipes/finetune.py runs/digits -c recipes/configs/digits.yaml --network macs-50pct-searched

The network is extracted from the supernet, with the supernet's weights (or fresh ones: --from-scratch), trained on all
training images, by their labels and a --teacher, and tested once. RUN/exported/NETWORK then loads through
timm.create_model, and holds the accuracies in result.json. RUN/finetune/NETWORK holds the flags, summary.csv and
checkpoints. Several networks may be fine-tuned at the same time, each by a command of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_autoslim import (
    DISTILLATION_LOSSES,
    Accuracy,
    Found,
    Supernet,
    calibrate,
    export,
    reconstruct,
    write_amount,
)
from timm_autoslim.errors import ConfigError, OutputExistsError
from timm_autoslim.recipes.lib.checkpoints import Checkpoints
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.image_sources import UNLABELLED, Joined
from timm_autoslim.recipes.lib.images import open_images, open_unlabelled
from timm_autoslim.recipes.lib.loaders import (
    load_calibration_batches,
    make_evaluation_loader,
    make_training_loader,
    take_share,
)
from timm_autoslim.recipes.lib.models import (
    checkpoint_gradients,
    describe_base,
    describe_input,
    load_supernet,
    make_images,
    make_supernet,
    set_layout,
)
from timm_autoslim.recipes.lib.networks import find_network
from timm_autoslim.recipes.lib.ownership import own_folder
from timm_autoslim.recipes.lib.processes import make_accelerator, synchronize_norms
from timm_autoslim.recipes.lib.results import write_result
from timm_autoslim.recipes.lib.resume import find_start
from timm_autoslim.recipes.lib.run_folder import read_args, write_args
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.splits import read_all_training
from timm_autoslim.recipes.lib.teacher import check_unlabelled, choose_teacher, create_teacher
from timm_autoslim.recipes.lib.trainer import Backward, Trainer
from timm_autoslim.recipes.lib.training import make_loss, prepare
from timm_autoslim.recipes.lib.validation import check_batch, evaluate

AGAIN = "the same command with --resume goes on from the last checkpoint"  # after an interruption


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("finetune", __doc__, argv)
    check_unlabelled(args)
    run = Path(args.run)
    network = find_network(run, args.network)
    args = read_args(run, args)
    folder, exported = run / "finetune" / network.name, run / "exported" / network.name
    accelerator = make_accelerator(args, folder)
    with own_folder(folder, accelerator):
        if exported.exists():
            finish(accelerator, args, network, exported)
        elif (folder / "checkpoints").exists() and not args.resume:
            raise OutputExistsError(f"{folder} holds a training already: add --resume, or remove the folder.")
        else:
            finetune(accelerator, args, run, network, exported)
    accelerator.end_training()


def finetune(accelerator: Accelerator, args: argparse.Namespace, run: Path, network: Found, exported: Path) -> None:
    """Train, test and export one network."""
    folder = run / "finetune" / network.name
    images = open_images(args)
    training = read_all_training(run, len(images.train))
    source, labelled = images.train, len(training)
    if unlabelled := open_unlabelled(args):
        source = Joined(images.train, unlabelled)
        training = [*training, *range(source.labelled, len(source))]
    set_seed(args.seed)
    fresh = not (args.resume and Checkpoints(folder, args.checkpoint_hist).list_paths())  # else weights are there
    reconstruction = training[: args.reconstruct] if fresh and not args.from_scratch else []
    loader = make_evaluation_loader(args, source, take_share(reconstruction, accelerator))
    model = extract(accelerator, args, run, network, loader)
    start = find_start(accelerator, args, folder, {
        "network": network.name, "widths": network.widths.to_dict(), "training_images": len(training),
        **({"unlabelled_images": len(unlabelled)} if unlabelled else {}),
        "from_scratch": args.from_scratch,
    })  # fmt: skip
    if accelerator.is_main_process:
        write_args(folder, args)
    cost = network.cost
    accelerator.print(f"{network.name}: {write_amount(cost.macs, 2)} MACs, {write_amount(cost.params, 3)} parameters, "
                      f"{len(training)} training images"
                      + (f", {len(unlabelled)} of them without labels" if unlabelled else ""))  # fmt: skip

    calibration = load_calibration_batches(args, source, training[:labelled], accelerator)
    loop = prepare(accelerator, args, start, model, model, make_training_loader(args, source, training))
    Trainer(loop, Lesson(accelerator, args)).fit()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    calibrate(model, calibration, distributed=True)
    test = evaluate(accelerator, model, accelerator.prepare(make_evaluation_loader(args, images.test)), network.name)

    if accelerator.is_main_process:
        export_tested(args, network, model, test, exported)
    accelerator.wait_for_everyone()


def export_tested(
    args: argparse.Namespace, network: Found, model: nn.Module, test: dict[str, float], exported: Path
) -> None:
    """Export a fine-tuned network, and write beside it what its test has found."""
    card = {
        "budget": network.text.replace("<=", " <= "), "method": network.method, "MACs": network.cost.macs,
        "params": network.cost.params, "test top-1, %": round(test["top1"], 2),
    }  # fmt: skip
    describe_input(model, args)
    checkpoint_gradients(model, args, on=False)
    model.cpu().eval()
    export(model, exported, card=card, **describe_base(args))
    write_result(exported, network, test | {"epochs": args.epochs})
    print(f"{network.name}: test top-1 {test['top1']:.2f} %, loss {test['loss']:.4f}\nExported: {exported}")


def finish(accelerator: Accelerator, args: argparse.Namespace, network: Found, exported: Path) -> None:
    """Test a network that was exported before its fine-tuning was killed; one that has a result is done.

    Raises:
        OutputExistsError: the network is done, or the folder holds another one.
    """
    result = Accuracy.load(exported)
    if result:
        same = result.widths == network.widths.to_dict()
        what = "this network is done" if same else "a network of this name with other widths, of an earlier search"
        raise OutputExistsError(f"{exported} exists: {what}. Rename or remove the folder to fine-tune it again.")
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).to(accelerator.device)
    if dict(model.autoslim.widths) != network.widths.to_dict():
        raise OutputExistsError(f"{exported} holds a model with other widths than {network.name}: rename or remove it.")
    test = evaluate(accelerator, model, accelerator.prepare(make_evaluation_loader(args, open_images(args).test)))
    if accelerator.is_main_process:
        write_result(exported, network, test)
        print(f"{network.name}: test top-1 {test['top1']:.2f} %, loss {test['loss']:.4f}\nExported before: {exported}")


def extract(
    accelerator: Accelerator, args: argparse.Namespace, run: Path, network: Found, loader: DataLoader[Any]
) -> nn.Module:
    """Extract the network from the run's supernet, on its device, with trained or fresh weights.

    Args:
        accelerator: Accelerate's.
        args: the flags.
        run: the run folder.
        network: what to extract.
        loader: this process's images to reconstruct its layers with; none for the supernet's weights as they are.

    Raises:
        ConfigError: the supernet is not trained, or a batch is too small for BatchNorm.
    """
    supernet = make_supernet(args) if args.from_scratch else load_supernet(run, args)
    widths = supernet.space.from_dict(network.widths.to_dict())
    model = set_layout(args, supernet.extract(widths).to(accelerator.device))
    if len(loader):
        repair(accelerator, model, set_layout(args, supernet.to(accelerator.device)), loader)
    if args.sync_bn:
        synchronize_norms(accelerator, model)
    check_batch(model, model, make_images(args, args.batch_size, accelerator.device), accelerator.num_processes)
    checkpoint_gradients(model, args)
    return model


def repair(accelerator: Accelerator, model: nn.Module, supernet: Supernet, loader: DataLoader[Any]) -> None:
    """Give the model, in place, the weights that reproduce what the widest subnet computes."""
    batches = (inputs.to(accelerator.device) for inputs, _ in loader)
    report = reconstruct(model, supernet, batches, distributed=True)
    better = sum(layer.reason is None for layer in report.layers)
    accelerator.print(f"reconstructed: {better} of {len(report.layers)} layers, from {report.images} images")


class Lesson:
    """The training step of a fine-tuning: the loss on the labels, and that of the teacher if there is one."""

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace) -> None:
        self.accelerator, self.share, self.loss_fn = accelerator, args.teach, make_loss(args)
        self.temperature, self.distill = args.distill_temperature, DISTILLATION_LOSSES[args.distill_loss]
        name = choose_teacher(args) if args.epochs and args.teach else None
        self.teacher: nn.Module | None = None
        if args.unlabelled and not name:
            raise ConfigError("--unlabelled needs a --teacher: the original has no trained weights of these classes.")
        if name:
            teacher = create_teacher(argparse.Namespace(**vars(args) | {"teacher": name}))
            self.teacher = set_layout(args, teacher.to(accelerator.device))
            accelerator.print(f"teacher: {name}, with {args.teach:g} of the loss")

    def __call__(
        self, network: nn.Module, inputs: Tensor, targets: Tensor, update: int, backward: Backward
    ) -> dict[str, Tensor]:
        """Add the gradients of one batch; returns the loss."""
        outputs = network(inputs)
        if not self.teacher:
            loss = self.loss_fn(outputs, targets)
        else:
            with torch.no_grad(), self.accelerator.autocast():
                logits = self.teacher(inputs)
            loss = self._learn(outputs, targets, logits)
        backward(loss)
        return {"loss": loss}

    def _learn(self, outputs: Tensor, targets: Tensor, logits: Tensor) -> Tensor:
        """Return the loss of a batch; of images without labels it is the teacher's alone."""
        mask = targets != UNLABELLED if targets.dim() == 1 else torch.ones(len(targets), dtype=torch.bool)
        count, total = int(mask.sum()), len(targets)
        if count == total:
            lesson = self.distill(outputs, logits, temperature=self.temperature)
            mixed: Tensor = (1 - self.share) * self.loss_fn(outputs, targets) + self.share * lesson
            return mixed
        loss: Tensor = self.distill(outputs[~mask], logits[~mask], temperature=self.temperature) * (total - count)
        if count:
            loss = loss + self._learn(outputs[mask], targets[mask], logits[mask]) * count
        return loss / total


if __name__ == "__main__":
    run_command(main, AGAIN)
