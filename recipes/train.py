"""Train a slimmable supernet by the sandwich rule, with in-place distillation.

    python recipes/train.py -c recipes/configs/digits.yaml --output runs --experiment digits
    accelerate launch --multi_gpu --num_processes 8 recipes/train.py -c recipes/configs/imagenet_resnet50.yaml \\
        --data-dir /data/imagenet

The run folder (OUTPUT/EXPERIMENT) then holds args.yaml, held_out.json (which training images the search may use),
summary.csv (loss and held-out accuracy of the widest, the half-wide and the narrowest subnet after each epoch),
checkpoints/ (for --resume) and, once finished, supernet.safetensors. Test images are not touched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import set_seed
from common import command, make_supernet, parse_args, write_args, write_weights
from data import calibration_batches, open_images, plain_loader, split_training, training_loader
from loop import evaluate, fit, make_accelerator, make_loss
from torch import Tensor, nn

from timm_autoslim import calibrate, sandwich_step
from timm_autoslim.errors import DataError, OutputExistsError


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("train", __doc__, argv)
    accelerator = make_accelerator(args)
    accelerator.print(f"{accelerator.num_processes} process(es) on {accelerator.device}")

    run = Path(args.output, args.experiment or args.model.replace("/", "-"))
    begun = [name for name in ("supernet.safetensors", "checkpoints") if (run / name).exists()]
    if begun and not args.resume:
        raise OutputExistsError(f"{run} holds a training ({begun[0]}): --resume it, or give another --experiment.")

    images = open_images(args)
    args.num_classes = images.num_classes
    set_seed(args.seed)
    supernet = make_supernet(args, args.pretrained).to(accelerator.device)
    if args.channels_last:
        supernet.to(memory_format=torch.channels_last)
    space, plain = supernet.space, supernet.model
    with accelerator.main_process_first():
        run.mkdir(parents=True, exist_ok=True)
        training, held_out = split_training(args, len(images.train), run)
    if not held_out:
        raise DataError("--held-out 0 leaves no images to search on: give a share or a number of the training images.")
    if accelerator.is_main_process:
        write_args(run, args)
    accelerator.print(f"{args.model}: {len(training)} training and {len(held_out)} held-out images\n{space}")

    loss_fn = make_loss(args)
    calibration = calibration_batches(args, images.train, training, accelerator)
    held_out_loader = accelerator.prepare(plain_loader(args, images.train, held_out))

    def step(network: nn.Module, inputs: Tensor, targets: Tensor, update: int) -> dict[str, Tensor]:
        # By (seed, step): every process draws the same widths, and a resumed run those of the uninterrupted one.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
        done = sandwich_step(
            network, space, inputs, targets, loss_fn, generator=generator, n=args.sandwich,
            backward=accelerator.backward, no_sync=lambda: accelerator.no_sync(network),
        )  # fmt: skip
        return {"widest_loss": done.losses[0], "narrowest_loss": done.losses[1]}

    def validate() -> dict[str, float]:
        results = {"widest_top1": evaluate(accelerator, plain, held_out_loader)["top1"]}
        for name, widths in (("half", space.uniform(0.5)), ("narrowest", space.min())):
            subnet = supernet.extract(widths)
            calibrate(subnet, calibration)
            results[f"{name}_top1"] = evaluate(accelerator, subnet, held_out_loader)["top1"]
        return results

    fit(accelerator, args, supernet, plain, training_loader(args, images.train, training), step, validate, run)
    if accelerator.is_main_process:
        write_weights(run / "supernet.safetensors", plain)
        print(f"Supernet: {run / 'supernet.safetensors'}")
    accelerator.end_training()


if __name__ == "__main__":
    command(main)
