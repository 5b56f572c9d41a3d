"""MONAI's networks, in two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks import nets
from torch import nn

_PLANE = torch.rand(1, 1, 64, 64)
_VOLUME = torch.rand(1, 1, 32, 32, 32)
_UNET = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2), "num_res_units": 2}
_DYN = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [32, 64, 128]}
_VIT = {
    "img_size": (64, 64),
    "patch_size": (16, 16),
    "hidden_size": 64,
    "mlp_dim": 128,
    "num_layers": 2,
    "num_heads": 4,
}
_GAN = {"channels": (16, 32, 64), "strides": (2, 2, 2)}


def _build(name: str, image: torch.Tensor, **arguments: Any) -> tuple[nn.Module, Any]:
    return getattr(nets, name)(**arguments), image


def _segmenter(name: str, image: torch.Tensor, **arguments: Any) -> tuple[nn.Module, Any]:
    return _build(name, image, spatial_dims=image.dim() - 2, in_channels=1, out_channels=3, **arguments)


MODELS = {
    "UNet": lambda: _segmenter("UNet", _PLANE, **_UNET),
    "UNet, 3D": lambda: _segmenter("UNet", _VOLUME, **_UNET),
    "AttentionUnet": lambda: _segmenter("AttentionUnet", _PLANE, channels=(16, 32, 64), strides=(2, 2)),
    "BasicUNet": lambda: _segmenter("BasicUNet", _PLANE),
    "BasicUNetPlusPlus": lambda: _segmenter("BasicUNetPlusPlus", _PLANE),
    "DynUNet": lambda: _segmenter("DynUNet", _PLANE, **_DYN),
    "DynUNet, 3D": lambda: _segmenter("DynUNet", _VOLUME, **_DYN),
    "SegResNet": lambda: _segmenter("SegResNet", _PLANE, init_filters=16),
    "SegResNet, 3D": lambda: _segmenter("SegResNet", _VOLUME, init_filters=16),
    "SegResNetDS": lambda: _segmenter("SegResNetDS", _PLANE, init_filters=16),
    "VNet": lambda: _segmenter("VNet", _PLANE),
    "UNETR": lambda: _segmenter("UNETR", _PLANE, img_size=64, hidden_size=96, mlp_dim=192, num_heads=4),
    "SwinUNETR": lambda: _segmenter("SwinUNETR", _PLANE, feature_size=24),
    "SwinUNETR, 3D": lambda: _segmenter("SwinUNETR", torch.rand(1, 1, 64, 64, 64), feature_size=24),
    "FlexibleUNet": lambda: _build("FlexibleUNet", torch.rand(1, 3, 64, 64), in_channels=3, out_channels=2,
                                   backbone="efficientnet-b0", pretrained=False),
    "DenseNet121": lambda: _segmenter("DenseNet121", _PLANE),
    "EfficientNetBN": lambda: _build("EfficientNetBN", _PLANE, model_name="efficientnet-b0", pretrained=False,
                                     spatial_dims=2, in_channels=1, num_classes=3),
    "ResNet, 3D": lambda: (nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=3), _VOLUME),
    "SEResNet50": lambda: _build("SEResNet50", _PLANE, spatial_dims=2, in_channels=1, num_classes=3),
    "HighResNet": lambda: _segmenter("HighResNet", _PLANE),
    "AHNet": lambda: _segmenter("AHNet", torch.rand(1, 1, 128, 128)),
    "ViT": lambda: _build("ViT", _PLANE, in_channels=1, spatial_dims=2, classification=True, num_classes=3, **_VIT),
    "ViTAutoEnc": lambda: _build("ViTAutoEnc", _PLANE, in_channels=1, spatial_dims=2, **_VIT),
    "AutoEncoder": lambda: _segmenter("AutoEncoder", _PLANE, channels=(16, 32, 64), strides=(2, 2, 2)),
    "MedNeXtS": lambda: _segmenter("MedNeXtS", _PLANE),
    "HoVerNet": lambda: _build("HoVerNet", torch.rand(1, 3, 256, 256), mode="fast", in_channels=3, out_classes=2),
    "AutoencoderKL": lambda: _segmenter("AutoencoderKL", _PLANE, num_res_blocks=(1, 1), channels=(32, 64),
                                        attention_levels=(False, True), latent_channels=4, norm_num_groups=8),
    "VQVAE": lambda: _segmenter("VQVAE", _PLANE, channels=(32, 64), num_res_channels=(32, 64), num_res_layers=1,
                                downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
                                upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), num_embeddings=16,
                                embedding_dim=16),
    "DiffusionModelUNet": lambda: (
        nets.DiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(32, 64),
                                attention_levels=(False, True), num_head_channels=(0, 16), norm_num_groups=8),
        (_PLANE, torch.tensor([3])),
    ),
    "Classifier": lambda: _build("Classifier", _PLANE, in_shape=(1, 64, 64), classes=3, **_GAN),
    "PatchDiscriminator": lambda: _build("PatchDiscriminator", _PLANE, spatial_dims=2, channels=32, in_channels=1),
}  # fmt: skip
