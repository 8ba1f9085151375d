"""What makes attention and dropout fast on a CPU."""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al., JMLR 2014) whose masks come four from one draw on a CPU, where torch's Bernoulli draws are slow.

    There the probability is the nearest multiple of 2**-15, and the scale fits it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * 2**15)  # of the values of 15 random bits
        if not self.training or not 0 < dropped < 2**15 or x.device.type != "cpu":
            return super().forward(x)
        draws = (
            torch.empty(-(-x.numel() // 4), dtype=torch.int64)
            .random_()
            .view(torch.int16)[: x.numel()]
            .view(x.shape)
        )
        kept = (
            draws.bitwise_and_(2**15 - 1).sub_(dropped).bitwise_right_shift_(15).add_(1)
        )  # the shift leaves -1 or 0
        return x * kept.to(x.dtype).mul_(2**15 / (2**15 - dropped))
