"""vit-pytorch: one model of each of its files that holds a network."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import nn

_IMAGE = torch.rand(1, 3, 64, 64)
_SIZES = {"num_classes": 5, "dim": 128, "depth": 4, "heads": 4, "mlp_dim": 512}
_PLAIN = {"image_size": 64, "patch_size": 16, **_SIZES, "dim_head": 32}
_VIDEO = {"image_size": 32, "image_patch_size": 16, "frames": 8, "frame_patch_size": 4, **_SIZES, "dim_head": 32}
_CLIP = torch.rand(1, 3, 8, 32, 32)


def _without_depth(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "depth"}


# Models that take the usual arguments: the file and the class.
_PLAIN_MODELS = (
    *("simple_vit.SimpleViT", "vit.ViT", "deepvit.DeepViT", "rvt.RvT", "parallel_vit.ViT"),
    *("vit_for_small_dataset.ViT", "simple_vit_with_qk_norm.SimpleViT", "simple_vit_with_register_tokens.SimpleViT"),
    *("simple_vit_with_value_residual.SimpleViT", "simple_flash_attn_vit.SimpleViT", "vit_with_decorr.ViT"),
    *("vit_with_keel_post_ln.ViT", "vit_5.ViT", "simple_uvit.SimpleUViT", "vit_with_patch_merger.ViT"),
    *("learnable_memory_vit.ViT", "vit_with_patch_dropout.ViT", "simple_vit_with_patch_dropout.SimpleViT"),
)
# All others, with their arguments.
_MODELS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "cait.CaiT": ({**_PLAIN, "cls_depth": 1}, _IMAGE),
    "xcit.XCiT": ({**_PLAIN, "cls_depth": 1}, _IMAGE),
    "normalized_vit.nViT": (_PLAIN, _IMAGE),
    "simple_vit_with_fft.SimpleViT": ({**_PLAIN, "freq_patch_size": 16}, _IMAGE),
    "simple_vit_with_hyper_connections.SimpleViT": ({**_PLAIN, "num_residual_streams": 2}, _IMAGE),
    "ats_vit.ViT": ({**_PLAIN, "max_tokens_per_depth": (14, 12, 10, 8)}, _IMAGE),
    "cct.CCT": ({"img_size": 64, "embedding_dim": 64, "num_layers": 2, "num_heads": 4, "num_classes": 5}, _IMAGE),
    "pit.PiT": ({**_PLAIN, "depth": (1, 1)}, _IMAGE),
    "t2t.T2TViT": ({"image_size": 64, **_SIZES, "dim_head": 32, "t2t_layers": ((7, 4), (3, 2))}, _IMAGE),
    "cvt.CvT": ({"num_classes": 5, "s3_depth": 2}, _IMAGE),
    "cross_vit.CrossViT": (
        {"image_size": 96, "num_classes": 5, "sm_dim": 48, "lg_dim": 64, "lg_enc_depth": 1, "depth": 2},
        torch.rand(1, 3, 96, 96),
    ),
    "crossformer.CrossFormer": ({"num_classes": 5, "depth": (1, 1, 1, 1)}, torch.rand(1, 3, 224, 224)),
    "twins_svt.TwinsSVT": ({"num_classes": 5, "s3_depth": 1, "s4_depth": 1}, torch.rand(1, 3, 224, 224)),
    "regionvit.RegionViT": ({"num_classes": 5, "depth": (1, 1, 1, 1)}, torch.rand(1, 3, 224, 224)),
    "sep_vit.SepViT": (
        {"num_classes": 5, "dim": 32, "depth": (1, 1, 1, 1), "heads": (1, 2, 4, 8)},
        torch.rand(1, 3, 224, 224),
    ),
    "max_vit.MaxViT": (
        {"num_classes": 5, "dim": 32, "depth": (1, 1, 1, 1), "dim_conv_stem": 32},
        torch.rand(1, 3, 224, 224),
    ),
    "nest.NesT": (
        {"image_size": 64, "patch_size": 4, "num_classes": 5, "dim": 48, "heads": 3, "num_hierarchies": 3,
         "block_repeats": (1, 1, 1)},
        _IMAGE,
    ),
    "mobile_vit.MobileViT": (
        {"image_size": (128, 128), "dims": [64, 80, 96], "num_classes": 5,
         "channels": [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 320]},
        torch.rand(1, 3, 128, 128),
    ),
    "levit.LeViT": (
        {"image_size": 64, "num_classes": 5, "stages": 2, "dim": (64, 96), "depth": 1, "heads": (2, 3), "mlp_mult": 2},
        _IMAGE,
    ),
    "scalable_vit.ScalableViT": (
        {"num_classes": 5, "dim": 32, "heads": (2, 4, 8), "depth": (1, 1, 1), "reduction_factor": (4, 2, 1),
         "window_size": (16, 8, None)},
        torch.rand(1, 3, 128, 128),
    ),
    "look_vit.LookViT": (
        {"image_size": 96, "num_classes": 5, "dim": 128, "depth": 1, "patch_size": 32, "heads": 4, "dim_head": 32},
        torch.rand(1, 3, 96, 96),
    ),
    "simple_vit_3d.SimpleViT": (_VIDEO, _CLIP),
    "vit_3d.ViT": (_VIDEO, _CLIP),
    "vivit.ViViT": ({**_without_depth(_VIDEO), "spatial_depth": 1, "temporal_depth": 1}, _CLIP),
    "vit_1d.ViT": ({"seq_len": 64, "patch_size": 8, **_SIZES, "dim_head": 32}, torch.rand(1, 3, 64)),
    "vit_nd_rotary.ViTND": ({"ndim": 2, "input_shape": 64, "patch_size": 16, **_SIZES, "dim_head": 32}, _IMAGE),
}  # fmt: skip


def _build(name: str, arguments: dict[str, Any], image: torch.Tensor) -> tuple[nn.Module, Any]:
    file, _, kind = name.partition(".")
    return getattr(importlib.import_module(f"vit_pytorch.{file}"), kind)(**arguments), image


_ALL = {**dict.fromkeys(_PLAIN_MODELS, (_PLAIN, _IMAGE)), **_MODELS}
MODELS = {name: partial(_build, name, *given) for name, given in _ALL.items()}
