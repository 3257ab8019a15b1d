"""The engine: generation for many sequences at once, each in a slot of the KV cache.

    engine = Engine(model, tokenizer)
    engine.generate("The capital of France is", temperature=0)     # text
    for piece in engine.stream(ids, seed=7): ...                   # pieces of text as they come
    engine.generate_batch(prompts, max_new_tokens=96)              # lists of ids

All three are callers of the same three methods, and so is the server:

    engine.admit(sequence)      # queue it
    engine.step()               # prefill what was admitted, else decode one token per sequence
    engine.retire(sequence)     # free its slot; step() does so by itself for a finished sequence

A prefill step reads whole prompts in one forward pass, padded to the longest; a prompt that several
sequences share has one prefill. A decode step feeds the last token of every running sequence and
samples the next, for all of them at once. Sequences start and end at any step, and each samples
with the random numbers of a generator seeded for it alone: it gets the same tokens alone and among
others.

When a sequence closes a Python call, the engine runs the expression (execution.py) and forces the
tool's reply into that sequence, token by token, instead of sampling. The call lookup() is answered
with what the user's own text says about the last question, where the engine was given its passages
(retrieval.py): the model decides whether to look up, the quote is exact.
"""
import random

import torch

from nanochat.common import UserError
from nanochat.conversation import LOOKUP_CALL, SHOWN
from nanochat.execution import use_tool
from nanochat.retrieval import reply_within
from nanochat.tokenizer import StreamDecoder


# ------------------------------------------------------------------------------------------------
# sampling

class NonFiniteError(UserError):
    """The model gave logits that are NaN or infinite: there is no next token."""

    status = 500    # of the server's answer: the request is not at fault

    def __init__(self):
        super().__init__(
            "the model's logits are not finite (NaN or infinite): its weights have diverged, or "
            "overflow in this dtype; take an earlier step, or --dtype=float32"
        )


UNIFORM_BITS = 24           # as many as float32 holds exactly
TINY_TEMPERATURE = 1e-30    # below it, float32 would divide by zero; it is greedy already


def check_finite(scores):
    """NonFiniteError where one of several scores, of which the best is wanted, is not finite."""
    if not scores.isfinite().all():
        raise NonFiniteError


def sample(logits, temperatures, top_ks, uniforms):
    """One token id for each of n sequences, a list of ints, from their logits (n, V).

    temperatures, top_ks, uniforms: a number for each sequence. Temperature 0 is greedy, top_k 0
    samples among all tokens. A uniform number in [0, 1) decides which token is sampled: it is the
    sequence's own, so that a sequence gets the same tokens alone and among others.
    NonFiniteError where a largest logit is no finite number; -inf for some tokens is fine.
    """
    # 1. the sequences that take the same path, which is one computation for all of them
    paths = {}
    for place, (temperature, top_k) in enumerate(zip(temperatures, top_ks)):
        path = "greedy" if temperature == 0 else top_k
        paths.setdefault(path, []).append(place)

    # 2. their tokens
    choices = [0] * len(logits)
    for path, places in paths.items():
        some = logits if len(paths) == 1 else logits[places]
        if path == "greedy":
            found = likeliest(some)
        else:
            own = [(temperatures[place], uniforms[place]) for place in places]
            found = draw(some, path, *zip(*own))
        for place, choice in zip(places, found):
            choices[place] = choice
    return choices


def likeliest(logits):
    """The id of the largest logit of each sequence, a list of ints. logits (n, V)."""
    values, choices = logits.max(-1)    # a NaN is the largest of all
    check_finite(values)
    return choices.tolist()


def draw(logits, top_k, temperatures, uniforms):
    """Sample an id for each sequence by the inverse of its distribution function.

    logits (n, V); top_k is one for all, temperatures and uniforms are n numbers.
    """
    ids = None
    if top_k and top_k < logits.size(1):
        logits, ids = logits.topk(top_k)
    numbers = torch.tensor([temperatures, uniforms], device=logits.device)  # 2, n
    temperature, uniform = numbers[:, :, None]

    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=TINY_TEMPERATURE)
    cumulated = torch.softmax(scaled, -1).cumsum(-1)
    total = cumulated[:, -1:]           # about 1; one NaN or infinity makes it NaN
    check_finite(total)

    # The first token at which the sum exceeds uniform * total. The uniform number has 24 bits, so
    # that float32 holds it exactly and the product stays below the total.
    choices = (cumulated <= uniform * total).sum(-1, keepdim=True)  # n, 1
    if ids is not None:
        choices = ids.gather(1, choices)
    return choices[:, 0].tolist()


def check_sampling(temperature, top_k, max_new_tokens):
    """UserError for values with which nothing can be sampled."""
    if temperature >= 0 and top_k >= 0 and max_new_tokens >= 1:  # NaN is not >= 0
        return
    raise UserError(
        f"temperature={temperature}, top_k={top_k}, max_tokens={max_new_tokens}: "
        "the first two must not be negative (0: the likeliest token; all tokens), "
        "and the last must be at least 1"
    )


# ------------------------------------------------------------------------------------------------
# sequences

QUOTE_TOKENS = 512      # a look-up may add to max_new_tokens: two quotes, in any language


class Sequence:
    """One prompt and what the model makes of it. Engine.new_sequence creates it.

    prompt            ids of the prompt
    tokens            ids generated so far, the tool's replies and the closing token included
    max_new_tokens    the most tokens to generate
    sampled           for each of the tokens whether the model chose it; the tool's reply is forced
    temperature, top_k, generator    how its tokens are sampled
    uniform           the random number for the next token, drawn before that is there
    status            "new", "waiting" (admitted, without a slot), "running" or "finished"
    finish_reason     "stop" or "length"; None before the end, and for a caller who left early
    slot              its slot in the KV cache while it runs
    call              ids of the Python expression that is being written, None outside of one
    forced            ids of a tool's reply that are still to be fed in
    questions         the texts of the user's messages, of which the prompt may hold the last only;
                      None: those of the prompt
    quote_room        tokens that a quote may take besides: max_new_tokens is for what the model
                      writes
    """

    def __init__(
            self, prompt, max_new_tokens=256, temperature=1.0, top_k=50, seed=42, questions=None):
        check_sampling(temperature, top_k, max_new_tokens)
        self.prompt = prompt
        self.tokens = []
        self.sampled = []
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.generator = random.Random(seed)
        self.uniform = self._draw()
        self.status = "new"
        self.finish_reason = None
        self.slot = None
        self.call = None
        self.forced = []
        self.questions = questions
        self.quote_room = 0

    def _draw(self):
        """The next number in [0, 1) of its generator."""
        return self.generator.getrandbits(UNIFORM_BITS) / 2**UNIFORM_BITS

    def add(self, token, sampled):
        """Append a token. sampled: whether the model chose it, by the number in `uniform`."""
        self.tokens.append(token)
        self.sampled.append(sampled)
        if sampled:
            self.uniform = self._draw()

    @property
    def max_length(self):
        """Tokens that its slot must be able to hold."""
        return len(self.prompt) + self.max_new_tokens + self.quote_room


def is_lookup(call):
    """Whether the text of a Python call asks for the user's own text."""
    return call.strip() == LOOKUP_CALL


def user_texts(tokenizer, ids):
    """The texts of the user's messages in the ids of a conversation, a list of str."""
    start = tokenizer.encode_special("<|user_start|>")
    end = tokenizer.encode_special("<|user_end|>")
    texts, first = [], None
    for place, token in enumerate(ids):
        if token == start:
            first = place + 1
        elif token == end and first is not None:
            texts.append(tokenizer.decode(ids[first:place]))
            first = None
    return texts


# ------------------------------------------------------------------------------------------------
# the engine

class Engine:
    """Runs sequences in the slots of one KV cache. One thread at a time may call it.

    waiting     admitted sequences without a slot, in the order of admission
    running     {slot: sequence}
    kv_cache    None while nothing runs. It is allocated for the sequences that wait when none runs,
                with as many slots and as much length as they need. Sequences admitted later take
                the slots that become free, where these are long enough; else they wait until no
                sequence runs any more and the next cache is allocated.
    passages    the user's own text (retrieval.py), or None: then lookup() is refused
    """

    def __init__(self, model, tokenizer, passages=None):
        self.model = model
        self.tokenizer = tokenizer
        self.passages = passages
        self.max_seq_len = model.config.max_seq_len
        self.device = model.embed.weight.device
        self.kv_cache = None
        self.waiting = []
        self.running = {}

    def new_sequence(self, prompt, **options):
        """A Sequence for a prompt: text, or a list of ids. options: as of Sequence.

        The context bounds the answer: max_new_tokens is lowered where the context ends before.
        UserError for an empty prompt, for one that fills the context, and for bad options.
        """
        if not prompt:
            raise UserError("the prompt is empty: say something")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id())
        else:
            ids = list(prompt)
        room = self.max_seq_len - len(ids)
        if room <= 0:
            raise UserError(
                f"the prompt has {len(ids)} tokens, "
                f"the context holds {self.max_seq_len}: shorten it"
            )
        sequence = Sequence(ids, **options)
        sequence.max_new_tokens = min(sequence.max_new_tokens, room)
        if self.passages is not None:
            sequence.quote_room = min(QUOTE_TOKENS, room - sequence.max_new_tokens)
        return sequence

    def admit(self, sequence):
        """Queue a new sequence. The next step gives it a slot if one is free, else a later one."""
        assert sequence.status == "new"
        sequence.status = "waiting"
        self.waiting.append(sequence)

    def retire(self, sequence):
        """Take a sequence out, finished or not, and free its slot. Harmless when repeated."""
        if sequence.status == "waiting":
            self.waiting.remove(sequence)
        if sequence.status == "running":
            del self.running[sequence.slot]
            self.kv_cache.reset(sequence.slot)
            sequence.slot = None
        sequence.status = "finished"
        if not self.running:
            self.kv_cache = None  # its memory is wanted elsewhere: training samples between steps

    @torch.inference_mode()
    def step(self):
        """One forward pass: prefill of the sequences that just got a slot, else decode of all.

        Returns the sequences that got a token; [] when there is nothing to do.
        """
        self._assign_slots()
        running = list(self.running.values())
        sequences = [sequence for sequence in running if not sequence.tokens]
        if sequences:
            # 1. prefill
            logits = self._prefill(sequences)
            counts = [len(sequence.prompt) for sequence in sequences]
        elif running:
            # 2. decode
            sequences = running
            logits = self._decode(sequences)
            counts = [1] * len(sequences)
        else:
            return []

        # 3. sample. A slot advances together with its sequence: should an exception (Ctrl+C, no
        # memory) end this step, the next one repeats what is missing, with the same random numbers.
        tokens = self._next_tokens(sequences, logits)
        for sequence, token, count in zip(sequences, tokens, counts):
            self.kv_cache.advance([sequence.slot], [count])
            self._append(sequence, token)
            if sequence.finish_reason:
                self.retire(sequence)
        return sequences

    def _assign_slots(self):
        """Give free slots to waiting sequences, the first admitted first."""
        if self.waiting and not self.running:
            length = max(sequence.max_length for sequence in self.waiting)
            self.kv_cache = self.model.new_kv_cache(len(self.waiting), length)
        while self.waiting:
            sequence = self.waiting[0]
            free = [slot for slot in range(self.kv_cache.slots) if slot not in self.running]
            if not free or sequence.max_length > self.kv_cache.length:
                return
            self.waiting.pop(0)
            sequence.slot = free[0]
            sequence.status = "running"
            self.running[sequence.slot] = sequence

    def _prefill(self, sequences):
        """Read the prompts into their slots; logits (n, V) of the token after each prompt.

        A prompt that several sequences share has one prefill, whose part of the cache is copied.
        """
        # 1. the first sequence of each distinct prompt
        firsts = {}
        for sequence in sequences:
            firsts.setdefault(tuple(sequence.prompt), sequence)
        lengths = [len(sequence.prompt) for sequence in firsts.values()]
        slots = [sequence.slot for sequence in firsts.values()]

        # 2. What is behind a shorter prompt is overwritten before any query attends to it.
        padded = [list(prompt) + [0] * (max(lengths) - len(prompt)) for prompt in firsts]
        idx = torch.tensor(padded, device=self.device)  # n, T
        logits = self.model.prefill(idx, self.kv_cache, slots, lengths)
        if len(firsts) == len(sequences):
            return logits

        # 3. the others have the same keys and values, and the same logits
        number = {prompt: i for i, prompt in enumerate(firsts)}
        numbers = [number[tuple(sequence.prompt)] for sequence in sequences]
        for prompt, first in firsts.items():
            others = [s.slot for s in sequences if s is not first and tuple(s.prompt) == prompt]
            if others:
                self.kv_cache.copy(first.slot, others, len(prompt))
        return logits[numbers]

    def _decode(self, sequences):
        """Feed the last token of each sequence; logits (n, V) of the token after it, for each."""
        idx = [[0] for _ in range(self.kv_cache.slots)]  # idle slots read token 0
        for sequence in sequences:
            idx[sequence.slot] = [sequence.tokens[-1]]
        logits = self.model.decode(torch.tensor(idx, device=self.device), self.kv_cache)  # S, V
        return logits[[sequence.slot for sequence in sequences]]

    def _next_tokens(self, sequences, logits):
        """The token after those of each sequence: forced by the tool's reply, or sampled."""
        free = [place for place, sequence in enumerate(sequences) if not sequence.forced]
        tokens = [sequence.forced[0] if sequence.forced else None for sequence in sequences]
        if not free:
            return tokens
        if len(free) < len(sequences):
            logits = logits[free]
        own = [sequences[place] for place in free]
        choices = sample(
            logits,
            [sequence.temperature for sequence in own],
            [sequence.top_k for sequence in own],
            [sequence.uniform for sequence in own],
        )
        for place, choice in zip(free, choices):
            tokens[place] = choice
        return tokens

    def _append(self, sequence, token):
        """Append a token, run the tool where the token closes a Python call, note the end."""
        special = self.tokenizer.encode_special
        sequence.add(token, sampled=not sequence.forced)
        if sequence.forced:
            sequence.forced.pop(0)
        if token in (special("<|assistant_end|>"), special("<|bos|>")):
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) == sequence.max_new_tokens:
            sequence.finish_reason = "length"
        elif token == special("<|python_start|>"):
            sequence.call = []
        elif token == special("<|python_end|>") and sequence.call is not None:
            sequence.forced = self._tool_reply(sequence)
            sequence.call = None
        elif sequence.call is not None:
            sequence.call.append(token)

    def _tool_reply(self, sequence):
        """Ids of the tool's reply to the call, with their markers; [] where it refuses."""
        call = self.tokenizer.decode(sequence.call)
        looks_up = is_lookup(call) and self.passages is not None
        reply = self._look_up(sequence) if looks_up else use_tool(call)
        if reply is None:
            return []
        start = self.tokenizer.encode_special("<|output_start|>")
        end = self.tokenizer.encode_special("<|output_end|>")
        return [start, *self.tokenizer.encode(reply), end]

    def _look_up(self, sequence):
        """What the user's text says about the last question, cut to the room left."""
        questions = sequence.questions or user_texts(self.tokenizer, sequence.prompt)
        # two markers and the closing token come besides
        written = len(sequence.tokens) + 3
        room = sequence.max_new_tokens + sequence.quote_room - written

        def tokens_of(text):
            return len(self.tokenizer.encode(text))

        reply = reply_within(self.passages, questions, lambda text: tokens_of(text) <= room)

        # what the model may write stays as much as it was, but for what the quote takes of it
        if reply is not None:
            more = max(0, written + tokens_of(reply) - sequence.max_new_tokens)
            sequence.max_new_tokens += more
            sequence.quote_room -= more
        return reply

    # --------------------------------------------------------------------------------------------
    # callers of step()

    def generate_batch(self, prompts, seeds=None, **options):
        """prompts: list of lists of ids -> list of lists of new ids (the closing token included).

        seeds: one for each prompt, so that several samples of one prompt differ; None: the option
        `seed` for all. options: as of Sequence. UserError for a prompt that does not fit.
        """
        sequences = []
        for number, prompt in enumerate(prompts):
            own = {} if seeds is None else {"seed": seeds[number]}
            sequences.append(self.new_sequence(prompt, **{**options, **own}))
        return [sequence.tokens for sequence in self.run(sequences)]

    def run(self, sequences):
        """Take steps until new sequences are finished, and return them.

        Where an exception ends that, they are retired.
        """
        for sequence in sequences:
            self.admit(sequence)
        try:
            while any(sequence.status != "finished" for sequence in sequences):
                self.step()
        finally:
            for sequence in sequences:
                self.retire(sequence)
        return sequences

    def stream(self, prompt, **options):
        """A Stream of text pieces that continue `prompt`: text, or ids of a conversation."""
        return Stream(self, self.new_sequence(prompt, **options))

    def generate(self, prompt, **options):
        """The continuation of `prompt` (text or ids) as text."""
        return "".join(self.stream(prompt, **options))


class Stream:
    """The text of one sequence: iterate for pieces. Leaving the loop early retires the sequence.

    prompt_tokens, completion_tokens    how many tokens the prompt has, and the pieces so far
    finish_reason                       None until the last piece, then "stop" or "length"

    Several streams of one engine may be read in turns: whoever needs a token takes a step, which
    moves the others forward, too.
    """

    def __init__(self, engine, sequence):
        self.prompt_tokens = len(sequence.prompt)
        self.completion_tokens = 0
        self.finish_reason = None
        self._engine = engine
        self._sequence = sequence
        self._decoder = StreamDecoder(engine.tokenizer)
        self._shown = {engine.tokenizer.encode_special(name): text for name, text in SHOWN.items()}
        self._call = None       # the text of a call that may become a look-up, held back
        self._quoting = False   # whether a look-up's reply is being shown

    def __iter__(self):
        """Yield pieces of text, often "": the reader learns that a step is over, and may leave."""
        if self._sequence.status == "new":
            self._engine.admit(self._sequence)
        try:
            while self._unread() or self._sequence.status != "finished":
                if not self._unread():
                    self._engine.step()
                yield self._next_piece() if self._unread() else ""
        finally:
            self._engine.retire(self._sequence)

    def _unread(self):
        """How many tokens of the sequence were not shown yet."""
        return len(self._sequence.tokens) - self.completion_tokens

    def _next_piece(self):
        """The text of the next token, and of a character that the last token leaves incomplete."""
        token = self._sequence.tokens[self.completion_tokens]
        self.completion_tokens += 1
        if token in self._shown:
            piece = self._decoder.flush() + self._shown_marker(token)
        else:
            piece = self._decoder.feed(token)
        if self._call is not None:
            self._call += piece
            piece = ""
        if self._sequence.finish_reason and not self._unread():
            self.finish_reason = self._sequence.finish_reason
            piece += (self._call or "") + self._decoder.flush()
        return piece

    def _shown_marker(self, token):
        """How a marker of a tool call is shown. A look-up shows its reply and nothing else.

        With passages, the text of a call is held back until it is known whether it is one.
        """
        special = self._engine.tokenizer.encode_special
        text = self._shown[token]
        if token == special("<|python_start|>") and self._engine.passages is not None:
            self._call = ""
            return text
        if token == special("<|python_end|>") and self._call is not None:
            call, self._call = self._call + text, None
            self._quoting = is_lookup(call.partition(text)[2].removesuffix(text))
            return "" if self._quoting else call
        if token == special("<|output_start|>") and self._quoting:
            return ""
        return text


# ------------------------------------------------------------------------------------------------
# samples that a training run shows

def sample_texts(model, tokenizer, prompts, max_new_tokens, ids_of=None, passages=None):
    """Continue each prompt greedily and print it: a list of {"prompt", "text"}.

    What went wrong is said in place of a text, a model that has diverged or a prompt that is longer
    than the context: the guard decides what becomes of a run.
    ids_of(prompt): the ids that stand for a prompt; None: its text. passages: of the Engine.
    """
    was_training = model.training
    model.eval()
    engine = Engine(model, tokenizer, passages)
    samples = []
    for prompt in prompts:
        start = ids_of(prompt) if ids_of else prompt
        try:
            text = engine.generate(start, max_new_tokens=max_new_tokens, temperature=0)
        except UserError as error:
            text = f"({error})"
        samples.append({"prompt": prompt, "text": text})
        print(f"  {prompt}|{text!r}", flush=True)
    model.train(was_training)
    return samples


def sample_chats(model, tokenizer, questions, max_new_tokens, passages=None):
    """Answer each question greedily, as sample_texts() does."""
    def ids_of(question):
        message = {"role": "user", "content": question}
        return tokenizer.render_for_completion({"messages": [message]})

    return sample_texts(model, tokenizer, questions, max_new_tokens, ids_of, passages)
