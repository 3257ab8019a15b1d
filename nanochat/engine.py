"""Generation: a prompt is read once into a cache, then one token a step for every row, each row with its own generator.

Rows of a batch start at different lengths and end at different times; each keeps its own position in the cache. When a
row closes a Python call, the engine runs the expression and feeds the tool's reply into that row, token by token.
"""
import torch

from nanochat.common import UserError
from nanochat.conversation import SHOWN
from nanochat.execution import use_tool
from nanochat.tokenizer import StreamDecoder


def sample(logits, temperature, top_k, generator):
    """One token id from logits (V,). Temperature 0 is greedy."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        values, ids = logits.topk(min(top_k, logits.numel()))
    else:
        values, ids = logits, torch.arange(logits.numel(), device=logits.device)
    probabilities = torch.softmax((values.float() - values.max()) / temperature, -1).cpu()
    return int(ids[int(torch.multinomial(probabilities, 1, generator=generator))])


def check_sampling(temperature, top_k, max_new_tokens):
    """UserError for values that sample nothing."""
    if not temperature >= 0 or top_k < 0 or max_new_tokens < 1:
        raise UserError(f"temperature={temperature}, top_k={top_k}, max_tokens={max_new_tokens}: the first two must not be negative "
                        "(0: the likeliest token; all tokens), and the last must be at least 1")


class Row:
    """One sequence under way: its generator, what it said, and the tool reply that is still to be fed in."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens, self.forced, self.call, self.finish_reason = [], [], None, None


class Engine:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len = model.config.max_seq_len
        self.device = model.embed.weight.device

    def _read(self, prompt):
        ids = self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id()) if isinstance(prompt, str) else list(prompt)
        if not prompt:
            raise UserError("the prompt is empty: say something")
        if len(ids) >= self.max_seq_len:
            raise UserError(f"the prompt has {len(ids)} tokens, the context holds {self.max_seq_len}: shorten it")
        return ids

    @torch.inference_mode()
    def steps(self, prompts, max_new_tokens=256, temperature=1.0, top_k=50, seed=42):
        """prompts: list of lists of ids. Yields after each step the list of Rows; a Row is over when finish_reason is set.

        The same prompt and seed give the same tokens alone and in a batch: every row has a generator of its own.
        """
        check_sampling(temperature, top_k, max_new_tokens)
        prompts = [self._read(p) for p in prompts]
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        rows = [Row(seed) for _ in prompts]
        total = min(self.max_seq_len, int(lengths.max()) + max_new_tokens)
        cache = self.model.new_cache(len(prompts), total)
        padded = torch.tensor([p + [0] * (int(lengths.max()) - len(p)) for p in prompts], device=self.device)
        x, tokens = self.model.features(padded, cache)
        cache.lengths = lengths.clone()  # what lies behind a shorter row is overwritten before it is ever seen
        last = torch.arange(len(rows)), lengths - 1
        logits = self.model.logits(x[last], tokens[last])
        while True:
            for i, row in enumerate(rows):
                if row.finish_reason is None:
                    self._advance(row, logits[i], temperature, top_k)
                    full = len(prompts[i]) + len(row.tokens) >= self.max_seq_len
                    if row.finish_reason is None and (full or len(row.tokens) >= max_new_tokens):
                        row.finish_reason = "length"
            yield rows
            if all(row.finish_reason for row in rows):
                return
            x, tokens = self.model.features(torch.tensor([[row.tokens[-1]] for row in rows], device=self.device), cache)
            logits = self.model.logits(x[:, 0], tokens[:, 0])
            done = torch.tensor([row.finish_reason is not None for row in rows], device=self.device)
            cache.lengths = torch.where(done, cache.lengths - 1, cache.lengths)  # a finished row stands still

    def _advance(self, row, logits, temperature, top_k):
        """Give `row` its next token: forced by the tool, or sampled."""
        special = self.tokenizer.encode_special
        token = row.forced.pop(0) if row.forced else sample(logits, temperature, top_k, row.generator)
        row.tokens.append(token)
        if token in (special("<|assistant_end|>"), special("<|bos|>")):
            row.finish_reason = "stop"
        elif token == special("<|python_start|>"):
            row.call = []
        elif token == special("<|python_end|>") and row.call is not None:
            reply = use_tool(self.tokenizer.decode(row.call))
            row.call = None
            if reply is not None:
                row.forced = [special("<|output_start|>"), *self.tokenizer.encode(reply), special("<|output_end|>")]
        elif row.call is not None:
            row.call.append(token)

    def generate_batch(self, prompts, **options):
        """prompts: list of lists of ids -> list of lists of new ids (the closing token included)."""
        for rows in self.steps(prompts, **options):
            pass
        return [row.tokens for row in rows]

    def stream(self, prompt, max_new_tokens=256, temperature=1.0, top_k=50, seed=42):
        """A Stream of text pieces that continue `prompt` (text, or ids of a rendered conversation)."""
        return Stream(self, self._read(prompt), max_new_tokens, temperature, top_k, seed)

    def generate(self, prompt, max_new_tokens=256, temperature=1.0, top_k=50, seed=42):
        """The continuation of `prompt` (text or ids) as text."""
        return "".join(self.stream(prompt, max_new_tokens, temperature, top_k, seed))


class Stream:
    """Iterate for pieces of text. finish_reason is None until the end, then "stop" or "length"."""

    def __init__(self, engine, ids, max_new_tokens, temperature, top_k, seed):
        self.prompt_tokens, self.completion_tokens, self.finish_reason = len(ids), 0, None
        self._decoder = StreamDecoder(engine.tokenizer)
        self._shown = {engine.tokenizer.encode_special(name): text for name, text in SHOWN.items()}
        self._steps = engine.steps([ids], max_new_tokens, temperature, top_k, seed)

    def __iter__(self):
        for (row,) in self._steps:
            self.completion_tokens, token = len(row.tokens), row.tokens[-1]
            piece = self._decoder.flush() + self._shown[token] if token in self._shown else self._decoder.feed(token)
            if row.finish_reason:
                piece += self._decoder.flush()
                self.finish_reason = row.finish_reason
            yield piece  # often "": whoever reads learns that a step is over, and may leave
