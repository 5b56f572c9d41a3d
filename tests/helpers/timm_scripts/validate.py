"""What timm's validate.py does, by the same calls, and how it was started."""

import json
import sys

import torch
from script_tools import create, parser_with
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.layers import apply_test_time_pool
from timm.models import is_model, list_models, load_checkpoint
from timm.utils import accuracy

parser = parser_with("data")
parser.add_argument("--use-train-size", action="store_true")
parser.add_argument("--test-pool", action="store_true")


def main():
    args = parser.parse_args()
    if not is_model(args.model) and (names := list_models(args.model, pretrained=True)):
        raise SystemExit(f"taken for a wildcard of {names}")  # validate.py would go on with these models
    model = create(
        args,
        pretrained=args.pretrained or not args.checkpoint,
        num_classes=args.num_classes,
        global_pool=args.gp,
        scriptable=args.torchscript,
        **args.model_kwargs,
    )
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, False)
    facts = {"model": type(model).__name__, "params": sum(p.numel() for p in model.parameters())}
    config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    pooled = False
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, config)
    model = model.to(args.device)
    if args.torchscript:
        model = torch.jit.script(model)
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    dataset = create_dataset("", root=args.data, split="validation", input_img_mode=mode)
    config["crop_pct"] = 1.0 if pooled else config["crop_pct"]
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        use_prefetcher=True,
        num_workers=args.workers,
        device=torch.device(args.device),
        **{key: config[key] for key in keys},
    )
    model.eval()
    logits, targets = [], []
    with torch.inference_mode():
        for images, labels in loader:
            logits.append(model(images))
            targets.append(labels)
    top1, _ = accuracy(torch.cat(logits), torch.cat(targets), topk=(1, 5))
    facts |= {
        "input": config,
        "pooled": pooled,
        "top1": top1.item(),
        "logits": torch.cat(logits).tolist(),
        "argv": sys.argv,
        "spec": __spec__,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
