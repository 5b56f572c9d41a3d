"""Train a supernet: the sandwich rule, distillation losses, and BatchNorm statistics."""
