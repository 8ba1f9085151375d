"""Attention, convolution and dropout that are fast on a CPU."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# With more tokens than this the attention weights (N, N) need too much memory, so the fused kernel is used.
MAX_CPU_TOKENS = 1025
# On larger maps PyTorch's own weight gradient is faster than a matrix product.
MAX_CPU_SIDE = 7


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al., JMLR 2014) with a faster random mask on a CPU.

    On a CPU torch's Bernoulli draws are slow. This class draws 64-bit integers and takes four mask values
    from each. The drop probability is rounded to the nearest multiple of 2**-15, and the scale uses the
    rounded value. On other devices this is torch's own dropout.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_dropped = round(self.p * 2**15)  # drop where a random number of 15 bits is below this
        if not self.training or not 0 < num_dropped < 2**15 or x.device.type != "cpu":
            return super().forward(x)
        num_draws = (x.numel() + 3) // 4
        draws = torch.empty(num_draws, dtype=torch.int64).random_()
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
        draws = draws.bitwise_and_(2**15 - 1)
        # draws - num_dropped is negative where a value is dropped. The shift turns the sign into -1 or 0.
        # Adding 1 gives 0 (dropped) or 1 (kept).
        kept = draws.sub_(num_dropped).bitwise_right_shift_(15).add_(1)
        scale = 2**15 / (2**15 - num_dropped)
        return x * kept.to(x.dtype).mul_(scale)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Scaled dot-product attention: softmax(q k^T / sqrt(d)) v. q, k, v and the result: (B, num_heads, N, d).

    `dropout` is applied to the attention weights. On a CPU with few tokens this calls `cpu_attention`.
    Otherwise it calls PyTorch's fused kernel.
    """
    if q.device.type == "cpu" and q.shape[-2] <= MAX_CPU_TOKENS:
        return cpu_attention(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout.p if dropout.training else 0.0)


def cpu_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """Attention as two matrix products and a softmax. Shapes as in `attention`.

    On a CPU the fused kernel is slower than this, above all in its backward pass. Autocast is off here, so
    that every step keeps the dtype of q, k and v.
    """
    with torch.autocast("cpu", enabled=False):
        scale = q.shape[-1] ** -0.5
        weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, num_heads, N, N)
        return dropout(weights) @ v  # (B, num_heads, N, d)


class Conv3x3(nn.Conv2d):
    """Convolution with a 3x3 kernel, padding 1 and no bias, whose weights are trained fast on a CPU.

    On small maps PyTorch takes 2 to 4 times as long for the weight gradient as for the same work in one
    matrix product. This class computes that product. Elsewhere this is PyTorch's own convolution. x: (B,
    in_channels, H, W). The result: (B, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and max(x.shape[-2:]) <= MAX_CPU_SIDE:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            return _SmallConv3x3.apply(x.to(dtype), self.weight.to(dtype))
        return super().forward(x)


class _SmallConv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        x_gradient = F.conv2d(out_gradient, weight.transpose(0, 1).flip(2, 3), padding=1)
        x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
        patches = x.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, H, W, C, 3, 3)
        patches = patches.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)  # (B * H * W, 9 * C)
        out_gradient = out_gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, C_out)
        weight_gradient = (out_gradient.T @ patches).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return x_gradient, weight_gradient
