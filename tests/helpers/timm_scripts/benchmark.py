"""What timm's benchmark.py does, by the same calls: inference and training steps, without weights."""

import torch
from script_tools import parser_with
from timm.data import resolve_data_config
from timm.models import create_model, is_model, list_models
from timm.optim import create_optimizer_v2

parser = parser_with()
parser.add_argument("--drop", type=float, default=0.0)
parser.add_argument("--drop-path", type=float, default=None)
parser.add_argument("--drop-block", type=float, default=None)


def main():
    args = parser.parse_args()
    assert not is_model(args.model)
    assert list_models(args.model) == []  # what is no name may be a pattern; without matches it is taken as it is
    model = create_model(
        args.model,
        num_classes=args.num_classes,
        in_chans=3,
        global_pool=args.gp,
        scriptable=args.torchscript,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
    )
    classes, params = model.num_classes, sum(p.numel() for p in model.parameters())
    config = resolve_data_config(vars(args), model=model, use_test_size=True)
    if args.torchscript:
        model = torch.jit.script(model)
    images = torch.randn(args.batch_size, *config["input_size"])
    with torch.no_grad():
        outputs = model.eval()(images)
    assert outputs.shape == (args.batch_size, classes)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4)
    before = next(model.parameters()).clone()
    loss = torch.nn.functional.cross_entropy(model.train()(images), torch.randint(classes, (args.batch_size,)))
    loss.backward()
    optimizer.step()
    print(params, config["input_size"][-1], loss.item() > 0, torch.equal(before, next(model.parameters())))


if __name__ == "__main__":
    main()
