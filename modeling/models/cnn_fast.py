"""CNNFast: a CNN that learns most in its first minutes. Its ideas are those of the CIFAR-10 speed records."""

import torch
from torch import nn
from torch.nn import functional as F

from modeling.errors import UserError
from modeling.models.cpu_layers import Conv3x3
from modeling.models.vit import ACTIVATIONS

SMALLEST_SIDE = 17  # pixels: three halvings leave two
PATCH = 2  # side of the whitening filters, pixels
WHITENING_EPS = 5e-4
# The biases of the 12 whitening filters, by variance, the smallest first. They are the means of what training
# gave them in four runs on CIFAR-10. The negative of a filter has the same bias.
WHITENING_BIAS = (-0.15, -0.235, -0.04, 0.07, 0.03, 0.07, 0.2, 0.0, 0.51, 0.31, -0.08, -0.1)


class CNNFast(nn.Module):
    """A whitening convolution, three blocks, the maximum over all positions, and a linear layer.

    Takes (B, 3, S, S) float, gives logits (B, num_classes). S is at least 17.

    The first convolution is not trained. `whiten` computes its filters from training images: 12 filters whose
    outputs are uncorrelated over all patches, and their negatives. Its biases are constants: to train them
    would take a twentieth of a step, and the accuracy would be the same. Each block is [Conv 3x3, MaxPool 2,
    BatchNorm, activation, Conv 3x3, BatchNorm, activation]. The normalisations have no trained scale. Their
    statistics follow the newest batches closely. The first `in_channels` filters of a convolution begin as
    the identity. The network is that of Jordan, 94% on CIFAR-10 in 3.29 seconds on a single GPU,
    https://arxiv.org/abs/2404.00498. UserError: the image is smaller than 17 pixels.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        channels: tuple[int, int, int] = (64, 256, 256),
        activation: str = "relu",
        head_dropout: float = 0.0,
    ):
        super().__init__()
        if image_size < SMALLEST_SIDE:
            raise UserError(f"image size {image_size} is too small for cnn_fast: use {SMALLEST_SIDE}")
        self.whitening = nn.Conv2d(3, 2 * len(WHITENING_BIAS), PATCH).requires_grad_(False)
        self.whitening.bias.data.copy_(torch.tensor(2 * WHITENING_BIAS))
        widths = (self.whitening.out_channels, *channels)
        pairs = zip(widths, channels, strict=False)
        self.activation = ACTIVATIONS[activation]()
        self.blocks = nn.Sequential(*(_block(*pair, self.activation) for pair in pairs))
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(channels[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=channels[-1] ** -0.5)

    @torch.no_grad()
    def whiten(self, images: torch.Tensor) -> None:
        """Set the first convolution from normalised training images (N, 3, S, S)."""
        weight = self.whitening.weight
        products, count = torch.zeros(weight[0].numel(), weight[0].numel(), dtype=torch.float64), 0
        for part in images.split(500):
            patches = F.unfold(part.double(), weight.shape[-1]).transpose(1, 2).flatten(0, 1)
            products += patches.T @ patches
            count += len(patches)
        variances, directions = torch.linalg.eigh(products / count)
        filters = directions.T / (variances[:, None] + WHITENING_EPS).sqrt()
        weight.copy_(torch.cat([filters, -filters]).reshape(weight.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.activation(self.whitening(x)))  # (B, C, (S - 1) // 8, (S - 1) // 8)
        x = self.dropout(x.amax(dim=(2, 3)))  # (B, C)
        return self.head(x) * self.head.in_features**-0.5  # (B, num_classes)


def _block(in_channels: int, out_channels: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        _convolution(in_channels, out_channels),
        nn.MaxPool2d(2),
        _normalization(out_channels),
        activation,
        _convolution(out_channels, out_channels),
        _normalization(out_channels),
        activation,
    )


def _convolution(in_channels: int, out_channels: int) -> Conv3x3:
    convolution = Conv3x3(in_channels, out_channels)
    nn.init.dirac_(convolution.weight.data[:in_channels])
    return convolution


def _normalization(channels: int) -> nn.BatchNorm2d:
    normalization = nn.BatchNorm2d(channels, momentum=0.4)
    normalization.weight.requires_grad_(False)
    return normalization
