"""kornia's descriptors, detectors of keypoints, and further networks."""

from __future__ import annotations

import kornia.feature as features
import torch
from kornia.models.dexined import DexiNed
from kornia.models.rrdbnet import RRDBNet
from kornia.models.small_sr import SmallSRNet
from kornia.models.tiny_vit import TinyViT
from kornia.models.vit import VisionTransformer
from kornia.models.vit_mobile import MobileViT
from torch import nn


def _patches(model: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    return model, torch.rand(2, 1, 32, 32)


MODELS = {
    "HardNet": lambda: _patches(features.HardNet(pretrained=False)),
    "HardNet8": lambda: _patches(features.HardNet8(pretrained=False)),
    "HyNet": lambda: _patches(features.HyNet(pretrained=False)),
    "SOSNet": lambda: _patches(features.SOSNet(pretrained=False)),
    "TFeat": lambda: _patches(features.TFeat(pretrained=False)),
    "OriNet": lambda: _patches(features.OriNet(pretrained=False)),
    "LAFAffNetShapeEstimator.features": lambda: _patches(features.LAFAffNetShapeEstimator(pretrained=False).features),
    "KeyNet": lambda: (features.KeyNet(pretrained=False), torch.rand(1, 1, 64, 64)),
    "XFeatModel": lambda: (features.XFeatModel(), torch.rand(1, 3, 64, 64)),
    "DISK.unet": lambda: (features.DISK().unet, torch.rand(1, 3, 64, 64)),
    "SOLD2_detector.model": lambda: (features.SOLD2_detector(pretrained=False).model, torch.rand(1, 1, 64, 64)),
    "DeFMO": lambda: (features.DeFMO(pretrained=False), torch.rand(1, 6, 64, 64)),
    "LoFTR.backbone": lambda: (features.LoFTR(pretrained=None).backbone, torch.rand(1, 1, 64, 64)),
    "DexiNed": lambda: (DexiNed(pretrained=False), torch.rand(1, 3, 64, 64)),
    "VisionTransformer": lambda: (
        VisionTransformer(image_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=4),
        torch.rand(1, 3, 64, 64),
    ),
    "MobileViT": lambda: (MobileViT(mode="xxs"), torch.rand(1, 3, 256, 256)),
    "TinyViT": lambda: (TinyViT(img_size=64, num_classes=5), torch.rand(1, 3, 64, 64)),
    "RRDBNet": lambda: (RRDBNet(3, 3, num_block=2), torch.rand(1, 3, 32, 32)),
    "SmallSRNet": lambda: (SmallSRNet(2, pretrained=False), torch.rand(1, 1, 32, 32)),
}
