"""SimpleCNN: a plain stack of convolution blocks."""

import torch
from torch import nn

from modeling.errors import UserError


class SimpleCNN(nn.Module):
    """Blocks of [Conv 3x3, (BatchNorm), MaxPool 2, ReLU], then Linear, ReLU, Dropout, Linear.

    Takes (B, 3, image_size, image_size) float, gives logits (B, num_classes). ReLU comes after the pooling.
    The result is the same as with ReLU first, and ReLU handles a quarter of the numbers.

    `pool` averages the features to pool x pool numbers per channel. So the number of parameters is the same
    at every image size: 6,799,882 with the defaults and 10 classes. With `pool=None` there is no averaging,
    and the first Linear fits only `image_size`. `kaiming=True` draws the weights of all layers but the last
    as in He et al. (https://arxiv.org/abs/1502.01852). `kaiming=False` keeps PyTorch's default weights.
    UserError: the image is smaller than 2 ** len(channels).
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        channels: tuple[int, ...] = (64, 128, 256),
        hidden: int = 512,
        batch_norm: bool = True,
        pool: int | None = 7,
        kaiming: bool = True,
        head_dropout: float = 0.5,
    ):
        super().__init__()
        side = image_size // 2 ** len(channels)
        if side < 1:
            raise UserError(
                f"image size {image_size} is too small for {len(channels)} halvings: "
                f"use at least {2 ** len(channels)}"
            )
        blocks: list[nn.Module] = []
        for in_channels, out_channels in zip((3, *channels), channels, strict=False):
            blocks.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            if batch_norm:
                blocks.append(nn.BatchNorm2d(out_channels))
            blocks.append(nn.MaxPool2d(2))
            blocks.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(pool) if pool else nn.Identity()
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels[-1] * (pool or side) ** 2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(head_dropout),
            nn.Linear(hidden, num_classes),
        )
        if kaiming:
            for module in self.modules():
                # No ReLU follows the last layer, so it keeps PyTorch's default weights.
                if isinstance(module, nn.Conv2d | nn.Linear) and module is not self.classifier[-1]:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)  # (B, C, H', W')
        x = self.pool(x)  # (B, C, pool, pool)
        return self.classifier(x)  # (B, num_classes)
