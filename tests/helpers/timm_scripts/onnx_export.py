"""What timm's onnx_export.py does, by the same calls."""

import argparse

import timm
from timm.utils.onnx import onnx_export

parser = argparse.ArgumentParser()
parser.add_argument("output")
parser.add_argument("--model", "-m", default="mobilenetv3_large_100")
parser.add_argument("--num-classes", type=int, default=1000)
parser.add_argument("--img-size", type=int, default=None)
parser.add_argument("--batch-size", "-b", type=int, default=1)
parser.add_argument("--checkpoint", default="")
parser.add_argument("--check-forward", action="store_true")


def main():
    args = parser.parse_args()
    model = timm.create_model(
        args.model,
        num_classes=args.num_classes,
        in_chans=3,
        pretrained=not args.checkpoint,
        checkpoint_path=args.checkpoint,
        exportable=True,
    )
    onnx_export(
        model,
        args.output,
        check_forward=args.check_forward,
        input_size=(3, args.img_size, args.img_size),
        batch_size=args.batch_size,
    )


if __name__ == "__main__":
    main()
