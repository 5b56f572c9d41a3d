"""Fine-tune one network of a search as an ordinary model, test it, and export it.

    python recipes/finetune.py runs/digits -c recipes/configs/digits.yaml --network macs-50pct-searched

The network is cut out of the supernet, with the supernet's weights (or fresh ones: --from-scratch), trained on all
training images, and tested once. RUN/exported/NETWORK then loads through timm.create_model, RUN/results.json holds the
figures, and RUN/finetune/NETWORK the flags, summary.csv and checkpoints.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from common import base_args, command, load_supernet, make_supernet, parse_args, read_args, write_args, write_json
from data import calibration_batches, open_images, plain_loader, training_loader, used_training
from loop import Backward, Trainer, check_training, make_loss
from processes import make_accelerator, synchronize_norms
from torch import Tensor, nn
from validation import check_batch, evaluate

import timm_autoslim
from timm_autoslim.errors import ConfigError, OutputExistsError


def main(argv: list[str] | None = None) -> None:
    """Run the recipe."""
    args = parse_args("finetune", __doc__, argv)
    check_training(args)
    run = Path(args.run)
    entry = find_network(run, args.network)
    args = read_args(run, args)
    folder, exported = run / "finetune" / entry["name"], run / "exported" / entry["name"]
    if exported.exists():
        raise OutputExistsError(f"{exported} exists: this network is done. Remove the folder to fine-tune it again.")
    if (folder / "checkpoints").exists() and not args.resume:
        raise OutputExistsError(f"{folder} holds a training already: add --resume, or remove the folder.")

    accelerator = make_accelerator(args, folder)
    images = open_images(args)
    training = used_training(run, len(images.train))
    set_seed(args.seed)
    supernet = make_supernet(args) if args.from_scratch else load_supernet(run, args)
    plain = supernet.extract(supernet.space.from_dict(entry["widths"])).to(accelerator.device)
    if args.channels_last:
        plain.to(memory_format=torch.channels_last)
    if args.sync_bn:
        synchronize_norms(accelerator, plain)
    example = torch.zeros(args.batch_size, args.in_chans, args.img_size, args.img_size, device=accelerator.device)
    check_batch(plain, plain, example, accelerator.num_processes)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(accelerator, args, folder, {
        "network": entry["name"], "widths": entry["widths"], "training_images": len(training),
        "from_scratch": args.from_scratch,
    })  # fmt: skip
    if accelerator.is_main_process:
        write_args(folder, args)
    accelerator.print(f"{entry['name']}: {entry['macs'] / 1e6:.2f}M MACs, {entry['params'] / 1e6:.3f}M parameters, "
                      f"{len(training)} training images")  # fmt: skip

    loss_fn = make_loss(args)
    calibration = calibration_batches(args, images.train, training, accelerator)

    def step(network: nn.Module, inputs: Tensor, targets: Tensor, update: int, backward: Backward) -> dict[str, Tensor]:
        loss = loss_fn(network(inputs), targets)
        backward(loss)
        return {"loss": loss}

    trainer.fit(plain, plain, training_loader(args, images.train, training), step)
    plain = accelerator.unwrap_model(plain, keep_fp32_wrapper=False)
    timm_autoslim.calibrate(plain, calibration, distributed=True)
    test = evaluate(accelerator, plain, accelerator.prepare(plain_loader(args, images.test)))

    if accelerator.is_main_process:
        limits = zip(entry["unit"].split(" and "), entry["asked"].split(" and "), strict=True)
        figures = {
            "budget": " and ".join(f"{unit} <= {amount}" for unit, amount in limits), "found by": entry["kind"],
            "MACs": entry["macs"], "params": entry["params"], "test top-1, %": round(test["top1"], 2),
        }  # fmt: skip
        describe_input(plain, args)
        plain.cpu().eval()
        timm_autoslim.export(plain, exported, base=args.model, base_args=base_args(args), card=figures)
        result = {key: entry[key] for key in ("kind", "unit", "asked", "budget", "macs", "params")}
        write_results(run, entry["name"], result | test | {"epochs": args.epochs})
        print(f"{entry['name']}: test top-1 {test['top1']:.2f} %, loss {test['loss']:.4f}\nExported: {exported}")
    accelerator.end_training()


def find_network(run: Path, name: str | None) -> dict[str, Any]:
    """Look up one network in the run's search.json.

    Raises:
        ConfigError: no search was run, or the name is not in it.
    """
    path = run / "search.json"
    if not path.is_file():
        raise ConfigError(f"{run} holds no search.json: search first: python recipes/search.py {run}")
    networks = {entry["name"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))["networks"]}
    if name not in networks:
        near = difflib.get_close_matches(str(name), networks, n=1, cutoff=0.0)[0]
        raise ConfigError(f"--network {name}: {path} has {', '.join(networks)}. Did you mean {near}?")
    return networks[name]


def describe_input(plain: nn.Module, args: Any) -> None:
    """Let the exported folder tell timm how its images were prepared."""
    foreign = ("test_input_size", "test_crop_pct", "pool_size")  # of the base's own resolution
    own = {key: value for key, value in plain.pretrained_cfg.items() if key not in foreign}
    plain.pretrained_cfg = {
        **own, "num_classes": args.num_classes, "crop_pct": args.crop_pct, "mean": tuple(args.mean),
        "input_size": (args.in_chans, args.img_size, args.img_size), "std": tuple(args.std),
        "interpolation": args.interpolation,
    }  # fmt: skip


def write_results(run: Path, name: str, result: dict[str, Any]) -> None:
    """Add one network to results.json."""
    path = run / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, results | {name: result})


if __name__ == "__main__":
    command(main)
