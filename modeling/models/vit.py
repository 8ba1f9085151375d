"""SimpleViT: a vision transformer from scratch (Dosovitskiy et al., https://arxiv.org/abs/2010.11929)."""

import torch
from torch import nn

from modeling.errors import UserError
from modeling.models.cpu_layers import Dropout, attention

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), with d = D / num_heads numbers per head."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = Dropout(dropout)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x)  # (B, N, 3 * D)
        qkv = qkv.view(B, N, 3, self.num_heads, D // self.num_heads)  # (B, N, 3, num_heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, num_heads, N, d)
        x = attention(q, k, v, self.dropout)  # (B, num_heads, N, d)
        x = x.transpose(1, 2).reshape(B, N, D)  # the heads side by side: (B, N, D)
        return self.proj(x)


class Block(nn.Module):
    """One transformer layer: attention, then an MLP, each added to its input. (B, N, D) -> (B, N, D).

    Post-norm normalises each sum, as in "Attention is all you need". Pre-norm normalises the inputs of
    attention and MLP, as in ViT.
    """

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
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attention = Attention(dim=dim, num_heads=num_heads, dropout=attention_dropout)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            ACTIVATIONS[activation](),
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
    """Cut the image into patches, run `depth` blocks over them, and classify from the class token.

    Takes (B, 3, image_size, image_size) float, gives logits (B, num_classes). With the defaults (32 px, 10
    classes) it has 1,205,898 parameters. With image_size 224, patch_size 16, depth 4 and mlp_dim 2048 it has
    2,497,418.
    mean_pooling: classify from the mean over the patches. There is no class token then.
    embedding_std: the class token and the positions start as draws from N(0, embedding_std**2).
    UserError: patch_size does not divide image_size, or num_heads does not divide dim.
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
        mean_pooling: bool = False,
        embedding_std: float = 1.0,
    ):
        super().__init__()
        if image_size % patch_size:
            raise UserError(
                f"image size {image_size} is not a multiple of patch size {patch_size}: change one of them"
            )
        if dim % num_heads:
            raise UserError(f"dim {dim} is not a multiple of num_heads {num_heads}: change one of them")
        num_patches = (image_size // patch_size) ** 2
        num_tokens = num_patches if mean_pooling else num_patches + 1
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        # The class token and the positions are learned.
        self.class_token = None if mean_pooling else nn.Parameter(embedding_std * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(embedding_std * torch.randn(1, num_tokens, dim))
        blocks = [
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
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(dim, num_classes)
        # Start with small weights, as ViT and DeiT do. With PyTorch's larger defaults the loss of a post-norm
        # model at 224 px stays at ln(num_classes), a random guess, for many steps.
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B = len(x)
        x = self.patch_embed(x)  # (B, D, H / patch_size, W / patch_size)
        x = x.flatten(2).transpose(1, 2)  # one row per patch: (B, num_patches, D)
        if self.class_token is not None:
            class_token = self.class_token.expand(B, -1, -1)  # (B, 1, D)
            x = torch.cat([class_token, x], dim=1)
        x = x + self.positions  # (B, N, D)
        x = self.blocks(x)
        x = self.norm(x)
        x = x.mean(dim=1) if self.class_token is None else x[:, 0]  # (B, D)
        return self.head(self.head_dropout(x))  # (B, num_classes)
