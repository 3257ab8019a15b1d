"""Generation with a diffusion model: blocks of masks that are filled in, the surest tokens first.

    engine = engine_of(model, tokenizer)        # an Engine, or for such a model a DiffusionEngine
    for piece in engine.stream(ids, seed=7): ...

A DiffusionEngine has the methods of an Engine and the same callers. Its step() is one forward pass
for all running sequences, in which each decides a few more tokens of its block. A block begins as
<|mask|> and nothing else behind the prompt and the blocks before it (semi-autoregressive sampling,
arXiv 2502.09992, section 2.4). Each pass predicts all masks at once, commits the most confident
predictions and leaves the others masked (low-confidence remasking). What was committed is not
changed, unless the block is edited at its end. A whole block is then handed out: text comes a block
at a time. A block that has its end, or a call of the tool, with no mask before it, is complete.

There is no KV cache: a token that is committed changes the keys of those before it. So a pass
computes the whole sequence, and an answer takes as many passes as it has blocks times steps. Of the
last layer and of the head only the masks are computed.
"""
import math
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.common import UserError
from nanochat.engine import Engine, serving_engine
from nanochat.sampling import NonFiniteError

SEED_BITS = 63
# Tokens of a forward pass at most, with the padding: on a CPU a few sequences of about the same
# length use its cores and caches as well as many, with less padding (dev/LOG.md).
PASS_TOKENS = {"cpu": 2048}
# Options of a sequence that need a left-to-right factorisation, with the values that ask for
# nothing: penalties count what came before, and there is no probability of a token after those
# before it.
REFUSED = {
    "logprobs": None,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
}


class Denoising(NamedTuple):
    """How blocks are filled in.

    block_length    tokens of a block
    steps           forward passes for a whole block, in which equal numbers of tokens are decided;
                    None: one token in each
    edit_below      once a block is full, tokens that were committed with less confidence are masked
                    again and replaced by what is predicted now, from both sides; 0: none
    """
    block_length: int = 32
    steps: int = None
    edit_below: float = 0.0

    def check(self):
        """UserError for values with which nothing can be sampled."""
        if self.block_length < 1 or (self.steps is not None and self.steps < 1):
            raise UserError(
                f"block_length={self.block_length}, steps={self.steps}: both must be at least 1")
        if not 0 <= self.edit_below <= 1:
            raise UserError(f"edit_below={self.edit_below}: it must be from 0 to 1")


def denoising_of(model, **settings):
    """The Denoising of settings, of which None stands for the usual value.

    UserError for bad values, and for any with a model that has no blocks to fill in.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if given and model.causal:
        raise UserError(f"{', '.join(given)}: only a diffusion model has it; leave it out")
    denoising = Denoising(**given)
    denoising.check()
    return denoising


class Block:
    """A block that is being filled in: K tokens, of which some are still <|mask|>.

    ids             (K,) int64, on the CPU
    confidence      (K,) float64, of each committed token when it was committed
    step            passes so far
    is_edited       whether tokens of low confidence have been masked again
    """

    def __init__(self, length, mask_token, denoising, seed):
        self.ids = torch.full((length,), mask_token)
        self.confidence = torch.zeros(length, dtype=torch.float64)
        self.mask_token = mask_token
        self.denoising = denoising
        self.seed = seed
        self.step = 0
        self.is_edited = denoising.edit_below == 0

    @property
    def is_masked(self):
        return self.ids == self.mask_token

    @property
    def masks(self):
        """The positions in the block that are masked, (m,) int64."""
        return self.is_masked.nonzero()[:, 0]

    def tokens_of_step(self):
        """How many tokens this pass commits: equal numbers, the first passes one more if need be.

        >>> block = Block(32, 0, Denoising(steps=5), seed=1)
        >>> block.tokens_of_step()
        7
        """
        length = len(self.ids)
        steps = min(self.denoising.steps or length, length)
        if self.step >= steps:
            return length   # what was masked again is replaced in one pass
        return length // steps + (self.step < length % steps)

    def most_confident(self, confidence):
        """Which of the m masks this pass commits, by their confidence (m,): indices, best first."""
        count = min(self.tokens_of_step(), len(confidence))
        return confidence.topk(count).indices

    def generator(self, device):
        """The generator of this pass's noise: a pass that was interrupted repeats it."""
        return torch.Generator(device).manual_seed((self.seed + self.step) % 2**SEED_BITS)

    def commit(self, tokens, confidence):
        """Decide the most confident of the masks. tokens, confidence (m,): of the m masks."""
        best = self.most_confident(confidence)
        places = self.masks[best]
        self.ids[places] = tokens[best]
        self.confidence[places] = confidence[best]
        self.step += 1
        if not self.is_edited and not self.is_masked.any():
            self.is_edited = True
            self.ids[self.confidence < self.denoising.edit_below] = self.mask_token


def propose(logits, sampling, generator):
    """A token for each of m positions, (m,), and the model's confidence in it, (m,) float64.

    logits (m, V). The confidence is the token's probability, whatever the temperature. The
    likeliest token after Gumbel noise was added is a sample of the softmax; in float32 the noise
    would favour likely tokens (arXiv 2409.02908), so all of this is in float64.
    """
    logits = logits.double()
    probs = logits.softmax(-1)
    if not sampling.is_greedy:
        logits = kept(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        logits = logits + gumbel_noise(logits, generator)
    tokens = logits.argmax(-1)
    return tokens.cpu(), probs.gather(1, tokens[:, None])[:, 0].cpu()


def gumbel_noise(like, generator):
    """Gumbel noise in float64 for each of the logits `like` (m, V)."""
    uniform = torch.rand(like.shape, dtype=torch.float64, device=like.device, generator=generator)
    return -(-uniform.log()).log()


def kept(logits, top_k, top_p):
    """logits (m, V), -inf where a token is not among the top k or not in the nucleus of top_p."""
    if 0 < top_k < logits.size(1):
        edge = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p     # (m, V), the likeliest first
        logits = logits.masked_fill(outside.gather(1, order.argsort(-1)), -math.inf)
    return logits


class DiffusionEngine(Engine):
    """An Engine of a model that fills in masks. One thread at a time may call it.

    max_slots   None, or how many sequences run at a time; the others wait
    denoising   a Denoising
    blocks      {sequence: the Block that it is at}
    """

    def __init__(self, model, tokenizer, passages=None, max_slots=None, denoising=Denoising()):
        super().__init__(model, tokenizer, passages)
        if max_slots is not None and max_slots < 1:
            raise UserError(f"max_slots={max_slots}: it must be at least 1")
        assert tokenizer.encode_special("<|mask|>") == model.config.mask_token
        denoising.check()
        self.max_slots = max_slots
        self.denoising = denoising
        self.blocks = {}

    def new_sequence(self, prompt, **options):
        """As Engine.new_sequence(). UserError for what a diffusion model cannot do."""
        sequence = super().new_sequence(prompt, **options)
        for name, harmless in REFUSED.items():
            if getattr(sequence.sampling, name) != harmless:
                raise UserError(f"{name} is not supported: {WHY_REFUSED}")
        if sequence.prompt_logprobs is not None:
            raise UserError(f"logprobs of a prompt are not supported: {WHY_REFUSED}")
        return sequence

    # --------------------------------------------------------------------------------------------
    # what Engine.admit(), step() and retire() do otherwise

    def _assign_slots(self):
        """Let waiting sequences run, the first admitted first."""
        while self.waiting and len(self.running) != self.max_slots:
            sequence = self.waiting.pop(0)
            sequence.slot = next(slot for slot in range(1 + len(self.running))
                                 if slot not in self.running)
            sequence.status = "running"
            self.running[sequence.slot] = sequence

    def _free_slot(self, sequence):
        sequence.slot = None
        self.blocks.pop(sequence, None)

    @torch.inference_mode()
    def _step(self):
        self._assign_slots()
        sequences = list(self.running.values())
        if not sequences:
            return []

        # 1. one forward pass; sequences advance behind it, so that one that fails can be repeated
        for sequence in sequences:
            if sequence not in self.blocks:
                self.blocks[sequence] = self._new_block(sequence)
        proposed = self._propose(sequences)

        # 2. commit, and hand out the blocks that are complete
        moved = []
        for sequence, (tokens, confidence) in zip(sequences, proposed):
            if not confidence.isfinite().all():
                sequence.error = NonFiniteError()
                sequence.finish_reason = "error"
                self.retire(sequence)
                moved.append(sequence)
                continue
            block = self.blocks[sequence]
            block.commit(tokens, confidence)
            if self._is_complete(sequence, block):
                del self.blocks[sequence]
                self._hand_out(sequence, block.ids.tolist())
                moved.append(sequence)
        return moved

    def _new_block(self, sequence):
        """The next Block of a sequence; its last one ends where the answer must."""
        room = sequence.max_new_tokens - len(sequence.tokens)
        length = min(self.denoising.block_length, room)
        seed = sequence.generator.getrandbits(SEED_BITS)
        return Block(length, self.model.config.mask_token, self.denoising, seed)

    def _propose(self, sequences):
        """(tokens (m,), confidence (m,)) for the m masks in the block of each sequence."""
        proposed = {}
        for some in self._passes(sequences):
            for sequence, logits in zip(some, self._mask_logits(some)):
                proposed[sequence] = self._proposal(sequence, logits)
        return [proposed[sequence] for sequence in sequences]

    def _passes(self, sequences):
        """The sequences as lists, each of which shares a forward pass and is padded to its longest.
        """
        most = PASS_TOKENS.get(self.device.type, math.inf)
        together = []
        for sequence in sorted(sequences, key=self._length):
            if not together or self._length(sequence) * (len(together[-1]) + 1) > most:
                together.append([])
            together[-1].append(sequence)
        return together

    def _length(self, sequence):
        """Tokens of a sequence with the block that it is at."""
        return len(sequence.prompt) + len(sequence.tokens) + len(self.blocks[sequence].ids)

    def _proposal(self, sequence, logits):
        """(tokens (m,), confidence (m,)) for the m masks of a sequence, of its logits (m, V)."""
        generator = self.blocks[sequence].generator(logits.device)
        return propose(logits, sequence.sampling, generator)

    def _mask_logits(self, sequences):
        """The logits (m, V) of the m masks in the block of each sequence, in one forward pass."""
        # <|bos|> behind a shorter sequence is a document of its own: nothing attends to it
        whole = []
        for sequence in sequences:
            whole.append(sequence.prompt + sequence.tokens + self.blocks[sequence].ids.tolist())
        longest = max(map(len, whole))
        padding = self.tokenizer.get_bos_token_id()
        idx = torch.tensor([ids + [padding] * (longest - len(ids)) for ids in whole])

        # the last layer is computed for the masks alone; 0 stands beside those of a shorter list
        masks = []
        for sequence in sequences:
            start = len(sequence.prompt) + len(sequence.tokens)
            masks.append(start + self.blocks[sequence].masks)
        at = pad_sequence(masks, batch_first=True)
        x, recent = self.model.features(idx.to(self.device), at=at.to(self.device))
        logits = self.model.logits(x, recent)
        if logits.device.type == "mps":
            logits = logits.cpu()   # it has no float64
        return [own[:len(places)] for own, places in zip(logits, masks)]

    def _is_complete(self, sequence, block):
        """Whether nothing of a block is still to be decided, up to where the answer, or the model's
        turn, ends in it. An edited block is always filled in to its end."""
        in_call = sequence.call is not None
        special = self.tokenizer.encode_special
        edits = self.denoising.edit_below > 0
        for token in block.ids.tolist():
            if token == block.mask_token:
                return False
            ends_call = in_call and token == special("<|python_end|>")
            ends = ends_call or self._is_stop(sequence, token)
            if ends and not edits:
                return True
            in_call = not ends_call and (in_call or token == special("<|python_start|>"))
        return True

    def _hand_out(self, sequence, ids):
        """Append the tokens of a complete block, up to the end of the answer.

        What stands behind a call was written without the tool's reply: the reply takes its place,
        and the next block begins behind that.
        """
        for token in ids:
            in_call = sequence.call is not None
            self._append(sequence, token, None)
            if sequence.finish_reason or (in_call and sequence.call is None):
                break
        while sequence.forced and not sequence.finish_reason:
            self._append(sequence, sequence.forced[0], None)


WHY_REFUSED = "a diffusion model writes its tokens in any order, and has no next one"


# ------------------------------------------------------------------------------------------------
# which engine

def engine_of(model, tokenizer, passages=None, denoising=Denoising(), max_slots=None):
    """The engine that can run a model: an Engine, or a DiffusionEngine with this Denoising."""
    if model.causal:
        return Engine(model, tokenizer, passages, max_slots)
    return DiffusionEngine(model, tokenizer, passages, max_slots, denoising)


def serving_engine_of(
    model,
    tokenizer,
    passages,
    max_slots,
    weights="",
    compile=True,
    denoising=Denoising(),
):
    """As serving_engine(), for any model. UserError for weights of 8 bits of a diffusion model."""
    if model.causal:
        return serving_engine(model, tokenizer, passages, max_slots, weights, compile)
    if weights:
        raise UserError(f"weights={weights} is for models that decode a token at a time, "
                        "which a diffusion model does not: leave it out")
    return DiffusionEngine(model, tokenizer, passages, max_slots, denoising)
