"""What timm's inference.py does, by the same calls: the best class of every image, as CSV."""

import torch
from script_tools import create, parser_with
from timm.data import create_dataset, create_loader, resolve_data_config

parser = parser_with("data")
parser.add_argument("--topk", type=int, default=1)


def main():
    args = parser.parse_args()
    model = create(
        args,
        num_classes=args.num_classes,
        pretrained=args.pretrained or not args.checkpoint,
        checkpoint_path=args.checkpoint,
        **args.model_kwargs,
    )
    config = resolve_data_config(vars(args), model=model, use_test_size=True)
    dataset = create_dataset("", root=args.data, split="validation")
    loader = create_loader(
        dataset, batch_size=args.batch_size, use_prefetcher=True, num_workers=args.workers,
        device=torch.device(args.device), **config,
    )  # fmt: skip
    model.eval()
    with torch.inference_mode():
        chosen = torch.cat(
            [model(images).softmax(-1).topk(min(args.topk, model.num_classes))[1] for images, _ in loader]
        )
    for name, row in zip(loader.dataset.filenames(basename=True), chosen.tolist(), strict=True):
        print(name, *row, sep=",")


if __name__ == "__main__":
    main()
