"""SimpleCNN: a plain stack of convolution blocks."""

import torch
from torch import nn

from modeling.errors import UserError


class SimpleCNN(nn.Module):
    """Blocks of [Conv 3x3, (BatchNorm), MaxPool 2, ReLU], then Linear, ReLU, Dropout, Linear.

    ReLU after the pooling is the same function as before it, on a quarter of the numbers.

    Takes (B, 3, image_size, image_size) float, gives logits (B, num_classes). With the defaults and 10 classes it has
    6,799,882 parameters at any size, for the features are average-pooled to `pool` x `pool`. `pool=None` flattens them as they
    are, so that the first Linear fits `image_size` alone. `kaiming` draws the weights that a ReLU follows (He et al.,
    https://arxiv.org/abs/1502.01852); without it they are PyTorch's defaults. UserError: an image smaller than 2 ** blocks.
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
                f"image size {image_size} is too small for {len(channels)} halvings: use at least {2 ** len(channels)}"
            )
        blocks: list[nn.Module] = []
        for in_channels, out_channels in zip((3, *channels), channels, strict=False):
            blocks.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            blocks.extend([nn.BatchNorm2d(out_channels)] if batch_norm else [])
            blocks.extend([nn.MaxPool2d(2), nn.ReLU(inplace=True)])
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
                if (
                    isinstance(module, nn.Conv2d | nn.Linear) and module is not self.classifier[-1]
                ):  # no ReLU follows that
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)  # (B, C, H', W')
        x = self.pool(x)  # (B, C, 7, 7)
        return self.classifier(x)  # (B, num_classes)
