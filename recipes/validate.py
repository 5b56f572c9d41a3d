"""Test a model: its accuracy on the test images of a folder.

    python -m timm_autoslim validate DATA --model runs/mine/exported/macs-50pct-searched
    python -m timm_autoslim validate DATA --model resnet18 --initial-checkpoint mine.safetensors

Images are prepared as the model's configuration says, unless flags say otherwise. The test images are those that `slim`
tests on: val, validation or test, or a fifth of a folder that has no such part.
"""

from __future__ import annotations

from timm_autoslim.errors import ConfigError
from timm_autoslim.recipes.lib.configuration import parse_args
from timm_autoslim.recipes.lib.images import open_images
from timm_autoslim.recipes.lib.loaders import make_evaluation_loader
from timm_autoslim.recipes.lib.models import set_layout
from timm_autoslim.recipes.lib.processes import describe_processes, make_accelerator
from timm_autoslim.recipes.lib.shell import run_command
from timm_autoslim.recipes.lib.starting_points import check_trained_flags, create_starting_model, is_trained
from timm_autoslim.recipes.lib.texts import write_count
from timm_autoslim.recipes.lib.validation import describe_chance, evaluate


def main(argv: list[str] | None = None) -> None:
    """Run the recipe.

    Raises:
        ConfigError: the flags name no trained weights or no images, or the weights are of other classes.
    """
    args = parse_args("validate", __doc__, argv)
    check_trained_flags(args, "validate", "tests")
    accelerator = make_accelerator(args)
    accelerator.print(describe_processes(accelerator))
    images = open_images(args)
    args.num_classes = images.num_classes
    if not is_trained(args):
        raise ConfigError(
            f"The weights of {args.model} are not of the {args.num_classes} classes of the data: give images of the "
            "classes that the model was trained on."
        )
    model = set_layout(args, create_starting_model(args).to(accelerator.device))
    result = evaluate(accelerator, model, accelerator.prepare(make_evaluation_loader(args, images.test)), args.model)
    accelerator.print(
        f"{args.model}: test top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}, "
        f"on {write_count(len(images.test), 'image')} of {args.img_size} pixels"
    )
    if warning := describe_chance(result["top1"], args.num_classes):
        accelerator.print(warning)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
