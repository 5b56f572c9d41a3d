"""Train a small model from scratch, so that `pretrained.py` has an original of another family to slim.

    python recipes/benchmarks/train_original.py --data-dir DIR --output FILE

DIR has train.tar and test.tar (or folders) of class folders, here of CIFAR-10. All training images are used: AdamW, a
warm-up and a cosine, label smoothing, crops and flips. The last weights are written, whatever their accuracy, and the
test images are looked at for the log alone. Training goes on from the file beside --output that ends in .training.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from timm_autoslim.recipes.benchmarks.lib.fitting import Pictures, fit
from timm_autoslim.recipes.benchmarks.lib.images import find_part, measure_top1, read_images
from timm_autoslim.recipes.benchmarks.pretrained import make_loss, scale

CONVNEXT = (
    '{"patch_size": 2, "depths": [2, 2, 4, 2], "dims": [32, 64, 128, 256], "conv_mlp": false, "ls_init_value": 0.1}'
)


def train_original(args: argparse.Namespace) -> float:
    """Train the model, write its weights, and return its test accuracy in per cent."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    size = args.img_size
    images, targets = (t.to(args.device) for t in read_images(find_part(args.data_dir, "train"), args.count, 0, size))
    test, classes = (t.to(args.device) for t in read_images(find_part(args.data_dir, "test"), args.count, 0, size))
    model = timm.create_model(args.model, num_classes=int(targets.max()) + 1, **args.model_kwargs)
    model = model.to(args.device, memory_format=torch.channels_last)
    start = time.monotonic()

    def log(epoch: int, loss: float) -> None:
        shown = epoch % 5 == 0 or epoch == args.epochs
        top1 = f", test top-1 {measure_top1(model, (scale(test), classes)):.2f}" if shown else ""
        print(f"epoch {epoch}: loss {loss:.3f}{top1}, {time.monotonic() - start:.0f} s", flush=True)
        model.train()

    graphed: Any = {"capturable": True} if images.is_cuda else {}
    fit(
        model, Pictures(images, targets, 127), scale, make_loss(None),
        functools.partial(torch.optim.AdamW, weight_decay=0.05, **graphed), epochs=args.epochs, batch=args.batch,
        rate=args.rate, warmup=args.epochs / 10, seed=args.seed, on_epoch=log,
        checkpoint=args.output.with_suffix(".training"), every=1,
    )  # fmt: skip
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.output)
    return measure_top1(model, (scale(test), classes))


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a safetensors file")
    parser.add_argument("--model", default="convnext_atto")
    parser.add_argument("--model-kwargs", type=json.loads, default=CONVNEXT, help=f"JSON, by default {CONVNEXT}")
    parser.add_argument("--img-size", type=int, default=32, help="side of the images")
    parser.add_argument("--count", type=int, help="of the images, all by default")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    print(f"test top-1 {train_original(parser.parse_args()):.2f}")


if __name__ == "__main__":
    main()
