"""Muon for any number of ranks: momentum, then the update's nearest orthogonal matrix (Keller Jordan, 2024).

A gradient matrix is dominated by a few directions. Replacing it by U V^T of its singular value decomposition lets every
direction learn at the same rate. Five Newton-Schulz steps of the quintic a X + b (X X^T) X + c (X X^T)^2 X push all
singular values into about [.7, 1.2], which is near enough, and need nothing but matmuls.

Phases of a step: matrices of one shape are stacked and padded to a multiple of the ranks; (1) reduce: average the stack,
each rank keeping its owned slice of whole matrices; (2) the caller may judge and clip; (3) step: owners update, gather.
"""
import torch
import torch.distributed as dist

from nanochat.common import get_dist_info

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalize(G, steps=5):
    """G (K, m, n) -> its K nearest semi-orthogonal matrices, roughly. bfloat16 on a GPU; a CPU multiplies float32 at least as well at these sizes."""
    a, b, c = COEFFICIENTS
    X = G.bfloat16() if G.device.type == "cuda" else G.float()
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


class DistMuon(torch.optim.Optimizer):
    """Nesterov momentum mu, rate scaled by sqrt(max(1, rows / columns)); decoupled weight decay where it goes the update's way (arXiv 2510.12402)."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        by_shape = {}
        for p in params:
            by_shape.setdefault(tuple(p.shape), []).append(p)
        groups = [{"params": same, "lr": lr, "momentum": momentum, "weight_decay": weight_decay} for same in by_shape.values()]
        super().__init__(groups, {})
        _, _, _, self.world_size = get_dist_info()
        self.owned = {}  # group index -> averaged gradients of the matrices that this rank owns

    @torch.no_grad()
    def reduce(self):
        """Average gradients over ranks; returns the sum of squares of the gradients owned here, a 0-D tensor."""
        waits = []
        for i, group in enumerate(self.param_groups):
            stack = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]]).float()
            if self.world_size > 1:
                stack = self._pad(stack)
                self.owned[i] = torch.empty_like(stack[:stack.size(0) // self.world_size])
                waits.append((dist.reduce_scatter_tensor(self.owned[i], stack, op=dist.ReduceOp.SUM, async_op=True), stack))
            else:
                self.owned[i] = stack
        for wait, _ in waits:
            wait.wait()
        for gradients in self.owned.values():
            gradients /= self.world_size
        return sum((torch.linalg.vector_norm(g).square() for g in self.owned.values()), torch.zeros(()))

    @torch.no_grad()
    def step(self, scale=1.0):
        """Update from the reduced gradients times `scale` (a clipping factor)."""
        for i, group in enumerate(self.param_groups):
            if i not in self.owned:
                continue
            params, grad = group["params"], self.owned.pop(i) * scale
            state = self.state[params[0]]  # one buffer for the whole stack
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - group["momentum"])
            update = orthogonalize(grad.lerp_(state["momentum"], group["momentum"]))
            rows, columns = params[0].shape
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            updates = self._gather(update)
            for p, u in zip(params, updates):
                if group["weight_decay"]:
                    p.sub_(p * (u * p > 0), alpha=group["lr"] * group["weight_decay"])
                p.sub_(u.to(p.dtype), alpha=rate)

    def _pad(self, stack):
        missing = -stack.size(0) % self.world_size
        return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])]) if missing else stack

    def _gather(self, update):
        if self.world_size == 1:
            return update
        whole = update.new_empty(update.size(0) * self.world_size, *update.shape[1:])
        dist.all_gather_into_tensor(whole, update.contiguous())
        return whole
