"""Train a supernet: the sandwich rule, distillation, and BatchNorm statistics."""
