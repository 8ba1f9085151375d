"""SimpleViT: a vision transformer from scratch (Dosovitskiy et al., https://arxiv.org/abs/2010.11929)."""

import torch
from torch import nn
from torch.nn import functional as F

from modeling.errors import UserError
from modeling.models.cpu_layers import Dropout


class Attention(nn.Module):
    """Multi-head self-attention over tokens: (B, N, D) -> (B, N, D)."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = Dropout(dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        if (
            x.device.type == "cpu" and N <= 1025
        ):  # where the fused kernel is slow, its backward most, and weights are few
            with torch.autocast("cpu", enabled=False):
                weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
                x = self.dropout(weights) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Attention and MLP, each with a residual; LayerNorm after the sum (post-norm) or before the branch (pre-norm)."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: str,
        pre_norm: bool,
        attention_dropout: float,
        dropout: float,
    ):
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim=dim, num_heads=num_heads, dropout=attention_dropout)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            {"gelu": nn.GELU, "relu": nn.ReLU}[activation](),
            Dropout(dropout),
            nn.Linear(mlp_dim, dim),
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class SimpleViT(nn.Module):
    """Patches by convolution, a class token, learned positions, `depth` blocks, LayerNorm, Linear on the class token.

    Takes (B, 3, image_size, image_size) float, gives logits (B, num_classes). With 10 classes: 1,205,898 parameters with the
    defaults (32 px), 2,497,418 with image_size 224, patch_size 16, depth 4, mlp_dim 2048. Class token and positions are drawn
    from N(0, 1), the blocks' weights with a deviation of 0.02. UserError: a size that the patch does not divide, a dim that the
    heads do not divide.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        mlp_dim: int = 512,
        activation: str = "gelu",
        pre_norm: bool = False,
        attention_dropout: float = 0.1,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
    ):
        super().__init__()
        if image_size % patch_size:
            raise UserError(
                f"image size {image_size} is not a multiple of patch size {patch_size}: change one of them"
            )
        if dim % num_heads:
            raise UserError(f"dim {dim} is not a multiple of num_heads {num_heads}: change one of them")
        num_tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, num_tokens, dim))
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim=dim,
                    num_heads=num_heads,
                    mlp_dim=mlp_dim,
                    activation=activation,
                    pre_norm=pre_norm,
                    attention_dropout=attention_dropout,
                    dropout=dropout,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(dim, num_classes)
        # As ViT and DeiT: small branches. With PyTorch's defaults the post-norm blocks at 224 px stay at ln(classes) for long.
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions  # (B, N, D)
        x = self.norm(self.blocks(x))
        return self.head(self.head_dropout(x[:, 0]))  # (B, num_classes)
