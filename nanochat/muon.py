"""Muon: momentum, then the update's nearest orthogonal matrix (Keller Jordan, 2024).

A gradient matrix is dominated by a few directions. Replacing it by U V^T of its singular value
decomposition lets every direction learn at the same rate. Five Newton-Schulz steps of the quintic
a X + b (X X^T) X + c (X X^T)^2 X push all singular values into about [.7, 1.2], which is near
enough, and need nothing but matmuls.

The optimizer knows no ranks. It needs whole matrices: parallel.Layout gives each rank its share.
Where no rank has a whole matrix (fsdp.py), step() comes apart: updates() makes the updates of whole
matrices, apply() applies any piece of them.
"""
import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalize(G, steps=5):
    """G (K, m, n) -> the nearest semi-orthogonal matrix of each of the K matrices, roughly.

    The steps are computed in bfloat16 on a GPU. A CPU multiplies float32 at least as fast.
    """
    a, b, c = COEFFICIENTS
    X = G.bfloat16() if G.device.type == "cuda" else G.float()

    # X X^T is the smaller product of a wide matrix
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT

    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)           # a X + B X

    if tall:
        X = X.mT
    return X.to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalized updates of matrices (m, n) and stacks (E, m, n).

    All matrices of one shape are one parameter group and are orthogonalized as one stack. The
    learning rate is scaled by sqrt(max(1, m / n)). Weight decay is decoupled and cautious: it acts
    only where it has the sign of the update (arXiv 2510.12402).

    State: under the first parameter of a group, `momentum` (K, m, n) of the group's K matrices.
    A parameter without a gradient counts as one whose gradient is zero.
    """

    partition = "matrices"  # parallel.Layout may give a rank some of the matrices, each whole

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        params = list(params)
        if params and not isinstance(params[0], dict):
            params = [{"params": params}]
        groups = []
        for group in params:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape[-2:]), []).append(p)
            groups += [{**group, "params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            params = group["params"]
            m, n = params[0].shape[-2:]
            counts = [p.numel() // (m * n) for p in params]
            for p, update in zip(params, self.updates(group).split(counts)):
                self.apply(group, (m, n), p, update.view_as(p))

    @torch.no_grad()
    def updates(self, group):
        """The updates of a group's K matrices, (K, m, n); the parameters stay as they are."""
        return orthogonalize(self._nesterov(group))

    @torch.no_grad()
    def apply(self, group, shape, piece, update):
        """Apply an update to a piece of matrices of shape (m, n): whole ones, or any elements.

        piece and update hold the same elements in the same order.
        """
        m, n = shape
        taller = max(1, m / n)
        decay = group["lr"] * group["weight_decay"]
        if decay:
            same_sign = update * piece > 0
            piece.sub_(piece * same_sign, alpha=decay)
        piece.sub_(update.to(piece.dtype), alpha=group["lr"] * taller ** 0.5)

    def _nesterov(self, group):
        """The gradients of a group as one stack (K, m, n), averaged with their momentum."""
        params = group["params"]
        m, n = params[0].shape[-2:]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        stack = torch.cat([grad.reshape(-1, m, n) for grad in grads]).float()

        state = self.state[params[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(stack)
        momentum = state["momentum"]
        momentum.lerp_(stack, 1 - group["momentum"])
        return stack.lerp_(momentum, group["momentum"])

    def fits(self, p, state):
        """Whether a loaded state is of the matrices of the group that begins with `p`.

        The momentum of all of them is one stack, which is kept under the first.
        """
        m, n = p.shape[-2:]
        for group in self.param_groups:
            if group["params"] and group["params"][0] is p:
                # p itself may be a stack of several matrices
                count = sum(q.numel() for q in group["params"]) // (m * n)
                return state["momentum"].shape == (count, m, n)
        return False


# The documented name. Nothing in here is distributed: parallel.Layout shards from outside.
DistMuon = Muon
