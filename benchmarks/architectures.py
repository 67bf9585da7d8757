"""The models of the benchmark cases, in plain PyTorch, none of which knows of l2rw_ext."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Sequential):
    """Fully connected layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for d_in, d_out in itertools.pairwise(widths):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        super().__init__(*layers[:-1])


class LeNet(nn.Module):
    """Convolutions 6@5x5 (padding 2) and 16@5x5 with 2x2 max pooling, then 400-120-84-classes."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        out: Tensor = self.fc3(x)
        return out


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels) if kind == "group" else nn.BatchNorm2d(channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters: it subsamples and pads with zeros."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(norm, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, c_out)
        self.stride = stride
        self.extra_channels = c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.stride > 1 or self.extra_channels:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))
        return F.relu(x + y)


class ResNet32(nn.Module):
    """The CIFAR ResNet with 5-5-5 blocks of 16/32/64 channels, GroupNorm(4) or BatchNorm."""

    def __init__(self, norm: str, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = _norm(norm, 16)
        blocks = []
        c_in = 16
        for width in (16, 32, 64):
            for index in range(5):
                stride = 2 if width > 16 and index == 0 else 1
                blocks.append(ResidualBlock(c_in, width, stride, norm))
                c_in = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.blocks(x)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions with dropout between them."""

    def __init__(self, c_in: int, c_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = None
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(h)
        y = F.relu(self.norm2(self.conv1(h)), inplace=True)
        out: Tensor = self.conv2(self.dropout(y)) + shortcut
        return out


class WideResNet(nn.Module):
    """WRN-depth-width with BatchNorm; WRN-28-10 with dropout is the CIFAR-100 model."""

    def __init__(
        self, depth: int = 28, width: int = 10, dropout: float = 0.3, classes: int = 100
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = []
        c_in = 16
        for stage, c_out in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range((depth - 4) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(WideBlock(c_in, c_out, stride, dropout))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(c_in)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.conv(x))), inplace=True)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm attention and a GELU MLP of four times the width, without dropout."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.heads = heads
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(y.transpose(1, 2).reshape(n, tokens, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Vision transformer of width 192 and 6 layers on 64 patches of 4x4 and a class token."""

    def __init__(
        self,
        classes: int = 10,
        width: int = 192,
        layers: int = 6,
        heads: int = 3,
        *,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, causal=False) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.size(0), -1, -1), x], dim=1) + self.position
        if self.checkpointed:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        else:
            x = self.blocks(x)
        out: Tensor = self.head(self.norm(x)[:, 0])
        return out


class GPT(nn.Module):
    """Causal transformer of width 256, 4 layers, 128 tokens, vocabulary 1,000, head tied."""

    def __init__(
        self,
        vocabulary: int = 1000,
        tokens: int = 128,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.token.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, causal=True) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, index: Tensor) -> Tensor:
        x = self.blocks(self.token(index) + self.position)
        return F.linear(self.norm(x), self.token.weight)


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of rank r (LoRA), scaled by 2.

    ``up`` usually starts at zero, where the gradient of ``down`` vanishes; here neither does, as
    after the first steps of a training.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 2 * self.up(self.down(x))
        return out


def low_rank(model: GPT, rank: int = 8) -> GPT:
    """The model with its weights frozen and :class:`LowRank` layers in attention and MLP."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LowRank(layer, rank))
    return model


class Autocast(nn.Module):
    """A model under bfloat16 autocast, with outputs in float32; float64 remains as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.model(x)
        return out.float() if out.dtype is torch.bfloat16 else out


class LSTM(nn.Module):
    """One LSTM layer of width 128 on 64 features, and a classifier of its last state."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(64, 128, batch_first=True)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.recurrent(x)
        out: Tensor = self.head(hidden[:, -1])
        return out
