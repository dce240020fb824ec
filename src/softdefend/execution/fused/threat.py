"""Steps of attacks in the l-inf ball as one kernel each."""

from __future__ import annotations

import torch
from torch import Tensor

from softdefend.core.threat import ThreatModel


class FusedThreat(ThreatModel):
    """The same set and the same steps, to the bit but for a gradient of NaN, which moves nothing."""

    def move(self, image: Tensor, adversarial: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """See :meth:`ThreatModel.move`; in l-inf on a GPU a single pass over tensors of one memory order."""
        one_order = image.stride() == adversarial.stride() == grad.stride()
        dense = image.is_contiguous() or image.is_contiguous(memory_format=torch.channels_last)
        if self.norm != "linf" or not (image.is_cuda and one_order and dense):
            return super().move(image, adversarial, grad, step_size)
        from softdefend.execution.fused import kernels

        out, count, values = torch.empty_like(image), image.numel(), 1024
        with torch.cuda.device(image.device):
            kernels.move[(-(-count // values),)](
                image, adversarial, grad, out, step_size, float(self.eps), count, values
            )
        return out
