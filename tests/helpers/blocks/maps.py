"""Blocks that read a map (N, C, H, W), as users write them."""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.blocks.base import Block, layer, token_norm


class Straight(Block):
    def make(self, fan_in, size, norm):
        self.layer, self.fan_out = layer(fan_in, size, norm), size

    def forward(self, x):
        return self.layer(x)


class Residual(Block):
    def make(self, fan_in, size, norm):
        self.inner, self.outer = layer(fan_in, size, norm, 1), layer(size, fan_in, norm)

    def forward(self, x):
        return x + self.outer(self.inner(x))


class Projected(Block):
    def make(self, fan_in, size, norm):
        self.main, self.shortcut = layer(fan_in, size, norm), nn.Conv2d(fan_in, size, 1, bias=False)
        self.fan_out = size

    def forward(self, x):
        return F.relu(self.main(x) + self.shortcut(x))


class Inverted(Block):
    """Wide, depthwise, narrow, with a squeeze-and-excite gate in the middle."""

    def make(self, fan_in, size, norm):
        wide = 2 * size
        self.widen, self.depth = layer(fan_in, wide, norm, 1), layer(wide, wide, norm, groups=wide)
        self.down, self.up = nn.Conv2d(wide, max(2, size // 2), 1), nn.Conv2d(max(2, size // 2), wide, 1)
        self.narrow = nn.Conv2d(wide, fan_in, 1)

    def forward(self, x):
        y = self.depth(self.widen(x))
        y = y * self.up(self.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.narrow(y)


class Dense(Block):
    def make(self, fan_in, size, norm):
        self.new, self.fan_out = layer(fan_in, size, norm), fan_in + size

    def forward(self, x):
        return torch.cat([x, self.new(x)], 1)


class Branches(Block):
    def make(self, fan_in, size, norm):
        self.one, self.two = layer(fan_in, size, norm, 1), layer(fan_in, size + 1, norm)
        self.fan_out = 2 * size + 1 + fan_in

    def forward(self, x):
        return torch.cat([self.one(x), F.max_pool2d(x, 3, 1, 1), self.two(x)], 1)


class Grouped(Block):
    """A grouped convolution, of few wide groups or of many narrow ones."""

    def make(self, fan_in, size, norm):
        groups, each = (2, size) if size % 2 else (size, 2)
        self.fan_out = groups * each
        self.into = layer(fan_in, self.fan_out, norm, 1)
        self.grouped = layer(self.fan_out, self.fan_out, norm, groups=groups)

    def forward(self, x):
        return self.grouped(self.into(x))


class Gate(Block):
    def make(self, fan_in, size, norm):
        self.wide, self.fan_out = nn.Conv2d(fan_in, 2 * size, 1), size

    def forward(self, x):
        value, gate = self.wide(x).chunk(2, 1)
        return value * gate.sigmoid()


class Separable(Block):
    def make(self, fan_in, size, norm):
        self.depth, self.point = layer(fan_in, fan_in, norm, groups=fan_in), layer(fan_in, size, norm, 1)
        self.fan_out = size

    def forward(self, x):
        return self.point(self.depth(x))


class SqueezeExcite(Block):
    """The gate of linear layers, which go through views of (N, C)."""

    def make(self, fan_in, size, norm):
        self.gate = nn.Sequential(nn.Linear(fan_in, size), nn.ReLU(), nn.Linear(size, fan_in), nn.Sigmoid())

    def forward(self, x):
        n, c, _, _ = x.shape
        return x * self.gate(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1)


class Eca(Block):
    """A convolution along the channels."""

    def make(self, fan_in, size, norm):
        self.into, self.fan_out = layer(fan_in, size, norm, 1), size
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.into(x)
        y = self.conv(x.mean((2, 3)).unsqueeze(1))  # (N, 1, C)
        return x * y.sigmoid().transpose(1, 2).unsqueeze(-1)


class Unshuffled(Block):
    """Blocks of 2 x 2 pixels become channels."""

    def make(self, fan_in, size, norm):
        self.fan_out = size
        self.layer = layer(4 * fan_in, size, norm, 1)
        self.side //= 2

    def forward(self, x):
        return self.layer(F.pixel_unshuffle(x, 2))


class Shuffled(Block, spelling=("shape", "attribute", "module")):
    """A grouped convolution whose channels are shuffled before it."""

    def make(self, fan_in, size, norm, spelling):
        self.fan_out, self.groups, self.spelling = 2 * size, 2, spelling
        self.into, self.grouped = layer(fan_in, 2 * size, norm, 1), layer(2 * size, 2 * size, norm, groups=2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x):
        x = self.into(x)
        n, c, h, w = x.shape
        if self.spelling == "shape":
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        elif self.spelling == "module":
            x = self.shuffle(x)
        else:
            x = x.reshape(n, self.groups, -1, h, w).transpose(1, 2).flatten(1, 2)
        return self.grouped(x)


class Partial(Block, spelling=("both attributes", "difference", "slices")):
    """Some channels are convolved, the rest passes by."""

    def make(self, fan_in, size, norm, spelling):
        self.into, self.fan_out, self.spelling = layer(fan_in, size + 2, norm, 1), size + 2, spelling
        self.dim, self.part = size + 2, size // 2 + 1
        self.rest = self.dim - self.part
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1)

    def forward(self, x):
        x = self.into(x)
        if self.spelling == "both attributes":
            a, b = torch.split(x, [self.part, self.rest], dim=1)
        elif self.spelling == "difference":
            a, b = x.split([self.part, self.dim - self.part], dim=1)
        else:
            a, b = x[:, : self.part], x[:, self.part :]
        return torch.cat([self.conv(a), b], 1)


class Thirds(Block):
    """Three chunks, of which each adds the one before."""

    def make(self, fan_in, size, norm):
        self.into, self.fan_out = layer(fan_in, 3 * size, norm, 1), 3 * size
        self.convs = nn.ModuleList(nn.Conv2d(size, size, 3, padding=1, groups=size) for _ in range(2))

    def forward(self, x):
        a, b, c = torch.chunk(self.into(x), 3, dim=1)
        b = self.convs[0](a + b)
        return torch.cat([a, b, self.convs[1](b + c)], dim=1)


class Next(Block):
    """A ConvNeXt block: depthwise, then linear layers on channels that come last, and a learned scale."""

    def make(self, fan_in, size, norm):
        self.depth, self.norm = nn.Conv2d(fan_in, fan_in, 3, padding=1, groups=fan_in), token_norm("batch", fan_in)
        self.mlp = nn.Sequential(nn.Linear(fan_in, 2 * size), nn.GELU(), nn.Linear(2 * size, fan_in))
        self.gamma = nn.Parameter(torch.ones(fan_in))

    def forward(self, x):
        y = self.mlp(self.norm(self.depth(x).permute(0, 2, 3, 1))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Cbam(Block, spelling=("amax", "max"), kept={("pixels.weight", 1)}):
    """Gates of channels and of pixels, after means and maxima over the other."""

    def make(self, fan_in, size, norm, spelling):
        self.gate = nn.Sequential(nn.Conv2d(fan_in, size, 1, bias=False), nn.ReLU(), nn.Conv2d(size, fan_in, 1))
        self.pixels, self.spelling = nn.Conv2d(2, 1, 3, padding=1, bias=False), spelling

    def forward(self, x):
        x = x * (self.gate(F.adaptive_avg_pool2d(x, 1)) + self.gate(F.adaptive_max_pool2d(x, 1))).sigmoid()
        peak = x.amax(1, keepdim=True) if self.spelling == "amax" else torch.max(x, 1)[0].unsqueeze(1)
        return x * self.pixels(torch.cat([x.mean(1, keepdim=True), peak], 1)).sigmoid()


class Upsampled(Block, groups=("one", "two", "depthwise")):
    """Half the pixels and back, by a transposed convolution of one, two or many groups."""

    def make(self, fan_in, size, norm, groups):
        self.fan_out = 2 * size
        count = {"one": 1, "two": 2, "depthwise": 2 * size}[groups]
        self.down = nn.Conv2d(fan_in, 2 * size, 2, 2)
        self.up = nn.ConvTranspose2d(2 * size, 2 * size, 2, 2, groups=count)

    def forward(self, x):
        return self.up(self.down(x).relu())


class WeightNormed(Block):
    """A convolution whose weight is computed from two parameters in every forward."""

    def make(self, fan_in, size, norm):
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(fan_in, size, 3, padding=1))
        self.fan_out = size

    def forward(self, x):
        return self.conv(x).relu()


class Windows(Block, kept={("table", 0), ("table", 1)}):
    """Attention in windows of 2 x 2 pixels, with a table of relative positions."""

    def make(self, fan_in, size, norm):
        self.window, self.heads, self.head_dim = 2, 2, size
        self.scale = size**-0.5
        self.norm = token_norm(norm, fan_in)
        self.qkv, self.proj = nn.Linear(fan_in, 6 * size), nn.Linear(2 * size, fan_in)
        self.table = nn.Parameter(torch.zeros(9, 2))
        y, x = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        across, down = ((p.flatten()[:, None] - p.flatten() + 1) for p in (x, y))
        self.register_buffer("index", 3 * down + across)

    def forward(self, x):
        n, c, h, w = x.shape
        y = x.view(n, c, h // self.window, self.window, w // self.window, self.window).permute(0, 2, 4, 3, 5, 1)
        y = self.norm(y.reshape(-1, self.window * self.window, c))  # (windows, pixels, C)
        count, t, _ = y.shape
        q, k, v = self.qkv(y).reshape(count, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        y = (q @ k.transpose(-2, -1) * self.scale + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(count, t, -1))
        y = y.view(n, h // self.window, w // self.window, self.window, self.window, c)
        return x + y.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


class MapAttention(Block, spelling=("chunk", "split", "convolutions"), along=("pixels", "channels")):
    """Attention between pixels, of 1 x 1 convolutions: heads are a dimension in front of their channels."""

    def make(self, fan_in, size, norm, spelling, along):
        self.heads, self.head_dim, self.spelling, self.along = 2, size, spelling, along
        self.inner = 2 * size
        self.scale = size**-0.5
        if spelling == "convolutions":
            self.q, self.k, self.v = (nn.Conv2d(fan_in, self.inner, 1) for _ in range(3))
        else:
            self.qkv = nn.Conv2d(fan_in, 3 * self.inner, 1, bias=False)
        self.proj = nn.Conv2d(self.inner, fan_in, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        if self.spelling == "convolutions":
            q, k, v = (f(x).reshape(n, self.heads, self.head_dim, h * w) for f in (self.q, self.k, self.v))
        elif self.spelling == "chunk":
            q, k, v = (t.reshape(n, self.heads, -1, h * w) for t in self.qkv(x).chunk(3, dim=1))
        else:
            q, k, v = self.qkv(x).view(n, self.heads, self.head_dim * 3, -1).split([self.head_dim] * 3, dim=2)
        if self.along == "pixels":
            weights = (q.transpose(-2, -1) @ k * self.scale).softmax(-1)
            y = v @ weights.transpose(-2, -1)
        else:  # as in XCiT: which channel reads which
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(y.reshape(n, -1, h, w))
