"""The GPT with lookups: tables of pairs and triples, value embeddings, x0 skip connection.

A lookup costs no matmul, and a short run on a CPU learns each frequent pair of tokens from a table
long before its layers could. What each part is worth stands in dev/LOG.md.

smear             the previous token's embedding, scaled by channel (modded-nanogpt)
bigram, trigram   a token together with the one and the two before it, in hashed tables: several
                  pairs or triples share a row (n-gram embeddings, as in modded-nanogpt)
values            value embeddings, added to the values of attention (arXiv 2410.17897); one table
                  for the first and the last layer, and so on inwards
blend             every block reads a blend of the residual stream and of the embeddings x0, so
                  that early layers need not carry them along (x0 skip connection, nanochat)

Shapes as in gpt.py.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adagrad import RowAdagrad
from nanochat.gpt import GPT, OPTIMIZERS, Attention, Block, Embedding, GPTConfig, Recipe, norm, take
from nanochat.kv_cache import KVCache

HASHED_ROWS_PER_TOKEN = 64
HASHED_ROWS_MAX = 131072
# What the token before, and the one before that, are multiplied with: primes keep frequent
# tokens apart.
HASH_PRIMES = 7919, 1000003


def usual_hashed_rows(vocab_size):
    """Rows of a hashed table where there is text enough."""
    return min(HASHED_ROWS_PER_TOKEN * vocab_size, HASHED_ROWS_MAX)


@dataclass
class LookupConfig(GPTConfig):
    """hashed_rows: of the table of pairs and of that of triples; 0: what the vocabulary needs."""
    hashed_rows: int = 0


class HashedEmbedding(nn.Embedding):
    """A table in which several keys share a row. Its gradients are sparse on a CPU."""
    roles = {"weight": "hashed"}

    def forward(self, keys):
        return super().forward(keys % self.num_embeddings)


class LookupAttention(Attention):
    """Attention whose values have a value embedding added."""

    def project(self, x, at, value):
        """value (B, T, G * D): the value embedding of each token."""
        q, k, v = super().project(x, at)
        return q, k, v + value.view(v.shape)


class LookupBlock(Block):
    """A block that reads a blend of the residual stream and of the embeddings x0."""
    attention_class = LookupAttention
    roles = {"blend": "scalar"}

    def __init__(self, config):
        super().__init__(config)
        self.blend = nn.Parameter(torch.empty(2))

    def forward(
        self, x, cos, sin, layer_cache=None, window=None, at=None, *, x0, value, idx=None,
    ):
        """value: the value embedding of each token; with idx the table of them, looked up here."""
        if idx is not None:
            value = F.embedding(idx, value).to(x.dtype)
        x = self.blend[0].to(x.dtype) * x + self.blend[1].to(x.dtype) * x0
        y = self.attention(norm(x), cos, sin, layer_cache, window, at, value=value)
        x = take(x, at) + y
        return x + self.mlp(norm(x))


class LookupCache(KVCache):
    """A KVCache that also remembers the tokens of each slot, for the lookups.

    tokens (S, lookback - 1 + length): the token at position p of a slot is in column
    p + lookback - 1; the columns before the first token hold -1.
    """

    def __init__(self, layers, slots, length, lookback, device):
        super().__init__(layers, slots, device)
        self.lookback = lookback
        self.tokens = torch.full(
            (slots, lookback - 1 + length), -1, dtype=torch.int32, device=device)

    def recent(self, idx, window):
        """Store idx (n, T) at its positions; the last tokens up to each, (n, T, lookback)."""
        self.tokens[window.index, window.positions + self.lookback - 1] = idx.int()
        return self.tokens.unfold(1, self.lookback, 1)[window.index, window.positions]

    def copy(self, slot, others, length):
        super().copy(slot, others, length)
        end = self.lookback - 1 + length
        self.tokens[others, :end] = self.tokens[slot, :end]


class LookupGPT(GPT):
    """GPT with the lookups that the head of this file lists."""
    config_class = LookupConfig
    block_class = LookupBlock
    roles = {"smear": "scalar"}
    optimizers = {**OPTIMIZERS, "hashed": Recipe(RowAdagrad, 50.0, False, False, {})}
    lookback = 3  # a token, the one before it, and the one before that

    def __init__(self, config):
        super().__init__(config)
        rows = config.hashed_rows or usual_hashed_rows(self.vocab_size_padded)
        self.smear = nn.Parameter(torch.empty(config.width))
        self.bigram = HashedEmbedding(rows, config.width)
        self.trigram = HashedEmbedding(rows, config.width)
        kv_width = config.kv_heads * config.head_dim
        self.values = nn.ModuleList(
            Embedding(self.vocab_size_padded, kv_width) for _ in range((config.depth + 1) // 2))
        self.look_up_in_blocks = False  # choose_gradients() sets it

    @torch.no_grad()
    def init_weights(self):
        """As in GPT, and zero for all lookups, so that they have no effect at the start.

        blend   1 of the residual stream and .1 of the embeddings
        """
        super().init_weights()
        tables = [self.bigram.weight, self.trigram.weight, *(table.weight for table in self.values)]
        for parameter in (self.smear, *tables):
            nn.init.zeros_(parameter)
        for block in self.blocks:
            block.blend.copy_(torch.tensor([1.0, 0.1]))
        self.choose_gradients()

    def choose_gradients(self):
        """How the tables are looked up and trained, by the device.

        Sparse gradients of the hashed tables on a CPU, where a step looks up few rows; dense ones
        on a GPU and on MPS, where sorting the rows would cost more. Value embeddings are looked up
        inside the blocks on a GPU: compiled, the rows are cast and added as they are read, and no
        float32 copy of them (B, T, C) is written and read again.
        """
        on_cpu = self.device.type == "cpu"
        for table in (self.bigram, self.trigram):
            table.sparse = on_cpu
        self.look_up_in_blocks = not on_cpu

    def recent_tokens(self, idx, kv_cache=None, window=None):
        """The last tokens up to each position, (B, T, lookback) int32; -1 before the first."""
        if kv_cache is not None:
            return kv_cache.recent(idx, window)
        return F.pad(idx.int(), (self.lookback - 1, 0), value=-1).unfold(1, self.lookback, 1)

    def enter(self, idx, recent):
        before = recent[..., -2].clamp(min=0).long()
        before_that = recent[..., -3].clamp(min=0).long()
        pairs = before * HASH_PRIMES[0] + idx
        triples = before_that * HASH_PRIMES[1] + pairs
        x = self.embed(idx) + self.smear * self.embed(before)
        x = x + self.bigram(pairs) + self.trigram(triples)
        return norm(x.to(self.compute_dtype))

    def block_inputs(self, idx, x):
        """The embeddings x0 and the value embedding of each block, shared from both ends."""
        last = len(self.blocks) - 1
        x0 = x.view_as(x)  # one compiled graph serves the first block, too: its inputs are two
        inputs = []
        for i in range(len(self.blocks)):
            table = self.values[min(i, last - i)]
            if self.look_up_in_blocks:
                inputs.append({"x0": x0, "value": table.weight, "idx": idx})
            else:
                inputs.append({"x0": x0, "value": table(idx).to(x.dtype)})
        return inputs

    def new_kv_cache(self, slots, length):
        layers = super().new_kv_cache(slots, length).layers
        return LookupCache(layers, slots, length, self.lookback, self.device)
