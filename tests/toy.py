"""A model with every kind of parameter, and its training by any layout."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from nanochat.adagrad import RowAdagrad
from nanochat.adamw import AdamW
from nanochat.muon import Muon
from nanochat.parallel import Layout, accumulate_gradients

KINDS = ("replicated", "zero2", "fsdp")
VOCAB, WIDTH, T, SEQUENCES = 13, 8, 7, 12
RARE = 3  # a token on which one parameter depends
# fully_shard of an older torch wants all ranks to use the same parameters
ALWAYS = not hasattr(FSDPModule, "set_reduce_scatter_unused_params")


class Block(nn.Module):
    """A part of the model that fsdp gathers by itself."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, x, scale):
        return x + scale * torch.tanh(x @ self.matrix.T)


class Toy(nn.Module):
    """Every kind of parameter, in numbers that neither 2 nor 3 divide; some without a gradient."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return nn.Parameter(0.5 * torch.randn(shape, generator=generator))

        self.table = nn.Embedding(11, WIDTH, sparse=True, _weight=normal(11, WIDTH).data)
        self.embed = normal(VOCAB, WIDTH)
        self.scales = normal(5)
        self.blocks = nn.ModuleList(Block(normal(WIDTH, WIDTH)) for _ in range(5))
        self.experts = normal(2, WIDTH, WIDTH)
        self.tall = normal(3 * WIDTH, WIDTH)
        self.rare = normal(1)
        self.unused = normal(7)
        self.head = normal(VOCAB, WIDTH)

    def forward(self, inputs, targets):
        """inputs, targets (B, T) -> the summed loss."""
        x = self.embed[inputs] + self.table(inputs % 11)
        if (inputs == RARE).any() or ALWAYS:
            x = x + self.rare * (inputs == RARE)[..., None]
        for scale, block in zip(self.scales, self.blocks):
            x = block(x, scale)
        for expert in self.experts:
            x = x + torch.tanh(x @ expert.T)
        x = x + torch.tanh(x @ self.tall.T).view(*x.shape, 3).sum(-1)
        return F.cross_entropy((x @ self.head.T).flatten(0, 1), targets.flatten(), reduction="sum")

    def setup_optimizers(self):
        adamw = AdamW([
            {"params": [self.embed], "lr": 0.01},
            {"params": [self.scales, self.rare, self.unused], "lr": 0.02},
            {"params": [self.head], "lr": 0.01},
        ], eps=1e-6)
        matrices = [block.matrix for block in self.blocks]
        muon = Muon([*matrices, self.experts, self.tall], lr=0.02, weight_decay=0.1)
        return [adamw, muon, RowAdagrad([self.table.weight], lr=0.05)]


def micro_batches(step, rank=0, ranks=1):
    """Two micro-batches: this rank's share of the sequences of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (SEQUENCES, T + 1), generator=generator)[rank::ranks]
    return [(part[:, :-1], part[:, 1:], "state") for part in ids.chunk(2)]


class Training:
    """A Toy and its layout, as rank `rank` of `ranks`."""

    def __init__(self, rank=0, ranks=1, **options):
        self.rank, self.ranks = rank, ranks
        self.model = Toy()
        self.optimizers = self.model.setup_optimizers()
        self.layout = Layout(self.model, self.optimizers, **options)
        self.losses, self.norms, self.started = [], [], []

    def step(self, number, clip=0.0, poison=False):
        """One training step. poison: a NaN in one gradient, and the step is skipped."""
        batches = micro_batches(number, self.rank, self.ranks)
        scale = self.ranks / (SEQUENCES * T)
        self.layout.overlap = self.layout.overlap and not poison
        loss, _ = accumulate_gradients(self.model, batches, scale, 2, self.layout)
        if poison:
            grad = self.model.head.grad
            grad = grad.to_local() if self.layout.sharded else grad
            grad[0, 0] = torch.nan
        self.started.append(self.layout.started)
        loss, grad_norm = self.layout.reduce(loss)
        self.losses.append(loss)
        self.norms.append(grad_norm)
        if grad_norm == grad_norm:
            self.layout.apply(clip, grad_norm)
        self.layout.zero_grad()

    def run(self, steps=4, clip=0.5):
        for number in range(steps):
            self.step(number, clip)
        return self

    def parameters(self):
        whole = self.layout.whole_model()
        return {name: value.clone() for name, value in whole.state_dict().items()}

    def result(self):
        return {"parameters": self.parameters(), "losses": self.losses, "norms": self.norms}
