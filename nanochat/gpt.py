"""The GPT: rotary positions, QK norm, ReLU-squared MLP, RMSNorm without gains, softcapped logits.

One dial: depth. The width is 64 * depth, the heads have 128 dimensions (64 in small models), and
the rest follows. At depth 20 and a vocabulary of 65,536 this is the documented model of 561 M
parameters; a test holds it to transformers' NanoChatForCausalLM.

A variant (nanochat/variants/) is a subclass that overrides class attributes (`config_class`,
`block_class`, and the block's `attention_class` and `mlp_class`) or methods: `recent_tokens`,
`enter`, `block_inputs` and `leave` around the blocks; `logits`, `loss` and `target_log_probs`
together, for they say the same prediction in three ways; `noised` and `log_probs` where it is
trained by undoing noise; and `init_weights` wherever it has
parameters of its own, for models are built without initialisers. A module with parameters says in
its table `roles` how they are trained. Nothing here knows which variants exist.

This file is single-device code: compiling, sharding and communication are applied from outside
(parallel.py), and blocks are run through `__call__`, so that hooks see every forward pass.

Shapes: B sequences, T tokens, C width, H query heads, G key/value heads, D head dimension,
V vocabulary, N = B * T.
"""
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adamw import AdamW
from nanochat.attention import attention_up_to, cached_attention, windowed_attention
from nanochat.common import UserError
from nanochat.kv_cache import KVCache, LayerCache
from nanochat.loss import softcap, softcap_cross_entropy, token_log_probs
from nanochat.muon import Muon


@dataclass
class GPTConfig:
    """The shape of a model; a checkpoint's meta file holds exactly these fields."""
    depth: int = 20
    width: int = 1280
    heads: int = 10
    kv_heads: int = 10
    vocab_size: int = 65536
    max_seq_len: int = 2048
    softcap: float = 15.0
    rotary_base: float = 10000.0

    @classmethod
    def from_depth(cls, depth, vocab_size, max_seq_len, kv_heads=None, width=None, heads=None,
                   **more):
        """The documented shape of a depth, but for the fields that are given.

        The head dimension is 128 from depth 12 on if it divides the width, else 64. UserError where
        the heads do not divide the width into even head dimensions, or kv_heads the heads.
        """
        width = width or 64 * depth
        wide_heads = depth >= 12 and width % 128 == 0
        heads = heads or max(1, width // (128 if wide_heads else 64))
        if width % (2 * heads):
            raise UserError(
                f"heads={heads} must divide width={width} into an even number of dimensions each")
        if kv_heads and heads % kv_heads:
            raise UserError(
                f"kv_heads={kv_heads} must divide the {heads} query heads of depth {depth}")
        return cls(depth, width, heads, kv_heads or heads, vocab_size, max_seq_len, **more)

    @property
    def head_dim(self):
        return self.width // self.heads

    @property
    def rotary_dim(self):
        """How many dimensions of queries and keys the rotary embedding turns."""
        return self.head_dim


def norm(x):
    """RMSNorm over the last dimension, without gains (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864), halves layout.

    x (B, T, H, D); cos and sin (B or 1, T, 1, D/2) -> (B, T, H, D).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def require_causal(model, purpose):
    """UserError where a model does not predict from left to right. purpose: what needs that."""
    if not model.causal:
        raise UserError(
            f"{purpose} needs the likelihood of each token after those before it, which a "
            "diffusion model does not have (docs/llada.md): take another model")


def take(x, at):
    """x (B or 1, T, ...) at the positions `at` (B, n) -> (B, n, ...); None: x as it is."""
    if at is None:
        return x
    sequences = torch.arange(len(at), device=at.device)[:, None]
    return x.expand(len(at), *x.shape[1:])[sequences, at]


# ------------------------------------------------------------------------------------------------
# modules; `roles` says which optimizer trains each parameter (see OPTIMIZERS)

class Linear(nn.Linear):
    """A matrix without bias: float32 master weights, multiplied in the dtype of the activations."""
    roles = {"weight": "matrix"}

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Head(Linear):
    """The matrix from features to logits, (vocab_size_padded, C)."""
    roles = {"weight": "head"}


class Embedding(nn.Embedding):
    """A table with one row for each token."""
    roles = {"weight": "embedding"}


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and QK norm."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(config.width, config.heads * config.head_dim)
        self.k = Linear(config.width, config.kv_heads * config.head_dim)
        self.v = Linear(config.width, config.kv_heads * config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.width)
        self.training_window = None  # tokens that a token attends to in training; None: all

    def project(self, x, at=None):
        """x (B, T, C) -> q (B, T, H, D), or (B, n, H, D) at positions (B, n); k, v (B, T, G, D)."""
        B, T, _ = x.shape
        q = self.q(take(x, at)).view(B, -1, self.heads, self.head_dim)
        k = self.k(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v(x).view(B, T, self.kv_heads, self.head_dim)
        return q, k, v

    def place(self, q_or_k, cos, sin):
        """Rotate queries or keys to their positions and normalise them (QK norm)."""
        return norm(rotate(q_or_k, cos, sin))

    def forward(self, x, cos, sin, layer_cache=None, window=None, at=None, **more):
        """x (B, T, C) -> (B, T, C). With a layer_cache, x continues the sequences in it.

        at (B, n): the positions in x that attend, for a result of (B, n, C); None: all of them.
        """
        # 1. queries, keys and values of each head, at their positions
        q, k, v = self.project(x, at, **more)
        q, k = self.place(q, take(cos, at), take(sin, at)), self.place(k, cos, sin)
        # 2. attend to what is at or before each position
        if layer_cache is not None:
            y = cached_attention(q, k, v, layer_cache, window, at)
        elif at is not None:
            y = attention_up_to(q, k, v, at)
        else:
            y = windowed_attention(q, k, v, self.training_window if self.training else None)
        # 3. back to the residual stream
        return self.out(y.flatten(2))

    def new_layer_cache(self, slots, length, device, dtype):
        """An empty cache for this layer: what each attention keeps is its own business."""
        return LayerCache(slots, length, self.kv_heads, self.head_dim, device, dtype)


class MLP(nn.Module):
    """Two matrices around ReLU squared (arXiv 2109.08668)."""

    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention and MLP, each of the normalised residual stream and added to it."""
    attention_class = Attention
    mlp_class = MLP

    def __init__(self, config):
        super().__init__()
        self.attention = self.attention_class(config)
        self.mlp = self.mlp_class(config)

    def forward(self, x, cos, sin, layer_cache=None, window=None, at=None):
        """at (B, n): the positions that leave the block; None: all of them."""
        x = take(x, at) + self.attention(norm(x), cos, sin, layer_cache, window, at)
        return x + self.mlp(norm(x))


# ------------------------------------------------------------------------------------------------
# how parameters are trained
#
# To train one kind of parameter by another optimizer: (1) a torch.optim.Optimizer in a file of its
# own, like adamw.py, whose attribute `partition` says how ranks may cut its parameters
# (parallel.py) and whose state_of() makes the state of a parameter (optimizer_state.py); (2) a row
# in OPTIMIZERS, or in the table `optimizers` of the variant that alone has such parameters (see
# lookup.py); (3) that row's name as the role of the parameter, in the table `roles` of the module
# that owns it; (4) its bytes in memory.Group, where they are not those of Adam; (5) its layer in
# tests/test_imports.py and a reference implementation in tests/test_optimizers.py.

class Recipe(NamedTuple):
    """One row of the table below."""
    optimizer: type
    lr: float           # multiple of the matrices' learning rate
    by_width: bool      # whether the learning rate is scaled with (width / 768)^-0.5
    decays: bool        # whether --weight_decay applies
    options: dict       # further options of the parameter group


ADAMW = {"betas": (0.8, 0.95)}
OPTIMIZERS = {
    # role     optimizer  lr  by_width  decays  options
    "embedding": Recipe(AdamW, 10.0, True, False, ADAMW),
    "scalar": Recipe(AdamW, 0.5, False, False, ADAMW),
    "head": Recipe(AdamW, 0.2, True, False, ADAMW),
    "matrix": Recipe(Muon, 1.0, False, True, {}),
}


class Flops(NamedTuple):
    """Training FLOPs of a token by three conventions, so that shares of a peak can be compared."""
    weights: int    # of the weights alone: 6 N
    causal: int     # with attention to the positions up to a token's own, which is what is computed
    square: int     # with attention to all positions, as PaLM (arXiv 2204.02311) and nanochat count


class GPT(nn.Module):
    """The decoder: embedding, blocks, head.

        model = GPT(GPTConfig.from_depth(4, vocab_size=4096, max_seq_len=256))
        model.init_weights()
        logits = model(idx)                     # (B, T, V)
        loss = model(idx, targets)              # the sum of cross-entropies in nats
    """
    config_class = GPTConfig
    block_class = Block
    optimizers = OPTIMIZERS
    causal = True  # whether a prediction sees what is before it alone: what a KV cache and a
    #                left-to-right likelihood rest on. False: engine, bound and tasks are others
    val_bpb_name = "val_bpb"  # of bits per byte in records; of a bound on them another
    end_padding = None  # most padding tokens of an answer that are trained; None: no padding is
    lookback = 1  # tokens, up to and with the newest, that are looked at outside of attention
    compiles_logits = True  # whether torch can compile logits() for decoding

    def __init__(self, config):
        super().__init__()
        self.config = config
        # padded for the hardware; the padding is never predicted
        self.vocab_size_padded = 64 * math.ceil(config.vocab_size / 64)
        self.embed = Embedding(self.vocab_size_padded, config.width)
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config.depth))
        self.head = Head(config.width, self.vocab_size_padded)
        self.fast_head = None   # the FastLinear that replaces it in decoding (decoding.py)
        self.compute_dtype = torch.float32  # of the activations
        self.compile_loss = False  # parallel.prepare() sets it on a GPU,
        self.compiled_enter = None  # and this, to enter() compiled
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    # -------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def init_weights(self):
        """Set every value, so that a model built on the meta device is whole after this.

        embed                normal, std 1 (the embedding is normalised at once)
        q, k, v, up          uniform, std 1 / sqrt(width): uniform avoids outliers
        attention.out, down  zero: every block starts as the identity
        head                 normal, std .001: the first logits are flat
        cos, sin             the rotary table for max_seq_len
        """
        nn.init.normal_(self.embed.weight)
        nn.init.normal_(self.head.weight, std=0.001)
        self.init_blocks()
        self.build_rotary()

    def init_blocks(self):
        """The blocks' rows of the table in init_weights()."""
        bound = math.sqrt(3 / self.config.width)  # a uniform distribution's std is bound / sqrt(3)
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            for linear in (attention.q, attention.k, attention.v, mlp.up):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (attention.out, mlp.down):
                nn.init.zeros_(linear.weight)

    def build_rotary(self):
        """The table of rotary angles, (1, max_seq_len, 1, D/2) each, in float32."""
        device, half = self.device, self.config.rotary_dim // 2
        exponents = torch.arange(half, device=device, dtype=torch.float32) / half
        frequencies = self.config.rotary_base ** -exponents
        positions = torch.arange(self.config.max_seq_len, device=device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)  # T, D/2
        self.cos = angles.cos()[None, :, None]
        self.sin = angles.sin()[None, :, None]

    @property
    def device(self):
        return self.embed.weight.device

    def head_weight(self):
        """The head without its padding, (V, C)."""
        return self.head.weight[:self.config.vocab_size]

    def cast_for_inference(self, dtype):
        """Compute in `dtype`, and hold the matrices in it, so that no forward pass casts them."""
        self.compute_dtype = dtype
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.data = module.weight.data.to(dtype)
        return self

    # -------------------------------------------------------------------------------- forward

    def recent_tokens(self, idx, kv_cache=None, window=None):
        """What a variant looks up: the last tokens up to each position. None in the plain model."""

    def enter(self, idx, recent):
        """What happens before the first block: idx (B, T) -> (B, T, C)."""
        return norm(self.embed(idx).to(self.compute_dtype))

    def block_inputs(self, idx, x):
        """What each block gets besides the residual stream: a dict of keywords for each block."""
        return [{}] * len(self.blocks)

    def leave(self, x):
        """What happens after the last block."""
        return norm(x)

    def features(
        self, idx, kv_cache=None, slots=None, at=None, window=None, run_block=None,
    ):
        """idx (B, T) -> (x (B, T, C) after the last norm, the recent tokens or None).

        kv_cache, slots: idx continues these sequences of a cache (a list of B ints; None: all).
        at (B, n) int64: the positions in idx that are wanted, for results of (B, n, ...). The last
        block computes keys and values alone of the others: 2 of 12 C^2 multiplications a token.
        window: the CacheWindow of slots, where the caller has made it; None: it is made here.
        run_block: what runs a block in place of its forward pass, called as run_block(block, x,
        cos, sin, layer_cache, window, **more).
        """
        # 1. where the tokens stand: the rotary angles of each position
        T = idx.size(1)
        if kv_cache is None:
            if T > self.config.max_seq_len:
                raise UserError(
                    f"{T} tokens do not fit the context of {self.config.max_seq_len}")
            cos, sin = self.cos[:, :T], self.sin[:, :T]
            layer_caches = [None] * len(self.blocks)
        else:
            window = window or kv_cache.window(slots, T)
            cos, sin = self.cos[0, window.positions], self.sin[0, window.positions]  # B, T, 1, D/2
            layer_caches = kv_cache.layers

        # 2. through the blocks
        compiled = self.training and kv_cache is None
        enter = self.enter
        if compiled and self.compiled_enter:
            enter = self.compiled_enter
        recent = self.recent_tokens(idx, kv_cache, window)
        x = enter(idx, recent)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        inputs = self.block_inputs(idx, x)
        for block, layer_cache, more in zip(self.blocks, layer_caches, inputs):
            # _call_impl is __call__ (hooks included) without torch.compile: inference has many
            # shapes, and each would be compiled
            call = block if compiled else block._call_impl
            if run_block:
                call = functools.partial(run_block, block)
            if at is not None and block is self.blocks[-1]:
                more = {**more, "at": at}
            x = call(x, cos, sin, layer_cache, window, **more)
        if recent is not None:
            recent = take(recent, at)
        return self.leave(x), recent

    def forward(self, idx, targets=None, weights=None, kv_cache=None, slots=None):
        """idx (B, T) int64 -> float32 logits (B, T, V); with targets the loss, a 0-D tensor.

        targets (B, T): the tokens to predict; -1 is ignored. weights (B, T): what the
        cross-entropy of each target is multiplied with; None is 1 (fine-tuning masks, a diffusion
        model's 1/p and reinforcement learning's advantages are weights).
        The loss is the weighted sum, in nats; whoever wants a mean divides.
        kv_cache, slots: as in features(); the caller advances the slots. UserError where T exceeds
        the context.
        """
        x, recent = self.features(idx, kv_cache, slots)
        if targets is None:
            return self.logits(x, recent)
        if weights is None:
            weights = torch.ones_like(targets, dtype=torch.float32)
        weights = weights.float() * (targets >= 0)
        return self.loss(x, recent, targets.clamp(min=0), weights)

    def logits(self, x, recent):
        """x (..., C) -> float32 (..., V)."""
        if self.fast_head is None:
            z = F.linear(x, self.head_weight().to(x.dtype)).float()
        else:
            z = self.fast_head(x).float()
        return softcap(z, self.config.softcap)

    def loss(self, x, recent, targets, weights):
        """x (B, T, C), targets and weights (B, T) -> the weighted sum of cross-entropies, 0-D."""
        return softcap_cross_entropy(
            x.flatten(0, 1),
            self.head_weight(),
            targets.flatten(),
            weights.flatten(),
            self.config.softcap,
            self.compile_loss,
        )

    @torch.no_grad()
    def log_probs(self, idx, targets):
        """The log-probability of each target, (B, T) float32, in nats; 0 where the target is -1."""
        x, recent = self.features(idx)
        found = self.target_log_probs(x, recent, targets.clamp(min=0))
        return torch.where(targets >= 0, found, 0.0)

    def log_probs_of_both(self, idx, targets):
        """(log_probs(), those of the network alone): the same, but where counts are mixed in."""
        found = self.log_probs(idx, targets)
        return found, found

    def target_log_probs(self, x, recent, targets):
        """x (B, T, C), targets (B, T) -> (B, T) log-probabilities of the targets."""
        flat = token_log_probs(
            x.flatten(0, 1), self.head_weight(), targets.flatten(), self.config.softcap)
        return flat.view(targets.shape)

    # -------------------------------------------------------------------------------- decoding

    def new_kv_cache(self, slots, length):
        """A KVCache for `slots` sequences of at most `length` tokens."""
        layers = [
            block.attention.new_layer_cache(slots, length, self.device, self.compute_dtype)
            for block in self.blocks
        ]
        return KVCache(layers, slots, self.device)

    def prefill(self, idx, kv_cache, slots, lengths):
        """Read prompts into slots of a cache, all positions at once.

        idx (n, T): prompts of these lengths, padded at the end. slots, lengths: lists of n ints.
        Returns the logits of the token after each prompt, (n, V). The caller advances the slots;
        the padding behind a prompt is overwritten before any query attends to it.
        """
        x, recent = self.features(idx, kv_cache, slots)
        last = torch.tensor(lengths, device=idx.device) - 1
        return self.logits_at(x, recent, last)

    def decode(self, idx, kv_cache, slots=None):
        """One more token in each slot: idx (n, 1) -> the logits of the next token, (n, V).

        slots: a list of n ints; None: all. The caller advances the slots that are not idle.
        """
        x, recent = self.features(idx, kv_cache, slots)
        first = torch.zeros(len(idx), dtype=torch.long, device=idx.device)
        return self.logits_at(x, recent, first)

    @torch.inference_mode()
    def next_token_logits(self, prompts):
        """The logits of the token after each of n prompts, lists of ids: (n, V).

        Of a prompt that is longer than the context the end is read.
        """
        prompts = [prompt[-self.config.max_seq_len:] for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
        kv_cache = self.new_kv_cache(len(prompts), max(lengths))
        idx = torch.tensor(padded, device=self.device)
        return self.prefill(idx, kv_cache, list(range(len(prompts))), lengths)

    def logits_at(self, x, recent, positions):
        """The logits at one position of each sequence: x (n, T, C), positions (n,) -> (n, V)."""
        sequences = torch.arange(len(x), device=x.device)
        if recent is not None:
            recent = recent[sequences, positions]
        return self.logits(x[sequences, positions], recent)

    # -------------------------------------------------------------------------------- training

    @property
    def max_targets(self):
        """How many tokens of a sequence the model can be asked to predict at most."""
        return self.config.max_seq_len

    def noised(self, micro_batches, step, rank, is_text=False):
        """What the model is trained on at a step: here the micro-batches of the loader as they are.

        micro_batches: list of (inputs (B, T), targets (B, T), state). is_text: whether they are cut
        from a stream of documents. A model that learns to undo noise adds it here, by random
        numbers that follow from the step and the rank alone, so that a resumed run has the same.
        """
        return micro_batches

    def parameters_by_role(self):
        """{role: [parameters]} after each module's table of roles; the roles partition them."""
        found = {role: [] for role in self.optimizers}
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                found[module.roles[name]].append(parameter)
        return found

    def setup_optimizers(self, learning_rate=0.02, weight_decay=0.0):
        """One optimizer of each class in the table `optimizers`, with a group for each role.

        (Muon makes a group of each shape.)

        learning_rate is that of the matrices (Muon); the others keep their ratio to it.
        weight_decay is of the roles whose recipe says that they decay.
        """
        width_scale = (self.config.width / 768) ** -0.5
        groups = {}
        for role, parameters in self.parameters_by_role().items():
            recipe = self.optimizers[role]
            lr = recipe.lr * learning_rate
            if recipe.by_width:
                lr *= width_scale
            group = {"params": parameters, "lr": lr, "initial_lr": lr, **recipe.options}
            if recipe.decays:
                group["weight_decay"] = weight_decay
            groups.setdefault(recipe.optimizer, []).append(group)
        return [optimizer(its_groups) for optimizer, its_groups in groups.items()]

    def set_training_window(self, window):
        """Let a token attend to so many tokens up to itself while training; None: to all.

        UserError where a variant has an attention of its own, which would not do so.
        """
        for block in self.blocks:
            if window and type(block.attention).forward is not Attention.forward:
                raise UserError(
                    f"curriculum: {type(self).__name__} has no windows of attention: leave the "
                    "third column of the table out")
            block.attention.training_window = window

    def for_chat(self):
        """The model with which the chat stages start: this one, or what a variant leaves of it."""
        return self

    def matmul_parameters(self):
        """How many weights a token is multiplied with: the matrices and the head, no tables."""
        matrices = 0
        for module in self.modules():
            if isinstance(module, Linear) and not isinstance(module, Head):
                matrices += module.weight.numel()
        return matrices + self.config.vocab_size * self.config.width

    def flops_per_token(self, T):
        """Training FLOPs of a token in a context of T, attention counted as it is: causal."""
        return self.flops(T).causal

    def flops(self, T):
        """The Flops of a token in a context of T: forward 2 and backward 4 for each weight, and
        6 * depth * width * T for causal attention, half of the 12 for every pair of positions.
        The width is that of all query heads together."""
        weights = 6 * self.matmul_parameters()
        attention_width = self.config.heads * self.config.head_dim
        attention = 6 * self.config.depth * attention_width * T
        return Flops(weights, weights + attention, weights + 2 * attention)
