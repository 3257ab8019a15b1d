"""AdamW for any number of ranks, its state sharded over them (ZeRO-2).

Phases of a step: (1) reduce: average the gradients, each rank keeping one flat slice; (2) the caller may judge and clip;
(3) step: update the slice, gather the parameter. Slices are cut from the flattened, zero-padded parameter, so that any
shape works on any number of ranks.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.common import get_dist_info


def flat_shard(tensor, rank, world_size):
    """The rank-th of world_size equal slices of the flattened, zero-padded tensor."""
    flat = tensor.reshape(-1)
    size = -(-flat.numel() // world_size)
    return F.pad(flat, (0, size * world_size - flat.numel()))[rank * size:(rank + 1) * size]


class DistAdamW(torch.optim.Optimizer):
    """Decoupled weight decay (arXiv 1711.05101), maths in float32, bias correction before epsilon."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        _, self.rank, _, self.world_size = get_dist_info()
        self.shards = {}

    @torch.no_grad()
    def reduce(self):
        """Average gradients over ranks; returns the sum of squares of this rank's share of them, a 0-D tensor."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        waits = []
        for p in params:
            if self.world_size == 1:
                self.shards[p] = p.grad.reshape(-1).float()
                continue
            size = -(-p.numel() // self.world_size)
            padded = F.pad(p.grad.reshape(-1).float(), (0, size * self.world_size - p.numel()))
            self.shards[p] = padded.new_empty(size)
            waits.append((dist.reduce_scatter_tensor(self.shards[p], padded, op=dist.ReduceOp.SUM, async_op=True), padded))
        for wait, _ in waits:
            wait.wait()
        for p in params:
            self.shards[p] /= self.world_size
        return sum((self.shards[p].square().sum() for p in params), torch.zeros(()))

    @torch.no_grad()
    def step(self, scale=1.0):
        """Update from the reduced gradients times `scale` (a clipping factor)."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p not in self.shards:
                    continue
                grad = self.shards.pop(p) * scale
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(grad), v=torch.zeros_like(grad))
                state["step"] += 1
                mine = flat_shard(p.detach(), self.rank, self.world_size).float()
                mine = mine * (1 - group["lr"] * group["weight_decay"])
                state["m"].lerp_(grad, 1 - beta1)
                state["v"].lerp_(grad.square(), 1 - beta2)
                denominator = (state["v"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                mine -= (group["lr"] / (1 - beta1 ** state["step"])) * state["m"] / denominator
                p.copy_(self._gather(mine, p).view_as(p))

    def _gather(self, mine, p):
        if self.world_size == 1:
            return mine
        whole = mine.new_empty(mine.numel() * self.world_size)
        dist.all_gather_into_tensor(whole, mine)
        return whole[:p.numel()]
