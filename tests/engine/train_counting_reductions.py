"""scripts/train.py, which says at its end how often DDP has reduced gradients."""

from scripts import train
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


class CountingModel(DistributedDataParallel):
    """Counts the buckets of gradients that are reduced."""

    num_reductions = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(self.process_group, self.count)

    @staticmethod
    def count(group, bucket):
        CountingModel.num_reductions += 1
        return allreduce_hook(group, bucket)


if __name__ == "__main__":
    import torch

    torch.nn.parallel.DistributedDataParallel = CountingModel
    train.main()
    print(f"reductions: {CountingModel.num_reductions}")
