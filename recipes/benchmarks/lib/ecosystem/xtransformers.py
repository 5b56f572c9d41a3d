"""x-transformers: the wrapper for images and that for tokens, with many of its options."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from x_transformers import ContinuousTransformerWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper


def _images(**options: Any) -> tuple[nn.Module, Any]:
    layers = Encoder(dim=128, depth=4, heads=4, attn_dim_head=32, **options)
    return ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers), torch.rand(
        1, 3, 32, 32
    )


def _tokens(kind: Any = Decoder, **options: Any) -> tuple[nn.Module, Any]:
    layers = kind(dim=128, depth=4, heads=4, attn_dim_head=32, **options)
    model = TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers)
    return model, torch.randint(50, (1, 16))


def _values(**options: Any) -> tuple[nn.Module, Any]:
    layers = Encoder(dim=128, depth=4, heads=4, attn_dim_head=32, **options)
    model = ContinuousTransformerWrapper(dim_in=8, dim_out=4, max_seq_len=16, attn_layers=layers)
    return model, torch.rand(1, 16, 8)


MODELS = {
    "ViT": lambda: _images(),
    "ViT, RMSNorm": lambda: _images(use_rmsnorm=True),
    "ViT, GLU": lambda: _images(ff_glu=True, ff_swish=True),
    "ViT, rotary": lambda: _images(rotary_pos_emb=True),
    "ViT, qk norm": lambda: _images(attn_qk_norm=True),
    "ViT, flash": lambda: _images(attn_flash=True),
    "decoder": lambda: _tokens(),
    "decoder, rotary, GLU": lambda: _tokens(rotary_pos_emb=True, ff_glu=True),
    "decoder, ALiBi": lambda: _tokens(alibi_pos_bias=True),
    "decoder, one kv head": lambda: _tokens(attn_one_kv_head=True),
    "encoder": lambda: _tokens(Encoder),
    "values": lambda: _values(),
}
