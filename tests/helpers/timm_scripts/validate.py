"""What timm's validate.py does, by the same calls, and how it was started."""

import json
import sys

import torch
from script_tools import create, parser_with
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import is_model, list_models, load_checkpoint
from timm.utils import accuracy

parser = parser_with("data")


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
    config = resolve_data_config(vars(args), model=model, use_test_size=True)
    model = model.to(args.device)
    if args.torchscript:
        model = torch.jit.script(model)
    dataset = create_dataset("", root=args.data, split="validation")
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
    facts |= {"top1": top1.item(), "logits": torch.cat(logits).tolist(), "argv": sys.argv, "spec": __spec__}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
