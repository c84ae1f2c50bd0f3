"""An optimizer that tells in which precision its gradients were averaged."""

import torch
from torch.distributed.tensor import DTensor


class RecordingAdamW(torch.optim.AdamW):
    """AdamW that prints at each step whether all gradients could be bfloat16 numbers."""

    def step(self, closure=None):
        found = [p.grad for group in self.param_groups for p in group["params"]]
        parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]
        rounded = all(torch.equal(part, part.bfloat16().to(part.dtype)) for part in parts)
        print(f"gradients of {parts[0].dtype}, rounded: {rounded}")
        return super().step(closure)
