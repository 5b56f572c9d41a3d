"""What timm's train.py does, by the same calls: `--device-modules` first, epochs, checkpoints, averages, resuming."""

import importlib
from pathlib import Path

import torch
from script_tools import create, parser_with
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

parser = parser_with("data")
parser.add_argument("--device-modules", nargs="+", default=None)
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("--pretrained-path", default=None)
parser.add_argument("--resume", default="")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--drop", type=float, default=0.0)
parser.add_argument("--drop-path", type=float, default=None)
parser.add_argument("--drop-block", type=float, default=None)
parser.add_argument("--grad-checkpointing", action="store_true")
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=2e-5)
parser.add_argument("--output", default="output")


def main():
    args = parser.parse_args()
    for module in args.device_modules or ():
        importlib.import_module(module)
    overlay = {"pretrained_cfg_overlay": {"file": args.pretrained_path, "num_classes": -1}}
    model = create(
        args,
        **(overlay if args.pretrained_path else {}),
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        scriptable=args.torchscript,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    config = resolve_data_config(vars(args), model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    start = resume_checkpoint(model, args.resume, optimizer) if args.resume else 0
    ema = ModelEmaV3(model, decay=0.5)
    if args.resume:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=args.epochs)
    dataset = create_dataset("", root=args.data, split="train", is_training=True, batch_size=args.batch_size)
    loader = create_loader(
        dataset, input_size=config["input_size"], batch_size=args.batch_size, is_training=True, use_prefetcher=True,
        mean=config["mean"], std=config["std"], num_workers=args.workers, device=torch.device(args.device),
    )  # fmt: skip
    Path(args.output).mkdir()
    saver = CheckpointSaver(model, optimizer, args, model_ema=ema, checkpoint_dir=args.output)
    for epoch in range(start, args.epochs):
        model.train()
        for step, (images, labels) in enumerate(loader):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            ema.update(model, step=step)
        scheduler.step(epoch + 1, None)
        saver.save_checkpoint(epoch, metric=1.0)
    print(type(model).__name__, model.num_classes, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()
