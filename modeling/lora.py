"""LoRA added to a linear layer in place: base + scaling * low @ B, where PEFT multiplies and adds once more.

    PEFT    result + (low @ B) * scaling     three results as large as the layer's, and two in the backward
    here    result.addmm_(low, B)            none, and none

On a CPU that is 5 to 10 % of a training step. The layer is PEFT's own in all else, and so is its adapter.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn


class FusedLoraLinear(Linear):
    """PEFT's layer; anything but one plain adapter in the layer's own dtype is left to PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if len(adapters) != 1 or adapters[0] in self.lora_variant or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (adapter,) = adapters
        first, second = self.lora_A[adapter], self.lora_B[adapter]
        if args or kwargs or second.bias is not None or first.weight.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        rows = x.flatten(0, -2)
        result = self.base_layer(rows)
        if result.dtype != x.dtype:
            return super().forward(x)
        low = first(self.lora_dropout[adapter](rows))
        # In place: no backward reads what a linear layer gave.
        result.addmm_(low, second.weight.T, alpha=self.scaling[adapter])
        return result.unflatten(0, x.shape[:-1])


def fuse_linears(config: LoraConfig) -> None:
    """Make PEFT build these layers on plain linear ones; 4-bit layers, which are linear too, need PEFT's own."""
    config._register_custom_module({nn.Linear: FusedLoraLinear})
