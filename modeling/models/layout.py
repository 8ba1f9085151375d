"""The layout in memory of a model's weights."""

import torch
from torch import nn

FEW_CHANNELS = 32


def set_memory_layout(model: nn.Module) -> nn.Module:
    """Put the weights in channels-last layout, which makes convolutions fast, where torch computes with it.

    torch 2.14 on a CPU writes beyond its memory in the weight gradient of a channels-last convolution whose
    stride is larger than its kernel, as in the first layer of RepVGG and FastViT
    (https://github.com/pytorch/pytorch/issues/136348). It was seen with up to 8 input channels. Such a
    convolution stays contiguous, and its input is made so.
    """
    model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _skips_pixels(module):
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
            module.register_forward_pre_hook(_make_input_contiguous)
    return model


def _skips_pixels(convolution: nn.Conv2d) -> bool:
    sides = zip(convolution.kernel_size, convolution.stride, strict=True)
    is_sparse = any(kernel < stride for kernel, stride in sides)
    return is_sparse and convolution.in_channels // convolution.groups < FEW_CHANNELS


def _make_input_contiguous(module: nn.Conv2d, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.contiguous() if x.device.type == "cpu" else x for x in inputs)
