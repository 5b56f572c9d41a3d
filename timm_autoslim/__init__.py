"""Slim any timm or torchvision model."""
