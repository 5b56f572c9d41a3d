"""Blocks that read tokens (N, T, C), as users write them."""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.blocks.base import Block, HandWrittenRMSNorm, token_norm


class Positions(Block, form="tokens", batched=(True, False), kept={("embedding", 0), ("embedding", 1)}):
    """A learned position embedding, and after it a norm."""

    def make(self, fan_in, size, norm, batched):
        self.embedding = nn.Parameter(torch.zeros(*[1] * batched, self.count, fan_in))
        self.norm = token_norm(norm, fan_in)

    def forward(self, x):
        return self.norm(x + self.embedding)


class ClassToken(Block, form="tokens"):
    def make(self, fan_in, size, norm):
        self.token = nn.Parameter(torch.zeros(1, 1, fan_in))
        self.count += 1

    def forward(self, x):
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)


def rotate_pairs(x, cos, sin):
    """Rotate channels 2 i and 2 i + 1 of (..., T, D) by angles (T, D / 2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def rotate_halves(x, cos, sin):
    """Rotate channels i and i + D / 2 of (..., T, D) by angles (T, D / 2)."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def rotate_half_with_long_tables(x, cos, sin):
    """The same, of tables that repeat every angle."""
    one, two = x.chunk(2, dim=-1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


ROTATIONS = {"pairs": rotate_pairs, "halves": rotate_halves, "long tables": rotate_half_with_long_tables}


class SelfAttention(
    Block,
    form="tokens",
    projection=("permuted", "unflattened", "chunked", "separate", "one key head", "fewer key heads"),
    fused=(False, True),
    rotary=("none", *ROTATIONS),
    norms=(False, True),
    closing=("flatten", "rest", "product", "attribute", "shape"),
    bias=(False, True),
    folded=(False, True),
    kept={("bias", 0), ("bias", 1), ("bias", 2), ("cos", 0), ("sin", 0)},
):
    """Multi-head attention in the spellings that are in use.

    `fused` is a flag, as in timm: whether torch's fused kernel runs, which takes its scale from the head itself.
    """

    def make(self, fan_in, size, norm, projection, fused, rotary, norms, closing, bias, folded):
        self.projection, self.fused, self.rotary, self.closing = projection, fused, rotary, closing
        self.folded = folded  # heads join the images for the products
        self.heads = 4 if projection == "fewer key heads" else 2 + size % 2
        self.key_heads = {"one key head": 1, "fewer key heads": 2}.get(projection, self.heads)
        self.head_dim = max(2, size // 2 * 2)
        self.scale = self.head_dim**-0.5
        self.dim = self.fan_out = self.heads * self.head_dim
        self.into = nn.Linear(fan_in, self.dim) if fan_in != self.dim else nn.Identity()
        self.norm = token_norm(norm, self.dim)
        if projection in ("permuted", "unflattened", "chunked"):
            self.qkv = nn.Linear(self.dim, 3 * self.dim)
        else:
            self.q = nn.Linear(self.dim, self.dim)
            self.k, self.v = (nn.Linear(self.dim, self.key_heads * self.head_dim, bias=False) for _ in range(2))
        if rotary != "none":
            angles = torch.outer(torch.arange(self.count), 10.0 ** -torch.linspace(0, 1, self.head_dim // 2))
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        if norms:
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), HandWrittenRMSNorm(self.head_dim)
        self.norms = norms
        self.bias = nn.Parameter(torch.zeros(self.heads, self.count, self.count)) if bias else None
        self.proj = nn.Linear(self.dim, self.dim)

    def projected(self, x):
        n, t, c = x.shape
        if self.projection == "permuted":
            return self.qkv(x).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.projection == "unflattened":
            return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.projection == "chunked":
            return (y.view(n, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        q = self.q(x).view(n, t, self.heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(n, t, self.key_heads, -1).transpose(1, 2) for f in (self.k, self.v))
        if self.projection == "fewer key heads":
            k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        elif self.projection == "one key head":
            k, v = (y.expand(-1, self.heads, -1, -1) for y in (k, v))
        return q, k, v

    def attended(self, x):
        n, t, c = x.shape
        q, k, v = self.projected(x)  # each (N, heads, T, head_dim)
        if self.norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary != "none":
            q, k = (ROTATIONS[self.rotary](y, self.cos, self.sin) for y in (q, k))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.folded:
            q, k, v = (y.reshape(n * self.heads, t, -1) for y in (q, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)).mul(self.scale).view(n, self.heads, t, t)
            weights = (scores if self.bias is None else scores + self.bias).softmax(dim=-1)
            y = torch.bmm(weights.view(n * self.heads, t, t), v).view(n, self.heads, t, -1)
        else:
            scores = q * self.scale @ k.transpose(-2, -1)
            y = (scores if self.bias is None else scores + self.bias).softmax(dim=-1) @ v
        y = y.transpose(1, 2)
        if self.closing == "flatten":
            return y.flatten(2)
        last = {"rest": -1, "product": self.heads * self.head_dim, "attribute": self.dim, "shape": c}[self.closing]
        return y.reshape(n, t, last)

    def forward(self, x):
        x = self.into(x)
        return x + self.proj(self.attended(self.norm(x)))


class HeadByHead(
    Block, form="tokens", spelling=("slices", "layers", "matrices"), kept={("matrices", 0), ("matrices", 1)}
):
    """Attention whose heads are slices of channels, layers of their own, or matrices of one parameter."""

    def make(self, fan_in, size, norm, spelling):
        self.spelling, self.number, self.dim, self.norm = spelling, 2, size, token_norm(norm, fan_in)
        if spelling == "slices":
            self.qkv = nn.ModuleList(nn.Linear(fan_in, 2 * size) for _ in range(3))
        elif spelling == "layers":
            self.qkv = nn.ModuleList(nn.Linear(fan_in, size, bias=False) for _ in range(6))
        else:
            self.matrices = nn.Parameter(torch.zeros(3, 2, fan_in, size))
        self.proj = nn.Linear(2 * size, fan_in)

    def forward(self, x):
        y, heads = self.norm(x), []
        projected = [] if self.spelling == "matrices" else [f(y) for f in self.qkv]
        for i in range(self.number):
            if self.spelling == "slices":
                q, k, v = (p[..., i * self.dim : (i + 1) * self.dim] for p in projected)
            elif self.spelling == "layers":
                q, k, v = projected[3 * i : 3 * i + 3]
            else:
                q, k, v = (y @ self.matrices[j, i] for j in range(3))
            heads.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return x + self.proj(torch.cat(heads, -1))


class CrossAttention(Block, form="tokens", fused=(True, False), gives=("sum", "token"), packed=(True, False)):
    """A learned token reads all others; it is added to them, or stands before them."""

    def make(self, fan_in, size, norm, fused, gives, packed):
        self.fused, self.gives, self.packed = fused, gives, packed
        self.heads, self.head_dim = 2, size
        self.scale = size**-0.5
        inner = 2 * size
        self.norm = token_norm(norm, fan_in)
        self.token = nn.Parameter(torch.zeros(1, 1, fan_in))
        self.q, self.proj = nn.Linear(fan_in, inner), nn.Linear(inner, fan_in)
        if packed:
            self.kv = nn.Linear(fan_in, 2 * inner)
        else:
            self.k, self.v = nn.Linear(fan_in, inner), nn.Linear(fan_in, inner)
        self.count += gives == "token"

    def forward(self, x):
        n, t, _ = x.shape
        y = self.norm(x)
        q = self.q(self.token.expand(n, -1, -1)).reshape(n, 1, self.heads, self.head_dim).transpose(1, 2)
        if self.packed:
            k, v = self.kv(y).reshape(n, t, 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            k, v = (f(y).reshape(n, t, self.heads, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        if self.fused:
            read = F.scaled_dot_product_attention(q, k, v)
        else:
            read = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        read = self.proj(read.transpose(1, 2).reshape(n, 1, -1))
        return x + read if self.gives == "sum" else torch.cat([read, x], dim=1)


class TorchAttention(Block, form="tokens", batch_first=(True, False), need_weights=(True, False), bias=(True, False)):
    def make(self, fan_in, size, norm, batch_first, need_weights, bias):
        self.heads = 2 + size % 2
        self.batch_first, self.need_weights, self.fan_out = batch_first, need_weights, self.heads * max(2, size // 2)
        self.into, self.norm = nn.Linear(fan_in, self.fan_out), token_norm(norm, self.fan_out)
        self.attention = nn.MultiheadAttention(self.fan_out, self.heads, batch_first=batch_first, bias=bias)

    def forward(self, x):
        x = self.into(x)
        y = self.norm(x)
        y = y if self.batch_first else y.transpose(0, 1)
        y, _ = self.attention(y, y, y, need_weights=self.need_weights)
        return x + (y if self.batch_first else y.transpose(0, 1))


class TorchEncoder(
    Block, form="tokens", batch_first=(True, False), norm_first=(True, False), activation=("relu", "gelu")
):
    def make(self, fan_in, size, norm, batch_first, norm_first, activation):
        self.heads, self.batch_first = 2, batch_first
        self.fan_out = 2 * size
        self.into = nn.Linear(fan_in, self.fan_out)
        self.encoder = nn.TransformerEncoderLayer(
            self.fan_out, 2, size + 3, 0.0, activation, batch_first=batch_first, norm_first=norm_first
        )

    def forward(self, x):
        x = self.into(x)
        return self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)


class TorchDecoder(Block, form="tokens", norm_first=(True, False)):
    """Learned tokens read all others, and what they found is added to these."""

    def make(self, fan_in, size, norm, norm_first):
        self.heads, self.fan_out = 2, 2 * size
        self.into, self.token = nn.Linear(fan_in, 2 * size), nn.Parameter(torch.zeros(1, 1, 2 * size))
        self.decoder = nn.TransformerDecoderLayer(2 * size, 2, size, 0.0, batch_first=True, norm_first=norm_first)

    def forward(self, x):
        x = self.into(x)
        return x + self.decoder(self.token.expand(len(x), -1, -1), x)


class Mlp(Block, form="tokens", gate=("none", "chunk", "glu", "separate", "split"), scaled=(False, True)):
    """Two or three linear layers with a gate of some kind, and perhaps a learned scale."""

    def make(self, fan_in, size, norm, gate, scaled):
        self.gate, self.hidden, self.norm = gate, size, token_norm(norm, fan_in)
        self.one = nn.Linear(fan_in, size if gate in ("none", "separate") else 2 * size)
        self.two = nn.Linear(fan_in, size) if gate == "separate" else None
        self.out = nn.Linear(size, fan_in)
        self.gamma = nn.Parameter(torch.ones(fan_in)) if scaled else None

    def inner(self, x):
        if self.gate == "glu":
            return F.glu(self.one(x), dim=-1)
        if self.gate == "none":
            return F.gelu(self.one(x))
        if self.gate == "separate":
            return F.silu(self.one(x)) * self.two(x)
        a, b = self.one(x).chunk(2, dim=-1) if self.gate == "chunk" else self.one(x).split(self.hidden, dim=-1)
        return F.silu(a) * b

    def forward(self, x):
        y = self.out(self.inner(self.norm(x)))
        return x + (y if self.gamma is None else y * self.gamma)


class TokenMixer(Block, form="tokens", kept={("one.weight", 1), ("two.weight", 0), ("two.bias", 0)}):
    """Linear layers along the tokens."""

    def make(self, fan_in, size, norm):
        self.norm = token_norm(norm, fan_in)
        self.one, self.two = nn.Linear(self.count, size), nn.Linear(size, self.count)

    def forward(self, x):
        return x + self.two(F.gelu(self.one(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class Recurrent(
    Block,
    form="tokens",
    kind=(nn.LSTM, nn.GRU, nn.RNN),
    bidirectional=(True, False),
    layers=(1, 2),
    batch_first=(True, False),
):
    def make(self, fan_in, size, norm, kind, bidirectional, layers, batch_first):
        self.batch_first, self.fan_out = batch_first, size * (2 if bidirectional else 1)
        self.norm = token_norm(norm, fan_in)
        self.layer = kind(fan_in, size, layers, batch_first=batch_first, bidirectional=bidirectional)

    def forward(self, x):
        x = self.norm(x)
        return self.layer(x)[0] if self.batch_first else self.layer(x.transpose(0, 1))[0].transpose(0, 1)
