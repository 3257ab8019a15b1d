"""The GPT: rotary embeddings, QK norm, untied head, ReLU-squared MLP, RMSNorm without parameters, softcapped logits.

One dial: depth. Width is 64 * depth, heads of 128 (64 when the model is small), and the rest follows. On top of that come
lookups, which cost no matmul: at the entrance the token before, pairs and triples of tokens, values by token and a second look
at the entrance in every layer. At the exit, where the training text is small, counts of its n-grams and of the text at hand are
mixed in (ngrams.py).
Without these it is the documented nanochat, and a test holds it to transformers' class. This file is single-device code;
compiling and sharding are applied from outside.

Shapes: B batch, T time, C width, H query heads, G key/value heads, D head dimension, V vocabulary.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adagrad import RowAdagrad
from nanochat.adamw import AdamW
from nanochat.attention import cached_attention, causal_attention
from nanochat.common import UserError
from nanochat.kv_cache import KVCache, LayerCache
from nanochat.muon import Muon
from nanochat.ngrams import ORDERS, PARTS, REACH, NGrams


# A token is looked up together with the one before it, and with the two before it, in tables of which several pairs or triples
# share a row; the one before shows through by itself, too (the first and last as in the speedruns of modded-nanogpt).
# Lookups cost no matmul, and a short run knows each frequent pair long before its layers could.
HASHED_ROWS = 64            # rows of each table for each token of the vocabulary ...
MOST_HASHED_ROWS = 131072   # ... and at most
STRIDES = 7919, 1000003     # what the token before, and the one before that, is multiplied with: primes keep frequent tokens apart
HASHED_RATE = 50            # times the matrices' rate


@dataclass
class GPTConfig:
    depth: int = 20
    width: int = 1280
    heads: int = 10
    kv_heads: int = 10
    vocab_size: int = 32768
    max_seq_len: int = 2048
    softcap: float = 15.0
    rotary_base: float = 10000.0
    ngrams: int = 0  # how many n-grams of the training text are mixed in

    @classmethod
    def from_depth(cls, depth, vocab_size, max_seq_len, kv_heads=None):
        """The documented shapes: width 64 * depth, head dimension 128 from depth 12 on when it divides, else 64."""
        width = 64 * depth
        heads = width // (128 if depth >= 12 and depth % 2 == 0 else 64)
        if kv_heads and heads % kv_heads:
            raise UserError(f"kv_heads={kv_heads} must divide the {heads} query heads of depth {depth}")
        return cls(depth, width, heads, kv_heads or heads, vocab_size, max_seq_len)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864), halves layout: x (B, T, H, D), cos and sin (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """No bias; master weights in float32, multiplied in the dtype of the activations."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.width // config.heads
        self.q = Linear(config.width, config.heads * self.head_dim)
        self.k = Linear(config.width, config.kv_heads * self.head_dim)
        self.v = Linear(config.width, config.kv_heads * self.head_dim)
        self.out = Linear(config.width, config.width)

    def forward(self, x, value, cos, sin, layer_cache=None, window=None):
        B, T, C = x.shape
        q, k, v = (w(x).view(B, T, -1, self.head_dim) for w in (self.q, self.k, self.v))
        v = v + value.view(v.shape)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = causal_attention(q, k, v) if layer_cache is None else cached_attention(q, k, v, layer_cache, window)
        return self.out(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Reads a blend of the stream and of the embeddings x0 (as nanochat does): early layers need not carry them along."""
    attention_class = Attention

    def __init__(self, config):
        super().__init__()
        self.attention = self.attention_class(config)
        self.mlp = MLP(config)
        self.blend = nn.Parameter(torch.empty(2))

    def forward(self, x, x0, value, cos, sin, layer_cache=None, window=None):
        x = self.blend[0].to(x.dtype) * x + self.blend[1].to(x.dtype) * x0
        x = x + self.attention(norm(x), value, cos, sin, layer_cache, window)
        return x + self.mlp(norm(x))


class LookupCache(KVCache):
    """A KVCache that also keeps the tokens themselves, which the lookups and n-grams need.

    tokens (S, lookback - 1 + L): the token at position p of a slot is in column p + lookback - 1;
    the columns before the first token hold -1.
    """

    def __init__(self, layers, slots, length, lookback, device):
        super().__init__(layers, slots, device)
        self.lookback = lookback
        shape = (slots, lookback - 1 + length)
        self.tokens = torch.full(shape, -1, dtype=torch.int32, device=device)

    def add(self, idx, window):
        """Keep the tokens idx (n, T) of a CacheWindow.

        Returns the last tokens up to each of them, (n, T, lookback), -1 before the first.
        """
        self.tokens[window.index, window.positions + self.lookback - 1] = idx.int()
        return self.tokens.unfold(1, self.lookback, 1)[window.index, window.positions]


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        rows = -(-config.vocab_size // 64) * 64  # padded for the hardware; the extra rows are never read
        self.embed = nn.Embedding(rows, config.width)
        self.smear = nn.Parameter(torch.empty(config.width))
        self.bigram, self.trigram = (nn.Embedding(min(HASHED_ROWS * rows, MOST_HASHED_ROWS), config.width, sparse=True) for _ in range(2))
        # value embeddings (arXiv 2410.17897), one table for the first and the last layer, and so on inwards
        kv_width = config.kv_heads * config.width // config.heads
        self.values = nn.ModuleList(nn.Embedding(rows, kv_width) for _ in range((config.depth + 1) // 2))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Linear(config.width, rows)
        self.ngrams = NGrams(config.ngrams) if config.ngrams else None
        self.gate = nn.Linear(config.width + PARTS + ORDERS, 1 + PARTS) if config.ngrams else None
        self.left_out = False  # set where training reads the very text whose n-grams were counted
        self.compute_dtype = torch.float32
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Sets every value, so that a model built on the meta device is whole after `to_empty` and this.

        embed                     normal, std 1 (it is normalised at once)
        bigram, trigram, values   zero: they say nothing until they have learned to
        smear                     zero, likewise
        blend                     1 of the stream and .1 of the embeddings
        q, k, v, up               uniform, std 1 / sqrt(width): uniform avoids outliers
        attention.out, mlp.down   zero: every block starts as the identity
        gate                      zero: the network and all counts weigh the same
        head                      normal, std .001: the first logits are flat
        cos, sin                  the rotary table for max_seq_len
        """
        c = self.config
        nn.init.normal_(self.embed.weight)
        for silent in (self.smear, self.bigram.weight, self.trigram.weight, *(table.weight for table in self.values)):
            nn.init.zeros_(silent)
        nn.init.normal_(self.head.weight, std=0.001)
        for p in self.gate.parameters() if self.gate else ():
            nn.init.zeros_(p)
        bound = math.sqrt(3 / c.width)
        for block in self.blocks:
            for linear in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
            block.blend.copy_(torch.tensor([1.0, 0.1]))
        self.build_rotary()

    def build_rotary(self):
        c, device = self.config, self.embed.weight.device
        half = c.width // c.heads // 2
        rates = c.rotary_base ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(c.max_seq_len, device=device, dtype=torch.float32), rates)  # T, D/2
        self.cos, self.sin = angles.cos()[None, :, None], angles.sin()[None, :, None]

    @property
    def reach(self):
        """How many tokens, up to one, are looked at where it is looked up."""
        return 3 if self.ngrams is None else max(ORDERS, min(self.config.max_seq_len, REACH))

    def features(self, idx, kv_cache=None, slots=None):
        """idx (B, T) -> ((B, T, C) after the last norm, the last tokens up to each (B, T, reach)).

        With a kv_cache, idx continues the sequences in `slots` (list of B ints; None: all slots).
        """
        T = idx.size(1)
        window = None
        if kv_cache is None:
            if T > self.config.max_seq_len:
                raise UserError(f"{T} tokens do not fit the context of {self.config.max_seq_len}")
            cos, sin = self.cos[:, :T], self.sin[:, :T]
            tokens = F.pad(idx.int(), (self.reach - 1, 0), value=-1).unfold(1, self.reach, 1)  # a view
        else:
            window = kv_cache.window(slots, T)
            cos, sin = self.cos[0, window.positions], self.sin[0, window.positions]  # B, T, 1, D/2
            tokens = kv_cache.add(idx, window)
        before, before_that = (tokens[..., -back].clamp(min=0).long() for back in (2, 3))
        pairs = before * STRIDES[0] + idx
        triples = before_that * STRIDES[1] + pairs
        x = self.embed(idx) + self.smear * self.embed(before)
        x = x + self.bigram(pairs % self.bigram.num_embeddings) + self.trigram(triples % self.trigram.num_embeddings)
        x = x0 = norm(x.to(self.compute_dtype))
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for i, block in enumerate(self.blocks):
            value = self.values[min(i, len(self.blocks) - 1 - i)](idx).to(x.dtype)
            if kv_cache is None and self.training:
                x = block(x, x0, value, cos, sin)
            else:  # the uncompiled function: shapes vary here, and each would compile anew
                x = block.forward(x, x0, value, cos, sin, kv_cache and kv_cache.layers[i], window)
        return norm(x), tokens

    def gate_weights(self, x, totals, kinds):
        """How far to believe whom: x (N, C) and, of each context, how often it was counted (N, PARTS) and with how many next tokens
        (N, ORDERS) -> the logs of the weights, (N, 1 + PARTS), the network's first. A context that was never counted has no weight.
        """
        weights = self.gate(torch.cat((x.float(), totals.log1p() / 8, kinds.log1p() / 8), -1))
        return weights.masked_fill(F.pad(totals == 0, (1, 0)), -torch.inf).log_softmax(-1)

    def mixture(self, x, tokens, targets):
        """x (N, C), tokens (N, reach), targets (N,) -> the log of the network's weight and the probability that the n-grams give
        each target, (N,) both. (None, None) where there are no n-grams.
        """
        if self.ngrams is None:
            return None, None
        totals, kinds, hits = self.ngrams.look_up(tokens, targets.clamp(min=0), self.left_out and self.training)
        weights = self.gate_weights(x, totals, kinds)
        return weights[:, 0], (weights[:, 1:].exp() * hits / totals.clamp(min=1)).sum(-1)

    def drop_ngrams(self):
        """Leave the network alone, for a purpose to which the counted text is foreign."""
        self.ngrams = self.gate = None
        self.config = replace(self.config, ngrams=0)

    def logits(self, x, tokens):
        """x (N, C), tokens (N, reach) -> float32 (N, V): softcapped, or with n-grams the log of the mixed probabilities."""
        c = self.config
        z = F.linear(x, self.head.weight[:c.vocab_size].to(x.dtype)).float()
        z = c.softcap * torch.tanh(z / c.softcap)
        if self.ngrams is None:
            return z
        found = self.ngrams.find(tokens)
        weights = self.gate_weights(x, found.totals, found.kinds).exp()
        return (weights[:, :1] * z.softmax(-1) + self.ngrams.next_tokens(tokens, found, weights[:, 1:], c.vocab_size)).log()

    def forward(self, idx, targets=None, kv_cache=None, slots=None, reduction="sum"):
        """idx (B, T). Without targets: logits (B, T, V). With targets (B, T), -1 ignored: the summed loss in nats, or (B, T) for 'none'.

        With n-grams the loss is that of the mixture. Its gradient is of that and of the network's own loss, one to one: alone, the
        mixture's would let the network rest on what the n-grams know (3.5 bits per byte by itself, and a worse mixture).
        """
        x, tokens = (part.flatten(0, 1) for part in self.features(idx, kv_cache, slots))
        if targets is None:
            return self.logits(x, tokens).view(*idx.shape, -1)
        weight = self.head.weight[:self.config.vocab_size]
        mixed = self.mixture(x, tokens, targets.flatten())
        loss = SoftcapCrossEntropy.apply(x, weight, targets.flatten(), self.config.softcap, reduction, *mixed)
        return loss if reduction == "sum" else loss.view(targets.shape)

    def parameters_by_role(self):
        """{role: [parameters]}: matrix, scalar, embedding, hashed, head. The roles partition the parameters."""
        tables = (self.embed, *self.values)
        inside, gate = list(self.blocks.parameters()), list(self.gate.parameters()) if self.gate else []
        return {"matrix": [p for p in inside if p.ndim == 2], "scalar": [p for p in inside if p.ndim < 2] + [self.smear] + gate,
                "embedding": [table.weight for table in tables], "hashed": [self.bigram.weight, self.trigram.weight],
                "head": [self.head.weight]}

    def setup_optimizers(self, learning_rate=0.02, weight_decay=0.0):
        """[AdamW, Muon, RowAdagrad]. learning_rate is Muon's; the AdamW groups keep their ratio to it and shrink with width^-0.5."""
        roles = self.parameters_by_role()
        scale = (self.config.width / 768) ** -0.5
        adamw = AdamW([{"params": roles["embedding"], "lr": 10 * learning_rate * scale},
                       {"params": roles["scalar"], "lr": 0.5 * learning_rate},
                       {"params": roles["head"], "lr": 0.2 * learning_rate * scale}], betas=(0.8, 0.95))
        muon = Muon(roles["matrix"], lr=learning_rate, weight_decay=weight_decay)
        adagrad = RowAdagrad(roles["hashed"], lr=HASHED_RATE * learning_rate)
        optimizers = [adamw, muon, adagrad]
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["initial_lr"] = group["lr"]
        return optimizers

    def matmul_parameters(self):
        """How many weights a token is multiplied with: the matrices and the head, not the tables."""
        return sum(p.numel() for p in self.parameters_by_role()["matrix"]) + self.config.vocab_size * self.config.width

    def flops_per_token(self, T):
        """Training FLOPs a token, 6 a weight plus attention's 6 * depth * width * T (causal: half of 12)."""
        return 6 * self.matmul_parameters() + 6 * self.config.depth * self.config.width * T

    def new_kv_cache(self, slots, length):
        """An empty KVCache for this many sequences of up to `length` tokens each."""
        c, device = self.config, self.embed.weight.device
        head_dim = c.width // c.heads
        shape = slots, length, c.kv_heads, head_dim
        layers = [LayerCache(*shape, device, self.compute_dtype) for _ in self.blocks]
        return LookupCache(layers, slots, length, self.reach, device)

    def prefill(self, idx, kv_cache, slots, lengths):
        """Read prompts into slots of the cache, all positions at once.

        idx (n, T): prompts of these lengths, padded at the end. slots, lengths: lists of n ints.
        Returns float32 logits (n, V) at each prompt's last token. The caller advances the slots.
        """
        x, tokens = self.features(idx, kv_cache, slots)
        last = torch.arange(len(lengths)), torch.tensor(lengths) - 1  # of each prompt
        return self.logits(x[last], tokens[last])

    def decode(self, idx, kv_cache):
        """One token more in every slot: idx (S, 1) -> float32 logits (S, V).

        The caller advances the slots that are not idle.
        """
        x, tokens = self.features(idx, kv_cache)
        return self.logits(x[:, 0], tokens[:, 0])

    def cast_for_inference(self, dtype):
        """Compute in dtype from now on, and cast the matrices of blocks and head to it once.

        The forward pass would cast them each time, to the same values. Embeddings and other tables,
        scalars and the gate stay float32. Not for training: the float32 weights are gone.
        """
        self.compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.data = module.weight.data.to(dtype)


class SoftcapCrossEntropy(torch.autograd.Function):
    """Cross-entropy of softcap * tanh(x W^T / softcap), in chunks of rows; gradients are computed in the forward pass.

    The logits of a whole batch are the largest tensor of a small model. A chunk of them stays in cache, gives its share
    of the loss and of both gradients at once, and is gone (the idea of Cut Cross-Entropy, arXiv 2411.09009, and of
    Liger Kernel, arXiv 2410.10989). With z' = c tanh(z / c) and p = softmax(z'):

        dL/dz = (p - onehot) * (1 - (z' / c)^2)

    With log_weight (N,), the log of the network's weight in a mixture, and others (N,), what the others give the target, the
    loss is -log m with m = weight * p[target] + others, and dL/dz is multiplied by 1 + weight * p[target] / m: by the mixture's
    share and, for the network's own loss, by 1.
    """
    CHUNK = 1 << 20  # logits at a time, 4 MB; at least 128 rows, for each chunk adds to the whole of the head's gradient

    @staticmethod
    def forward(ctx, x, weight, targets, cap, reduction, log_weight=None, others=None):
        N, V = x.size(0), weight.size(0)
        w = weight.to(x.dtype)
        wants_grad = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]) and reduction == "sum"
        losses = torch.empty(N, dtype=torch.float32, device=x.device)
        shares = torch.zeros_like(losses)  # the network's, of the mixture
        dx = torch.empty_like(x) if wants_grad else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if wants_grad else None
        rows = max(128, (SoftcapCrossEntropy.CHUNK if x.device.type == "cpu" else 1 << 28) // V)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            t = x[part] @ w.T
            t = t.float().div_(cap).tanh_()
            z = t * cap
            valid = targets[part] >= 0
            label = targets[part].clamp(min=0)[:, None]
            lse = z.logsumexp(-1, keepdim=True)
            loss = (lse - z.gather(1, label))[:, 0]
            if others is not None:
                own = log_weight[part] - loss
                loss = -torch.log(own.exp() + others[part])
                shares[part] = (own + loss).exp()
            losses[part] = torch.where(valid, loss, 0.0)
            if wants_grad:
                g = z.sub_(lse).exp_()
                g.scatter_add_(1, label, torch.full_like(lse, -1.0))
                g.mul_(t.square_().neg_().add_(1)).mul_((valid * (1 + shares[part]))[:, None])
                g = g.to(x.dtype)
                dx[part] = g @ w
                dw.addmm_(g.float().T, x[part].float()) if x.device.type == "cpu" and x.dtype == torch.float32 else dw.add_(g.T @ x[part])
        if wants_grad:
            mixed = (-shares, -losses.exp()) if others is not None else ()
            ctx.save_for_backward(dx, dw, *(d * (targets >= 0) for d in mixed))
        return losses.sum() if reduction == "sum" else losses

    @staticmethod
    def backward(ctx, grad):
        dx, dw, *mixed = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dw * grad, None, None, None, *([d * grad for d in mixed] or (None, None))
