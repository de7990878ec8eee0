"""Which settings of a module the fused operators serve: asked by `fuse`, and again at every call."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fastp2p.nn.scope import Scope

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def refusal(module: nn.Module) -> str:
    """Why a convolution, norm, activation or dropout cannot be part of a fused block as it is set; "" if it can."""
    if parametrize.is_parametrized(module):
        return "has a parametrization"
    convolves = isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    if convolves and module._parameters.get("weight") is None:
        return "has a weight that is computed, as by spectral_norm or weight_norm"
    if has_hooks(module):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward that was replaced"
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return _conv_refusal(module)
    if isinstance(module, nn.BatchNorm2d) and module.momentum is None:
        return "has momentum None, a cumulative average"
    if isinstance(module, nn.InstanceNorm2d) and (module.track_running_stats or module.running_mean is not None):
        return "has running statistics"
    if isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d) and not module.eps > 0:
        return f"has eps {module.eps}"
    if isinstance(module, nn.LeakyReLU) and not 0 <= module.negative_slope < math.inf:
        return "has a slope below 0" if module.negative_slope < 0 else f"has the slope {module.negative_slope}"
    if isinstance(module, nn.Dropout) and not 0 <= module.p < 1:
        return f"drops with probability {module.p}"
    return ""


def _conv_refusal(conv: nn.Conv2d | nn.ConvTranspose2d) -> str:
    if conv.groups != 1:
        return f"has {conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"has dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"pads by {conv.padding_mode!r}"
    for name in ("padding", "stride", "output_padding"):
        value: Any = getattr(conv, name)
        if isinstance(value, str):
            return f"has {name} {value!r}"
        if not isinstance(value, tuple) or len(value) != 2 or value[0] != value[1]:
            return f"has {name} {value}, not alike in both dimensions"
    if conv.stride[0] < 1:
        return f"has stride {conv.stride}"
    return "" if conv.weight.dtype in _DTYPES else f"is of {conv.weight.dtype}"


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, other than those of `Scope`."""
    return any(not Scope.owns(hook) for name in _HOOKS for hook in (getattr(module, name, None) or {}).values())


def has_global_hooks() -> bool:
    """Whether something waits for the calls of all modules, as profilers do."""
    return bool(torch_module._has_any_global_hook())
