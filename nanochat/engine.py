"""The engine: generation for many sequences at once, each in a slot of the KV cache.

    engine = Engine(model, tokenizer)
    engine.generate("The capital of France is", temperature=0)     # text
    for piece in engine.stream(ids, seed=7): ...                   # pieces of text as they come
    engine.generate_batch(prompts, max_new_tokens=96)              # lists of ids

All three are callers of the same three methods, and so is the server:

    engine.admit(sequence)      # queue it
    engine.step()               # one forward pass: a prefill, or one more token per sequence
    engine.retire(sequence)     # free its slot; step() does so by itself for a finished sequence

A prefill step reads prompts in one forward pass, padded to the longest; a prompt that several
sequences share has one prefill. A decode step feeds the last token of every running sequence and
samples the next, for all of them at once. Sequences start and end at any step, and each samples
with the random numbers of a generator seeded for it alone: it gets the same tokens alone and among
others.

With max_slots, for a server, the cache is allocated once and kept. Long prompts are then read in
chunks, between which those who are being answered get their tokens (chunked prefill, Sarathi-Serve,
arXiv 2403.02310), and a prompt that begins like one whose keys and values are still in a slot is
read from there on only (prefix caching, as in vLLM and SGLang, arXiv 2312.07104).

When a sequence closes a Python call, the engine runs the expression (execution.py) and forces the
tool's reply into that sequence instead of sampling. The call lookup() is answered with what the
user's own text says about the last question, where the engine was given its passages
(retrieval.py): the model decides whether to look up, the quote is exact.
"""
import random
import time

import torch

from nanochat.common import UserError
from nanochat.decoding import CompiledDecode, use_fast_linear
from nanochat.execution import use_tool
from nanochat.fast_linear import can_multiply_fast
from nanochat.graph_decode import GraphDecode
from nanochat.native_decode import NativeDecode, can_decode_natively
from nanochat.retrieval import reply_within
from nanochat.sampling import (
    NonFiniteError,
    SamplingOptions,
    check_sampling,
    logprobs_of,
    sample,
    wanted_logprobs,
)
from nanochat.sequence_text import TextOfSequence, is_lookup

UNIFORM_BITS = 24       # of a random number: as many as float32 holds exactly
SEEDS = 2**64           # negative ones count down from here
QUOTE_TOKENS = 512      # a look-up may add to max_new_tokens: two quotes, in any language

# Prompt tokens of one prefill step with max_slots: while others wait for their next token, and
# while none does. More would be no faster, and would make them wait.
CHUNK_TOKENS = 256
CHUNK_TOKENS_ALONE = 2048
SHORT_REPLY = 16        # tokens of a tool's reply that are fed one by one, beside other sequences
COMPILING_ATTEMPTS = 20     # of a step beside a compilation, and the seconds between two of them
ATTEMPT_SECONDS = 0.1
MIN_PREFIX = 16         # tokens that two prompts must have in common to share their keys and values


# ------------------------------------------------------------------------------------------------
# sequences

class Sequence:
    """One prompt and what the model makes of it. Engine.new_sequence creates it.

    prompt            ids of the prompt
    tokens            ids generated so far, the tool's replies and the closing token included
    max_new_tokens    the most tokens to generate
    sampled           for each of the tokens whether the model chose it; the tool's reply is forced
    sampling          how its tokens are sampled, SamplingOptions
    generator         the random.Random of this sequence
    uniform           the random number for the next token, drawn before that is there
    ignore_stop_tokens    whether the answer continues behind the tokens that end one
    tenant            prefixes of prompts are shared with sequences of the same tenant only
    status            "new", "waiting" (admitted, without a slot), "running" or "finished"
    finish_reason     "stop", "length" or "error"; None before the end, and for a caller who left
                      early
    error             the exception with which it ended, else None
    slot              its slot in the KV cache while it runs
    cached_tokens     how many tokens of the prompt were in the KV cache already
    logprobs          a TokenLogprob for each of the tokens, where the option was given
    prompt_logprobs   None unless asked for; a TokenLogprob for each token of the prompt, None for
                      the first one
    call              ids of the Python expression that is being written, None outside of one
    forced            ids of a tool's reply that are still to be fed in
    questions         the texts of the user's messages, of which the prompt may hold the last only;
                      None: those of the prompt
    quote_room        tokens that a quote may take besides: max_new_tokens is for what the model
                      writes
    may_look_up       whether lookup() is answered
    """

    def __init__(
        self,
        prompt,
        max_new_tokens=256,
        seed=42,
        questions=None,
        prompt_logprobs=False,
        ignore_stop_tokens=False,
        tenant="",
        **sampling,
    ):
        self.sampling = SamplingOptions(**sampling)
        check_sampling(self.sampling.temperature, self.sampling.top_k, max_new_tokens)
        self.prompt = prompt
        self.tokens = []
        self.sampled = []
        self.max_new_tokens = max_new_tokens
        self.generator = random.Random(seed % SEEDS)    # -1 alone would be 1
        self.uniform = self._draw()
        self.ignore_stop_tokens = ignore_stop_tokens
        self.tenant = tenant
        self.status = "new"
        self.finish_reason = None
        self.error = None
        self.slot = None
        self.cached_tokens = 0
        self.logprobs = []
        self.prompt_logprobs = [None] if prompt_logprobs else None
        self.call = None
        self.forced = []
        self.questions = questions
        self.quote_room = 0
        self.may_look_up = False

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
    def has_long_reply(self):
        """Whether a tool's reply is better fed in one forward pass than beside other sequences.

        Logprobs, which are wanted of every token, come from decode steps.
        """
        return len(self.forced) > SHORT_REPLY and self.sampling.logprobs is None

    @property
    def max_length(self):
        """Tokens that its slot must be able to hold."""
        return len(self.prompt) + self.max_new_tokens + self.quote_room


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
    running     {slot: sequence}, in the order in which they got their slots
    kv_cache    None while nothing runs. It is allocated for the sequences that wait when none runs,
                with as many slots and as much length as they need. Sequences admitted later take
                the slots that become free, where these are long enough; else they wait until no
                sequence runs any more and the next cache is allocated.
    max_slots   None, or the number of slots of a cache that is allocated at once, each as long as
                the context, and is kept
    passages    the user's own text (retrieval.py), or None: then lookup() is refused
    compiled_decode     the NativeDecode, CompiledDecode or GraphDecode that replaces model.decode()
                        where it is ready, or None. With max_slots on a GPU, a GraphDecode that
                        captures the steps as they are written
    """

    def __init__(self, model, tokenizer, passages=None, max_slots=None):
        self.model = model
        self.tokenizer = tokenizer
        self.passages = passages
        self.max_seq_len = model.config.max_seq_len
        self.device = model.embed.weight.device
        self.max_slots = max_slots
        self.kv_cache = None
        self.compiled_decode = None
        if max_slots is not None:
            if max_slots < 1:
                raise UserError(f"max_slots={max_slots}: a server needs at least 1")
            self.kv_cache = model.new_kv_cache(max_slots, self.max_seq_len)
            if self.device.type == "cuda":
                self.compiled_decode = GraphDecode(model, self.kv_cache)
        self.waiting = []
        self.running = {}
        self._prefills = 0          # how many prefill steps there were
        self._was_prefill = False   # whether the last step was one

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
        sequence.sampling.check_vocabulary(self.tokenizer.get_vocab_size())
        sequence.max_new_tokens = min(sequence.max_new_tokens, room)
        sequence.may_look_up = self.passages is not None
        if sequence.may_look_up:
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
            self._free_slot(sequence)
        sequence.status = "finished"
        if not self.running and self.max_slots is None:
            self.kv_cache = None  # its memory is wanted elsewhere: training samples between steps

    def _free_slot(self, sequence):
        """Free the slot of a sequence. With max_slots its tokens stay, for prompts that follow."""
        slot, sequence.slot = sequence.slot, None
        is_spoilt = sequence.error is not None
        if not sequence.tokens:         # it leaves in its prefill: nobody has looked at its logits
            is_spoilt = is_spoilt or not self.kv_cache.is_finite(slot)
        if is_spoilt:
            self.kv_cache.clear(slot)   # behind a mask, NaN would still reach whoever comes next
        elif self.max_slots is not None:
            self.kv_cache.keep(slot, sequence.prompt + sequence.tokens, sequence.tenant)
        else:
            self.kv_cache.reset(slot)

    @property
    def is_compiling(self):
        """Whether decoding is being compiled on another thread."""
        return self.compiled_decode is not None and self.compiled_decode.is_compiling

    def step(self):
        """One forward pass: prefill of sequences whose prompt is not in the cache yet, else decode.

        With max_slots, prefill and decode take turns, so that a long prompt delays the others by
        one chunk at a time. Returns the sequences that got a token or ended; [] where a chunk ends
        within a prompt, and when there is nothing to do.

        A step that fails beside a compilation is taken again: torch's tracer patches the modules of
        the whole process for some milliseconds, and theirs is the error. It may be repeated, since
        sequences and slots advance at its end only.
        """
        for _ in range(COMPILING_ATTEMPTS):
            was_compiling = self.is_compiling
            try:
                return self._step()
            except NameError:   # "module is not installed as a submodule"
                if not was_compiling:
                    raise
                time.sleep(ATTEMPT_SECONDS)
        return self._step()

    @torch.inference_mode()
    def _step(self):
        # 1. who waits for what
        self._assign_slots()
        prefilling = [sequence for sequence in self.running.values() if not sequence.tokens]
        by_slot = [self.running[slot] for slot in sorted(self.running)]
        decoding = [sequence for sequence in by_slot if sequence.tokens]
        replying = [sequence for sequence in decoding if sequence.has_long_reply]

        # 2. whose turn it is
        is_decodes_turn = self._was_prefill and self.max_slots is not None
        if replying and not is_decodes_turn:
            return self._feed_reply(replying[0])
        if prefilling and not (is_decodes_turn and decoding):
            return self._prefill_step(prefilling, bool(decoding))
        return self._decode_step(decoding) if decoding else []

    def _prefill_step(self, prefilling, others_decode):
        """step() for some of the sequences whose prompt is not in the cache."""
        sequences, counts = self._choose_chunks(prefilling, others_decode)
        logits = self._prefill(sequences, counts)
        self._was_prefill = True
        self._prefills += 1
        return self._advance(sequences, counts, logits)

    def _decode_step(self, sequences):
        """step() for all sequences whose prompt is in the cache."""
        logits = self._decode(sequences)
        self._was_prefill = False
        return self._advance(sequences, [1] * len(sequences), logits)

    def _advance(self, sequences, counts, logits):
        """Sample the next token of each sequence that has one now; returns these sequences.

        counts: of how many more tokens the keys and values are in the cache. logits (n, V).
        """
        # 1. what was only begun has no next token yet
        whole = [self._is_whole(*one) for one in zip(sequences, counts)]
        complete = [sequence for sequence, is_whole in zip(sequences, whole) if is_whole]
        logits = logits if all(whole) else logits[whole]
        tokens, logprobs = self._next_tokens(complete, logits)

        # 2. A slot advances together with its sequence: should an exception (Ctrl+C, no memory) end
        # this step, the next one repeats what is missing, with the same random numbers.
        results = iter(zip(tokens, logprobs))
        for sequence, count, is_whole in zip(sequences, counts, whole):
            self.kv_cache.advance([sequence.slot], [count])
            if is_whole:
                self._append(sequence, *next(results))
        return complete

    def _feed_reply(self, sequence):
        """step() for a tool's long reply: one forward pass for many tokens, none of them sampled.

        The last one is not fed: the next decode step does that, and samples what comes after it.
        """
        room = sequence.max_new_tokens - len(sequence.tokens)
        reply = sequence.forced[:min(room, CHUNK_TOKENS)]
        ids = [sequence.tokens[-1], *reply[:-1]]
        idx = torch.tensor([ids], device=self.device)
        self.model.prefill(idx, self.kv_cache, [sequence.slot], [len(ids)])
        self._was_prefill = True
        for token in reply:
            self.kv_cache.advance([sequence.slot], [1])
            self._append(sequence, token, None)
        return [sequence]

    def _is_whole(self, sequence, count):
        """Whether a sequence has a next token when `count` more of its tokens are in the cache."""
        return self.kv_cache.lengths[sequence.slot] + count >= len(sequence.prompt)

    # --------------------------------------------------------------------------------------------
    # scheduling

    def _assign_slots(self):
        """Give free slots to waiting sequences, the first admitted first."""
        if self.max_slots is None and self.waiting and not self.running:
            length = max(sequence.max_length for sequence in self.waiting)
            self.kv_cache = self.model.new_kv_cache(len(self.waiting), length)
        reserved = 0    # slots for those who wait for a prefix
        for sequence in list(self.waiting):
            free = [slot for slot in range(self.kv_cache.slots) if slot not in self.running]
            if len(free) <= reserved or sequence.max_length > self.kv_cache.length:
                return
            if self.max_slots is None:
                slot = free[0]
            else:
                slot = self._slot_with_prefix(sequence, free)
            if slot is None:
                reserved += 1
            else:
                self.waiting.remove(sequence)
                sequence.slot = slot
                sequence.status = "running"
                self.running[slot] = sequence

    def _slot_with_prefix(self, sequence, free):
        """A free slot, which holds the beginning of the prompt where that was in the cache.

        None where another sequence is about to put more of it there: then this one waits for that.
        """
        # 1. where most of the prompt is, or soon will be
        source, length = None, 0
        if sequence.prompt_logprobs is None:
            source, length = self._longest_prefix(sequence, self._held_tokens())
            _, coming = self._longest_prefix(sequence, self._prompts_in_prefill())
            if coming >= length + MIN_PREFIX:
                return None

        # 2. the slot whose last sequence ended first, unless the prompt continues another's
        slot = self.kv_cache.least_recent(free)
        if source in free and 2 * length >= self.kv_cache.lengths[source]:
            slot = source
        elif length and slot != source:
            self.kv_cache.copy(source, [slot], length)
        self.kv_cache.take(slot, length)
        sequence.cached_tokens = length
        return slot

    def _held_tokens(self):
        """{slot: (ids of the tokens whose keys and values it holds, tenant)}"""
        held = dict(self.kv_cache.kept)
        for slot, sequence in self.running.items():
            ids = sequence.prompt + sequence.tokens
            held[slot] = ids[:self.kv_cache.lengths[slot]], sequence.tenant
        return held

    def _prompts_in_prefill(self):
        """{slot: (ids of the prompt, tenant)} of the sequences that are being prefilled."""
        return {
            slot: (sequence.prompt, sequence.tenant)
            for slot, sequence in self.running.items() if not sequence.tokens
        }

    def _longest_prefix(self, sequence, held):
        """(slot, length) of the longest beginning of a prompt among `held`, {slot: (ids, tenant)}.

        (None, 0) where it is shorter than MIN_PREFIX. The last token of a prompt is no part of it,
        for that is always computed: its logits are wanted.
        """
        wanted = sequence.prompt[:-1]
        best = None, 0
        for slot, (ids, tenant) in held.items():
            length = common_length(wanted, ids) if tenant == sequence.tenant else 0
            if length >= max(MIN_PREFIX, best[1] + 1):
                best = slot, length
        return best

    def _choose_chunks(self, prefilling, others_decode):
        """(sequences, how many tokens of each prompt to read) of a prefill step.

        Without max_slots these are all of them, whole. Else the sequence that came first and the
        one with the least to read take turns, so that neither a long prompt nor short ones wait for
        ever; others whose whole rest fits beside it join. A prompt whose logprobs are wanted is
        read alone, in chunks, for it has V logits at each of its tokens.
        """
        # 1. the one whose turn it is
        lengths = self.kv_cache.lengths
        left = {s: len(s.prompt) - lengths[s.slot] for s in prefilling}
        budget = CHUNK_TOKENS if others_decode else CHUNK_TOKENS_ALONE
        by_length = sorted(prefilling, key=left.get)
        first = by_length[0] if self._prefills % 2 else prefilling[0]
        if first.prompt_logprobs is not None:
            return [first], [min(left[first], CHUNK_TOKENS)]
        if self.max_slots is None:
            whole = [s for s in prefilling if s.prompt_logprobs is None]
            return whole, [left[sequence] for sequence in whole]

        # 2. others, as long as all of them padded to the longest stay within budget and slot
        chunks = {first: min(left[first], budget)}
        for sequence in by_length:
            longest = max(left[sequence], *chunks.values())
            padded = longest * (len(chunks) + 1)
            starts = [lengths[one.slot] for one in (*chunks, sequence)]
            fits = padded <= budget and max(starts) + longest <= self.kv_cache.length
            is_other = sequence not in chunks and sequence.prompt_logprobs is None
            if is_other and fits:
                chunks[sequence] = left[sequence]
        return list(chunks), list(chunks.values())

    # --------------------------------------------------------------------------------------------
    # forward passes

    def _prefill(self, sequences, counts):
        """Read the next `counts` tokens of prompts into their slots.

        Returns logits (n, V) of the token after each of these chunks. A prompt that several
        sequences share has one prefill, whose part of the cache is copied.
        """
        if sequences[0].prompt_logprobs is not None:
            return self._score_prompt(sequences[0], counts[0])

        # 1. the first sequence of each distinct prompt
        starts = [self.kv_cache.lengths[sequence.slot] for sequence in sequences]
        keys, firsts = [], {}
        for sequence, start, count in zip(sequences, starts, counts):
            keys.append((start, *sequence.prompt[:start + count]))
            firsts.setdefault(keys[-1], sequence)
        chunks = [key[1 + key[0]:] for key in firsts]
        lengths = [len(chunk) for chunk in chunks]
        slots = [sequence.slot for sequence in firsts.values()]

        # 2. What is behind a shorter chunk is overwritten before any query attends to it.
        padded = [list(chunk) + [0] * (max(lengths) - len(chunk)) for chunk in chunks]
        idx = torch.tensor(padded, device=self.device)  # n, T
        logits = self.model.prefill(idx, self.kv_cache, slots, lengths)
        if len(firsts) == len(sequences):
            return logits

        # 3. the others have the same keys and values, and the same logits
        number = {key: i for i, key in enumerate(firsts)}
        for key, first in firsts.items():
            pairs = zip(keys, sequences)
            others = [s.slot for own, s in pairs if own == key and s is not first]
            if others:
                self.kv_cache.copy(first.slot, others, len(key) - 1)
        return logits[[number[key] for key in keys]]

    def _score_prompt(self, sequence, count):
        """_prefill() of one sequence, whose prompt_logprobs get a TokenLogprob for each token."""
        start = self.kv_cache.lengths[sequence.slot]
        idx = torch.tensor([sequence.prompt[start:start + count]], device=self.device)
        x, recent = self.model.features(idx, self.kv_cache, [sequence.slot])
        logits = self.model.logits(x, recent)[0]                    # count, V
        targets = sequence.prompt[start + 1:start + 1 + count]      # behind the last one is none
        scored = logprobs_of(logits[:len(targets)], targets, sequence.sampling.logprobs or 0)
        sequence.prompt_logprobs[start + 1:] = scored
        return logits[-1:]

    def _decode(self, sequences):
        """Feed the last token of each sequence; logits (n, V) of the token after it, for each.

        The sequences are in the order of their slots: neighbours are a view of the cache. Others
        are copied, which takes a small part of the time that idle slots between them would.
        """
        last = [sequence.tokens[-1] for sequence in sequences]
        slots = [sequence.slot for sequence in sequences]
        compiled = self.compiled_decode
        if compiled is not None and compiled.is_ready(len(sequences)):
            return compiled(last, slots)
        idx = torch.tensor(last, device=self.device)[:, None]  # n, 1
        if len(sequences) == self.kv_cache.slots:
            return self.model.decode(idx, self.kv_cache)
        return self.model.decode(idx, self.kv_cache, slots)

    # --------------------------------------------------------------------------------------------
    # the next token

    def _next_tokens(self, sequences, logits):
        """The token after those of each sequence, and its TokenLogprob where that is wanted.

        Two lists. The token is forced by the tool's reply, or sampled; None: there is no next one.
        """
        tokens = [sequence.forced[0] if sequence.forced else None for sequence in sequences]
        free = [place for place, sequence in enumerate(sequences) if not sequence.forced]
        if free:
            own = logits if len(free) == len(sequences) else logits[free]
            choices = sample(own, [sequences[place] for place in free])
            for place, choice in zip(free, choices):
                tokens[place] = choice
        return tokens, wanted_logprobs(logits, sequences, tokens)

    def _append(self, sequence, token, logprob):
        """Append a token, or note the error where there is none, and retire what has ended."""
        if token is None:
            sequence.error = NonFiniteError()
            sequence.finish_reason = "error"
        else:
            self._append_token(sequence, token)
        if logprob is not None:
            sequence.logprobs.append(logprob)
        if sequence.finish_reason:
            self.retire(sequence)

    def _append_token(self, sequence, token):
        """Append a token, run the tool where the token closes a Python call, note the end."""
        special = self.tokenizer.encode_special
        sequence.add(token, sampled=not sequence.forced)
        if sequence.forced:
            sequence.forced.pop(0)
        if self._is_stop(sequence, token):
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

    def _is_stop(self, sequence, token):
        """Whether a token ends the answer."""
        special = self.tokenizer.encode_special
        ends = token in (special("<|assistant_end|>"), special("<|bos|>"))
        return ends and not sequence.ignore_stop_tokens

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

        Where an exception ends that, they are retired. It may be that of a single sequence.
        """
        for sequence in sequences:
            self.admit(sequence)
        try:
            while any(sequence.status != "finished" for sequence in sequences):
                self.step()
                for sequence in sequences:
                    raise_error_of(sequence)
        finally:
            for sequence in sequences:
                self.retire(sequence)
        return sequences

    def stream(self, prompt, stop=(), **options):
        """A Stream of text pieces that continue `prompt`: text, or ids of a conversation.

        stop: strings before which it ends. options: as of Sequence.
        """
        return Stream(self, self.new_sequence(prompt, **options), stop)

    def generate(self, prompt, **options):
        """The continuation of `prompt` (text or ids) as text."""
        return "".join(self.stream(prompt, **options))


WEIGHTS = "", "int8"     # of an engine for serving


def require_weights(weights):
    """UserError for weights that no engine has."""
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights}: int8, or nothing for those of the checkpoint")


def serving_engine(
    model,
    tokenizer,
    passages=None,
    max_slots=8,
    weights="",
    compile=True,
    wait=False,
):
    """An Engine with a kept cache of max_slots, as fast as this machine allows.

    weights: "int8" rounds the matrices of a model on a CPU to 8 bits; "" leaves them as they are.
    compile: compile the decode step while the engine answers already (on a CPU native_decode.py,
    or decoding.py for other models; on CUDA graph_decode.py); where that fails, everything stays as
    it is. Without it, the step is taken as it is written. wait: compile before the engine is
    returned, in decoding.py for max_slots sequences alone; RuntimeError where that fails. UserError
    for other weights, and for int8 where it cannot be had.
    """
    require_weights(weights)
    can = can_multiply_fast(model.device)
    if weights and not can:
        raise UserError(
            f"weights={weights} is for CPUs whose torch has oneDNN, and the model is on "
            f"{model.device}: leave it out"
        )
    native = compile and can_decode_natively(model)
    if can and (compile or weights):
        use_fast_linear(model, int8=weights == "int8", native=native)
    engine = Engine(model, tokenizer, passages, max_slots)
    if not compile:
        engine.compiled_decode = None
    elif can:
        decode = NativeDecode if native else CompiledDecode
        engine.compiled_decode = decode(model, engine.kv_cache)
    if engine.compiled_decode is not None:
        if wait:
            engine.compiled_decode.warm_up(max_slots)
        else:
            engine.compiled_decode.warm_up_behind()
    return engine


class Stream:
    """The text of one sequence: iterate for pieces. Leaving the loop early retires the sequence.

    stop    strings before which the text ends
    prompt_tokens, completion_tokens    how many tokens the prompt has, and the pieces so far
    finish_reason                       None until the last piece, then "stop" or "length"

    Several streams of one engine may be read in turns: whoever needs a token takes a step, which
    moves the others forward, too. A sequence that ends with an error raises it here.
    """

    def __init__(self, engine, sequence, stop=()):
        self._engine = engine
        self._sequence = sequence
        self._text = TextOfSequence(engine.tokenizer, sequence, stop)

    @property
    def prompt_tokens(self):
        return self._text.prompt_tokens

    @property
    def completion_tokens(self):
        return self._text.completion_tokens

    @property
    def finish_reason(self):
        return self._text.finish_reason

    def __iter__(self):
        """Yield pieces of text, often "": the reader learns that a step is over, and may leave."""
        if self._sequence.status == "new":
            self._engine.admit(self._sequence)
        try:
            while self._text.finish_reason is None and self._may_get_more():
                if not self._text.unread:
                    self._engine.step()
                raise_error_of(self._sequence)
                yield self._text.read()
            raise_error_of(self._sequence)  # one that ended while another stream was read
        finally:
            self._engine.retire(self._sequence)

    def _may_get_more(self):
        """Whether there are tokens to show, now or after a step."""
        return self._text.unread or self._sequence.status != "finished"


def raise_error_of(sequence):
    """Raise the error with which a sequence has ended, if it has."""
    if sequence.error:
        raise sequence.error


def common_length(a, b):
    """How many items two lists have in common at their beginning.

    >>> common_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(place for place in range(most) if a[place] != b[place])
