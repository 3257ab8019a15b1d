"""Adagrad with one number a row, for tables of which a batch touches few rows (as DLRM trains its sparse features, arXiv 1906.00091).

A table of hundreds of thousands of rows would make AdamW read and write all of it, three times over, for the few thousand
rows that a step looks up; it would also go on moving rows by their momentum long after their tokens were seen. Here a row
moves when it is looked up, by lr in root mean square at first and by lr / sqrt(n) at the n-th time.

Phases of a step on several ranks: (1) reduce: average the dense gradients, each rank keeping its slice of whole rows;
(2) the caller may judge and clip; (3) step: update the slice, gather the table. One rank needs no dense gradient.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.common import get_dist_info


class DistRowAdagrad(torch.optim.Optimizer):
    """For tables (rows, C) with sparse gradients (nn.Embedding(..., sparse=True))."""

    def __init__(self, params, lr=0.5):
        super().__init__(params, dict(lr=lr))
        _, self.rank, _, self.world_size = get_dist_info()
        self.touched = {}  # table -> (rows of this rank's slice, their averaged gradients)

    @torch.no_grad()
    def reduce(self):
        """Average gradients over ranks; returns the sum of squares of this rank's share of them, a 0-D tensor."""
        self.touched = {}
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if self.world_size == 1:
                sparse = p.grad.coalesce()
                self.touched[p] = sparse.indices()[0], sparse.values()
                continue
            dense = p.grad.to_dense()
            dense = F.pad(dense, (0, 0, 0, -len(p) % self.world_size))
            mine = dense.new_empty(len(dense) // self.world_size, p.size(1))
            dist.reduce_scatter_tensor(mine, dense, op=dist.ReduceOp.SUM)
            rows = mine.any(dim=1).nonzero()[:, 0]
            self.touched[p] = rows, mine[rows] / self.world_size
        return sum((torch.linalg.vector_norm(g).square() for _, g in self.touched.values()), torch.zeros(()))

    @torch.no_grad()
    def step(self, scale=1.0):
        """Update from the reduced gradients times `scale` (a clipping factor)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.touched:
                    continue
                (rows, grad), state = self.touched.pop(p), self.state[p]
                grad = grad * scale
                if not state:
                    state["squares"] = torch.zeros(-(-len(p) // self.world_size), 1, device=p.device)
                state["squares"].index_add_(0, rows, grad.square().mean(dim=1, keepdim=True))
                update = grad * state["squares"][rows].clamp(min=1e-30).rsqrt_()
                if self.world_size == 1:
                    p.index_add_(0, rows, update, alpha=-group["lr"])
                    continue
                whole = F.pad(p, (0, 0, 0, -len(p) % self.world_size))
                mine = whole.chunk(self.world_size)[self.rank].clone()
                mine.index_add_(0, rows, update, alpha=-group["lr"])
                dist.all_gather_into_tensor(whole, mine)
                p.copy_(whole[:len(p)])
