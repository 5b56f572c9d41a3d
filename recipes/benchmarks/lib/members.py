"""One small member of every model class of timm, and of torchvision's transformers: two blocks, small images."""

from __future__ import annotations

from typing import Any

FOUR = {"depths": [1, 1, 1, 1]}
LAYERS = {"layers": [1, 1, 1, 1]}
TWO = {"depth": 2}
THIN = {"depth": 2, "embed_dim": 96, "num_heads": 4}
VIT = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}
SWIN = {"patch_size": [4, 4], "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": [4, 4]}
MAXVIT = {"input_size": [64, 64], "stem_channels": 32, "partition_size": 2, "block_channels": [32, 64],
          "block_layers": [1, 1], "head_dim": 16, "stochastic_depth_prob": 0.0}  # fmt: skip
MNV5 = {"channel_multiplier": 0.1}
# The image's side, the arguments, the names. Where a member takes `img_size`, it gets that side.
MEMBERS: dict[str, tuple[int, dict[str, Any]]] = {
    name: (pixels, arguments)
    for pixels, arguments, names in (
        (64, {}, "coat_tiny convmixer_768_32 cpubone_nano cs3darknet_focus_s densenet121 dla46_c dpn68b"),
        (64, {}, "efficientvim_m1_dist efficientvit_m0 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224"),
        (64, {}, "hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t legacy_xception lowformer_b0 mvitv2_tiny"),
        (64, {}, "mobilenetv3_small_050 nest_tiny nextvit_small pit_ti_224 poolformerv2_s12 rdnet_tiny regnetx_002"),
        (64, {}, "repghostnet_050 repvit_m1 rexnet_100 sam2_hiera_tiny selecsls42 shvit_s1 test_byobnet test_coatnet"),
        (64, {}, "test_efficientnet test_nfnet volo_d1_224 ese_vovnet19b_slim_dw xception41p"),
        (96, {}, "inception_resnet_v2 inception_v3 inception_v4"),
        (64, {}, "pnasnet5large"),
        (64, {"stem_size": 24, "num_features": 1056}, "nasnetalarge"),
        (64, {"mlp_ratio": 0.05}, "vgg11"),
        (224, {}, "levit_128s deit_tiny_distilled_patch16_224"),
        (240, {}, "crossvit_tiny_240"),
        (224, FOUR, "efficientformer_l1"),
        (64, {"depths": [1, 1, 1]}, "efficientvim_m1"),
        (64, {"depths": [2, 2, 2, 2]}, "csatv2"),
        (64, FOUR, "cspnext_tiny davit_tiny edgenext_xx_small efficientformerv2_s0 efficientvit_b0 fasternet_t0"),
        (64, FOUR, "inception_next_atto lcnetv2_small pvt_v2_b0 starnet_s050 swin_tiny_patch4_window7_224"),
        (64, FOUR, "swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256 test_convnext test_mambaout tiny_vit_5m_224"),
        (64, FOUR, "twins_svt_small"),
        (64, LAYERS, "fastvit_t8 legacy_seresnet18 resnetv2_18 sequencer2d_s swiftformer_xs test_resnet tresnet_m"),
        (64, TWO, "cait_xxs24_224 convit_tiny eva02_tiny_patch14_224 samvit_base_patch16_224 test_vit test_vit_relpos"),
        (64, TWO, "tnt_s_legacy_patch16_224 vit_tiny_patch16_dinov3_qkvb visformer_tiny xcit_nano_12_p16_224"),
        (64, TWO, "naflexvit_base_patch16_gap"),
        (64, THIN, "beit_base_patch16_224 gemma4_vit_167m qwen3_vit_88m"),
        (96, THIN, "gemma4_vit_167m_enc"),
        (64, THIN, "qwen3_vit_88m_enc"),
        (224, {"embed_dim": [32, 48, 64], "num_heads": [2, 3, 4], "depth": [1, 1, 1], "key_dim": 16}, "levit_256d"),
        (64, {"widths": [16, 24, 32, 48, 64], "depths": [1, 1, 1, 1, 1], "head_widths": [64, 64]}, "efficientvit_l1"),
        (128, MNV5, "mobilenetv5_base mobilenetv5_300m_enc"),
        (32, VIT, "torchvision/VisionTransformer"),
        (64, SWIN, "torchvision/SwinTransformer"),
        (64, MAXVIT, "torchvision/MaxVit"),
        (64, {}, "torchvision/swin_v2_t"),
        (112, THIN, "deepseek_vit_412m deepseek_vit_412m_enc"),
    )
    for name in names.split()
}
