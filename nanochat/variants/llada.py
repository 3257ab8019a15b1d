"""LLaDA: a language model that fills in masked tokens, in any order (arXiv 2502.09992).

Training hides a share p of the tokens behind <|mask|> and asks for them, all at once, from what is
left on both sides. With p drawn uniformly and each cross-entropy divided by p, the loss is an upper
bound on -log p(text). Generation fills in masks, the surest tokens first (diffusion_engine.py).
docs/llada.md says how it is trained, sampled and measured.

Several documents or conversations may share a row. Each begins with <|bos|>, which is never hidden
and never predicted: a token attends to its own document, from one <|bos|> to the next, and to
nothing else. So padding is <|bos|>, too, and no length of a batch changes what a sequence computes.
The first token of a row is given, so that T - 1 may be hidden. Shapes as in gpt.py.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.attention import masked_attention
from nanochat.common import UserError
from nanochat.gpt import GPT, Attention, Block, Flops, GPTConfig, norm, take
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.variants.likelihood_bound import bound_of

MIN_SHARE = 1e-3        # of the tokens that are hidden: p = (1 - MIN_SHARE) t + MIN_SHARE
SHORTER_BATCHES = 0.01  # share of pretraining's micro-batches whose documents are cut shorter


@dataclass
class LLaDAConfig(GPTConfig):
    """bos_token, mask_token: their ids; 0: where the tokenizer puts them, mask_token last."""
    bos_token: int = 0
    mask_token: int = 0

    def __post_init__(self):
        first = self.vocab_size - len(SPECIAL_TOKENS)
        self.bos_token = self.bos_token or first + SPECIAL_TOKENS.index("<|bos|>")
        self.mask_token = self.mask_token or first + SPECIAL_TOKENS.index("<|mask|>")
        assert self.mask_token == self.vocab_size - 1  # so that the head can do without it


def uniform_numbers(rng, shape, device):
    """Numbers in [0, 1) of a numpy generator, float32: the same on every device."""
    return torch.from_numpy(rng.random(shape, dtype=np.float32)).to(device)


class BidirectionalAttention(Attention):
    """Attention in both directions, to what is visible (B, 1, T, T): the same document."""

    def forward(self, x, cos, sin, visible, at=None):
        q, k, v = self.project(x, at)
        q, k = self.place(q, take(cos, at), take(sin, at)), self.place(k, cos, sin)
        if at is not None:
            visible = take(visible[:, 0], at)[:, None]
        return self.out(masked_attention(q, k, v, visible).flatten(2))


class LLaDABlock(Block):
    """A block without a cache: what stands later changes what stands before it."""
    attention_class = BidirectionalAttention

    def forward(self, x, cos, sin, layer_cache=None, window=None, at=None, *, visible):
        x = take(x, at) + self.attention(norm(x), cos, sin, visible, at)
        return x + self.mlp(norm(x))


class LLaDAGPT(GPT):
    """GPT that predicts what stands at masked positions.

    There is no shift: targets[b, t] of forward() is the token at position t itself. draws: of the
    bound on the likelihood, for each sequence.
    """
    config_class = LLaDAConfig
    block_class = LLaDABlock
    causal = False
    val_bpb_name = "val_bpb_bound"
    end_padding = 32
    draws = 4  # of the bound, of each sequence: enough where many are summed

    def head_weight(self):
        """The head without <|mask|>, the last token, which is never predicted: (V - 1, C)."""
        return self.head.weight[:self.config.mask_token]

    def documents(self, idx):
        """Which document of its row each token is of: (B, T), numbers from 0 to T."""
        return (idx == self.config.bos_token).cumsum(1)

    def block_inputs(self, idx, x):
        number = self.documents(idx)[:, None]
        visible = number[..., None] == number[:, :, None]  # B, 1, T, T
        return [{"visible": visible}] * len(self.blocks)

    def new_kv_cache(self, slots, length):
        raise UserError("a diffusion model has no KV cache: use engine_of() of diffusion_engine.py")

    @property
    def max_targets(self):
        return self.config.max_seq_len - 1

    def flops(self, T):
        """All pairs of positions are computed."""
        weights, _, square = super().flops(T)
        return Flops(weights, square, square)

    # -------------------------------------------------------------------------------- training

    def noised(self, micro_batches, step, rank, is_text=False):
        """Micro-batches (noisy inputs, hidden tokens as targets, weights 1 / p), each (B, T).

        Hidden may be what the loader made a target, one position on: of a conversation the answer
        with the padding behind its end, of a text all but the first token of a row and <|bos|>.
        """
        rng = np.random.default_rng((step, rank))
        found = []
        for inputs, targets, *_ in micro_batches:
            if is_text and rng.random() < SHORTER_BATCHES:
                inputs = self.cut_shorter(inputs, rng)
            may_hide = F.pad(targets[:, :-1] >= 0, (1, 0)) & (inputs != self.config.bos_token)
            found.append(self.hide(inputs, may_hide, rng))
        return found

    def cut_shorter(self, inputs, rng):
        """Rows (B, T) as several of a random length: <|bos|> overwrites the first token of each.

        So a row keeps its shape, which compiled blocks need, and no computation is lost.
        """
        length = int(rng.integers(1, inputs.size(1) + 1))
        inputs = inputs.clone()
        inputs[:, ::length] = self.config.bos_token
        return inputs

    def hide(self, ids, may_hide, rng):
        """(noisy ids, targets, weights) of ids (B, T). Each document has its own t ~ U(0, 1) and p,
        and each of its tokens in may_hide is hidden with probability p (algorithm 1)."""
        B, T = ids.shape
        t = uniform_numbers(rng, (B, T + 1), ids.device)
        p = (1 - MIN_SHARE) * t + MIN_SHARE
        p = p.gather(1, self.documents(ids))
        hidden = may_hide & (uniform_numbers(rng, (B, T), ids.device) < p)

        noisy = ids.masked_fill(hidden, self.config.mask_token)
        targets = ids.masked_fill(~hidden, -1)
        return noisy, targets, hidden / p

    def loss(self, x, recent, targets, weights):
        """As in GPT; <|mask|> is no target. On a CPU what was not hidden gets no logits."""
        weights = weights * (targets != self.config.mask_token)
        targets = targets.clamp(max=self.config.mask_token - 1)
        if x.device.type == "cpu":
            hidden = weights != 0
            x = x[hidden][None]
            targets = targets[hidden][None]
            weights = weights[hidden][None]
        return super().loss(x, recent, targets, weights)

    # -------------------------------------------------------------------------------- likelihood

    def log_probs(self, inputs, targets):
        """Of each target its part in a lower bound on their log-probability, (B, T): bound_of().

        inputs (B, T), targets (B, T) as a causal model has them: the tokens after each input.
        """
        return bound_of(self, inputs, targets, self.draws)

    @torch.inference_mode()
    def next_token_logits(self, prompts):
        """As in GPT: of one masked token behind each prompt, (n, V - 1)."""
        prompts = [prompt[-self.max_targets:] for prompt in prompts]
        mask, padding = [self.config.mask_token], [self.config.bos_token]
        longest = max(map(len, prompts))
        rows = [prompt + mask + padding * (longest - len(prompt)) for prompt in prompts]
        at = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        x, recent = self.features(torch.tensor(rows, device=self.device), at=at)
        return self.logits(x[:, 0], recent)
