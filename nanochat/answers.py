"""How a chat model answers the questions of a task: the same at any batch size.

    answerer = Answerer(model, tokenizer, passages)
    answerer.answer(conversations)      # a list of parts for each

There are three ways, decided by what the conversation has:

    letters     the likeliest of its letters after the question
    choices     the text whose likelihood gains most by the question
    neither     whatever the engine generates

Why the batch size could matter: matrix products sum in an order that depends on the shape of the
batch, so that the last bits of the logits do. In bfloat16 the difference is some hundredths, and
where the two best tokens are nearer than that, one batch says A and the next one B. From there on
the texts differ. Three remedies come to mind. Answers one by one cost what batches save. Kernels
that do not depend on the batch (as of Thinking Machines, 2025) would be kernels of our own for each
device. Here, what is decided by a margin larger than that difference is left as the batch has it,
and a near tie is decided again by logits that depend on its own sequence alone: computed for this
sequence by itself, from its first token, in float32 and on one thread. Both ways lead to the answer
of the reference implementation in tests/test_answers.py, which does everything by itself.

Sampling is decided in the same way. The likeliest token after Gumbel noise was added to the logits
is a sample of the model's distribution (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), and
the noise comes from a generator of the sequence's own: so there are near ties, and nothing else.

A diffusion model decides twice in each pass: which masks it commits, and to which tokens. Both are
treated in this way.
"""
import contextlib
from collections import defaultdict
from typing import NamedTuple

import torch

from nanochat.conversation import fit_conversation, prompt_room
from nanochat.diffusion_engine import DiffusionEngine, gumbel_noise
from nanochat.engine import Engine
from nanochat.loss_eval import pad_batch
from nanochat.sampling import check_finite


class Near(NamedTuple):
    """The margin below which a decision is a near tie."""
    token: float    # between the logits of two tokens
    letter: float   # between the logits of two letters
    choice: float   # between the gains of two choices, in nats a token


# About twice the largest difference between a batch and float32 by itself that was measured
# (dev/LOG.md: 0.12, 0.044 and 0.022 in bfloat16). TF32, of which a GPU's float32 products are, has
# three bits more than bfloat16.
NEAR = {
    "bfloat16": Near(0.25, 0.1, 0.05),
    "tf32": Near(0.04, 0.015, 0.008),
    "float32": Near(0.001, 0.001, 0.001),
}

# Between logits of the same tokens in float32, for the passes of a diffusion model, most of which
# would be near ties by the margin above: where a model is sure of little, its masks are alike. The
# largest difference that was measured is 2e-6 at depth 2 (dev/LOG.md).
NEAR_LOGITS = 5e-5


def near_of(model):
    """The Near of a model as it computes now."""
    if model.compute_dtype == torch.bfloat16:
        return NEAR["bfloat16"]
    return NEAR["tf32" if model.device.type == "cuda" else "float32"]


def difference_of(scores, alone):
    """How much two scores of the same (n,) may differ in the margin of the best, a float.

    Only the scores of the best few matter, which are those that a batch can mistake.
    """
    best = alone.topk(min(5, len(alone))).indices
    difference = (scores[best] - alone[best]).cpu().double()
    return float(difference.max() - difference.min())


@contextlib.contextmanager
def by_itself(model):
    """Inside, the model computes in float32 on one thread: the same for the same shape."""
    dtype, threads = model.compute_dtype, torch.get_num_threads()
    model.compute_dtype = torch.float32
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        model.compute_dtype = dtype
        if threads > 1:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def in_float32(model):
    """Inside, the model computes in float32, on a GPU without TF32."""
    dtype, precision = model.compute_dtype, torch.get_float32_matmul_precision()
    model.compute_dtype = torch.float32
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        model.compute_dtype = dtype
        torch.set_float32_matmul_precision(precision)


def margin_of(scores):
    """By how much the best of scores (n, V) exceeds the second, (n,). Infinite if there is none."""
    if scores.size(-1) < 2:
        return torch.full(scores.shape[:-1], torch.inf)
    best = scores.topk(2, -1).values
    return best[..., 0] - best[..., 1]


# ------------------------------------------------------------------------------------------------
# generation

class Noise:
    """What turns the likeliest token of a sequence into a sample.

    temperature, top_k: as of Sequence. seed: of the sequence's own generator.
    """

    def __init__(self, temperature, top_k, seed):
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, like):
        """Gumbel noise for each logit of `like` (V,), times the temperature."""
        exponential = torch.empty(like.numel()).exponential_(generator=self.generator)
        return (-self.temperature * exponential.log()).to(like.device)


class SteadyEngine(Engine):
    """An Engine whose tokens do not depend on which sequences share its batch.

    Its sequences are greedy ones. `noise` makes samples of them: {sequence: Noise}.
    near_ties: how many tokens were decided again.
    difference: the largest, of their logits in the batch and by themselves.
    """

    def __init__(self, model, tokenizer, passages=None):
        super().__init__(model, tokenizer, passages)
        self.near = near_of(model).token
        self.near_ties = 0
        self.difference = 0.0
        self.noise = {}

    def _prefill(self, sequences, counts):
        return self._steady(sequences, super()._prefill(sequences, counts))

    def _decode(self, sequences):
        return self._steady(sequences, super()._decode(sequences))

    def _steady(self, sequences, logits):
        """The scores of which the largest is the next token of each sequence, (n, V)."""
        scores = torch.stack([row.float() for row in logits])
        drawn = {}
        for place, sequence in enumerate(sequences):
            if sequence in self.noise and not sequence.forced:
                drawn[place] = self.noise[sequence].draw(scores[place])
        is_clear = self._add_noise(sequences, scores, drawn)

        for place, sequence in enumerate(sequences):
            if is_clear[place] or sequence.forced:
                continue
            self.near_ties += 1
            alone = self._logits_alone(sequence)[None]
            difference = difference_of(logits[place].float(), alone[0])
            self.difference = max(self.difference, difference)
            noise = {0: drawn[place]} if place in drawn else {}
            self._add_noise([sequence], alone, noise)
            scores[place] = alone[0]
        return scores

    def _add_noise(self, sequences, scores, drawn):
        """Add noise to scores (n, V) in place; a list of whether each largest one is clear.

        drawn: {place: noise}. Of tokens that are not among the top k, the score becomes -inf.
        """
        near_the_edge = set()
        for place, noise in drawn.items():
            top_k = self.noise[sequences[place]].top_k
            logits = scores[place].clone()
            scores[place] += noise
            if 0 < top_k < len(logits):
                edge = logits.topk(top_k).values[-1]
                # a token that may or may not be among the top k, and would be the best
                doubtful = (logits - edge).abs() < self.near
                certain = torch.where(logits >= edge + self.near, scores[place], -torch.inf)
                others = doubtful & (scores[place] > certain.max() - self.near)
                if others.any():
                    near_the_edge.add(place)
                scores[place, logits < edge] = -torch.inf
        clear = (margin_of(scores) > self.near).tolist()
        return [is_clear and place not in near_the_edge for place, is_clear in enumerate(clear)]

    def _logits_alone(self, sequence):
        """The logits (V,) of the token after those of a sequence, computed by itself."""
        ids = sequence.prompt + sequence.tokens
        with by_itself(self.model):
            kv_cache = self.model.new_kv_cache(1, len(ids))
            idx = torch.tensor([ids], device=self.device)
            return self.model.prefill(idx, kv_cache, [0], [len(ids)])[0].float()

    def sequence_of(self, prompt, max_new_tokens, noise):
        """The Sequence of a prompt. noise: a Noise, or None for the likeliest tokens."""
        sequence = self.new_sequence(prompt, max_new_tokens=max_new_tokens, temperature=0)
        if noise:
            self.noise[sequence] = noise
        return sequence

    def run(self, sequences):
        try:
            return super().run(sequences)
        finally:
            for sequence in sequences:
                self.noise.pop(sequence, None)


class SteadyDiffusionEngine(DiffusionEngine):
    """A DiffusionEngine whose tokens do not depend on which sequences share its batch.

    A pass decides which masks are committed, by their confidence, and to which tokens. Where either
    is a near tie, the pass is made again for that sequence by itself. A block has so many decisions
    that in bfloat16 nearly every pass would have one: all of it is computed in float32.

    near_ties, difference: as of SteadyEngine.
    """

    def __init__(self, model, tokenizer, passages=None):
        super().__init__(model, tokenizer, passages)
        self.near = NEAR_LOGITS
        self.near_ties = 0
        self.difference = 0.0

    def _proposal(self, sequence, logits):
        tokens, confidence = super()._proposal(sequence, logits)
        if not confidence.isfinite().all() or self._is_clear(sequence, logits, tokens, confidence):
            return tokens, confidence

        self.near_ties += 1
        with by_itself(self.model):
            [alone] = self._mask_logits([sequence])
        found = super()._proposal(sequence, alone)
        best = self.blocks[sequence].most_confident(found[1])
        for place in best:
            difference = difference_of(logits[place], alone[place])
            self.difference = max(self.difference, difference)
        return found

    def _is_clear(self, sequence, logits, tokens, confidence):
        """Whether a pass commits the same in any batch: logits (m, V), tokens, confidence (m,)."""
        # 1. which masks. The log-odds of a token are its logit against those of all others, so that
        # they differ as much as the margin of two tokens; here two of them are compared.
        odds = log_odds(confidence).sort(descending=True).values
        best = self.blocks[sequence].most_confident(confidence)
        if len(best) < len(odds):
            gap = odds[len(best) - 1] - odds[len(best)]
            if not gap > 2 * self.near:
                return False

        # 2. which tokens. With noise those of the other masks count as well: another token has
        # another confidence.
        if sequence.sampling.is_greedy:
            return bool((margin_of(logits[best]) > self.near).all())
        generator = self.blocks[sequence].generator(logits.device)
        return self._samples_are_clear(logits, tokens, sequence.sampling, generator)

    def _samples_are_clear(self, logits, tokens, sampling, generator):
        """Whether tokens (m,) are the samples of logits (m, V) in any batch."""
        # 1. the tokens that may be among the top k
        logits, tokens = logits.double(), tokens.to(logits.device)
        own = logits.gather(1, tokens[:, None])[:, 0]
        noisy = logits / sampling.temperature + gumbel_noise(logits, generator)
        is_certain = torch.ones_like(own, dtype=torch.bool)
        if 0 < sampling.top_k < logits.size(1):
            edge = logits.topk(sampling.top_k).values[:, -1]
            noisy[logits < (edge - self.near)[:, None]] = -torch.inf
            is_certain = own > edge + self.near

        # 2. none of them is nearly as good
        is_best = noisy.argmax(-1) == tokens
        is_clear = margin_of(noisy) > self.near / sampling.temperature
        return bool((is_certain & is_best & is_clear).all())

    def sequence_of(self, prompt, max_new_tokens, noise):
        """As SteadyEngine.sequence_of()."""
        sampling = {"temperature": 0}
        if noise:
            sampling = {
                "temperature": noise.temperature,
                "top_k": noise.top_k,
                "seed": noise.seed,
            }
        return self.new_sequence(prompt, max_new_tokens=max_new_tokens, **sampling)

    def run(self, sequences):
        with in_float32(self.model):
            return super().run(sequences)


def log_odds(probs):
    """The logarithm of p / (1 - p), for probs (n,) float64."""
    return probs.log() - (-probs).log1p()


# ------------------------------------------------------------------------------------------------
# all three ways

def is_generated(conversation):
    """Whether the answer is written by the model, not picked."""
    return not {"letters", "choices"} & conversation.keys()


class Answerer:
    """Answers the last question of conversations.

    max_new_tokens: of a generated answer, where the conversation has no `answer_tokens`.
    near_ties: how many decisions were made again.
    excess: the largest difference of a score in a batch and by itself, as a share of the margin
    that makes a near tie. Above 1, a decision that was no near tie may depend on the batch.
    """

    def __init__(self, model, tokenizer, passages=None, max_new_tokens=96):
        self.model = model
        self.tokenizer = tokenizer
        engine_class = SteadyEngine if model.causal else SteadyDiffusionEngine
        self.engine = engine_class(model, tokenizer, passages)
        self.max_seq_len = model.config.max_seq_len
        self.device = model.device
        self.max_new_tokens = max_new_tokens
        self.near = near_of(model)
        self._near_picks = 0
        self._excess = 0.0

    @property
    def near_ties(self):
        return self.engine.near_ties + self._near_picks

    @property
    def excess(self):
        return max(self._excess, self.engine.difference / self.engine.near)

    def does_not_fit(self, conversation):
        """Whether the last question alone leaves no room for an answer in the context.

        Such a question loses its beginning where the answer is picked, and gets no answer where it
        would be generated.
        """
        last = {"messages": conversation["messages"][-2:-1]}
        length = len(self.tokenizer.render_for_completion(last))
        if "choices" in conversation:
            length += max(len(self.tokenizer.encode(text)) for text in conversation["choices"]) - 1
        room = self.max_seq_len - is_generated(conversation)
        return length > room

    def answer(self, conversations, noises=None):
        """The parts of each answer, a list for each conversation.

        noises: a Noise or None for each, which generated answers are sampled with.
        """
        # 1) the places of the conversations that are alike: as many choices each
        noises = noises or [None] * len(conversations)
        alike = defaultdict(list)
        for place, conversation in enumerate(conversations):
            count = len(conversation.get("choices", ()))
            alike[is_generated(conversation), count].append(place)

        # 2) their answers
        answers = {}
        for (generated, count), places in alike.items():
            some = [conversations[place] for place in places]
            if generated:
                found = self.generate(some, [noises[place] for place in places])
            elif count:
                found = self.pick_choices(some)
            else:
                found = self.pick_letters(some)
            answers.update(zip(places, found))
        return [answers[place] for place in range(len(conversations))]

    # -------------------------------------------------------------------------------- generated

    def prompt_of(self, conversation):
        """A conversation's last question as ids, after as many of the turns before it as fit."""
        room = prompt_room(self.max_seq_len, self.max_new_tokens)
        messages = fit_conversation(self.tokenizer, conversation["messages"][:-1], room)
        return self.tokenizer.render_for_completion({"messages": messages})

    def generate(self, conversations, noises):
        """What the model writes; nothing where the question alone fills the context."""
        sequences = {}
        for place, (conversation, noise) in enumerate(zip(conversations, noises)):
            prompt = self.prompt_of(conversation)
            if len(prompt) >= self.max_seq_len:
                continue
            room = max(self.max_new_tokens, conversation.get("answer_tokens", 0))
            sequences[place] = self.engine.sequence_of(prompt, room, noise)
        self.engine.run(list(sequences.values()))
        return [
            self.tokenizer.parse_completion(sequences[place].tokens) if place in sequences else []
            for place in range(len(conversations))
        ]

    # -------------------------------------------------------------------------------- picked

    def _pick(self, conversations, score, near, texts):
        """The text with the best score for each of n conversations, as parts.

        score(conversations): the scores, (choices,) of each; a near tie is scored by itself.
        texts: the key under which a conversation has what to pick from.
        """
        picked = []
        for conversation, row in zip(conversations, score(conversations)):
            check_finite(row)
            if not margin_of(row) > near:
                self._near_picks += 1
                with by_itself(self.model):
                    [alone] = score([conversation])
                self._excess = max(self._excess, difference_of(row, alone) / near)
                row = alone
            best = int(row.argmax())
            picked.append([{"type": "text", "text": conversation[texts][best]}])
        return picked

    def pick_letters(self, conversations):
        """The likeliest of each conversation's letters after its question."""
        return self._pick(conversations, self._letter_scores, self.near.letter, "letters")

    @torch.inference_mode()
    def _letter_scores(self, conversations):
        """The logits of each conversation's letters, a list of (letters,)."""
        prompts = [self.tokenizer.render_for_completion(one) for one in conversations]
        # of one that is too long the end is read, where the choices stand
        logits = self.model.next_token_logits(prompts)
        scores = []
        for conversation, row in zip(conversations, logits.float().cpu()):
            ids = [self.tokenizer.encode(letter)[0] for letter in conversation["letters"]]
            scores.append(row[ids])
        return scores

    def pick_choices(self, conversations):
        """The choice whose likelihood gains most, a token, when the neutral question becomes the
        real one. Plain likelihood prefers short and common sentences whatever was asked (PMI
        scoring, arXiv 2104.08315)."""
        return self._pick(conversations, self._choice_scores, self.near.choice, "choices")

    def _choice_scores(self, conversations):
        """The gain of each choice, (n, choices), for n conversations with as many choices each."""
        asked, neutral, lengths = [], [], []
        for conversation in conversations:
            question = conversation["messages"][-2]["content"]
            for text in conversation["choices"]:
                asked.append((question, text))
                neutral.append((conversation["neutral"], text))
                lengths.append(len(self.tokenizer.encode(text)))
        # a question and its control have the neutral question in common
        pairs = list(dict.fromkeys(asked + neutral))
        found = dict(zip(pairs, self.log_likelihoods(pairs).tolist()))
        gains = [found[a] - found[b] for a, b in zip(asked, neutral)]
        gains = torch.tensor(gains, dtype=torch.float64) / torch.tensor(lengths)
        return gains.view(len(conversations), -1)

    def log_likelihoods(self, pairs):
        """Nats of each answer after its question, (N,), for N pairs (question, answer)."""
        sequences, answer_lengths = [], []
        for question, text in pairs:
            message = {"role": "user", "content": question}
            prompt = self.tokenizer.render_for_completion({"messages": [message]})
            ids = self.tokenizer.encode(text)
            most = self.model.max_targets
            sequences.append((prompt + ids)[-most - 1:])
            answer_lengths.append(min(len(ids), most))
        inputs, targets = pad_batch(sequences, self.device)
        for row, ids, answer_length in zip(targets, sequences, answer_lengths):
            row[:len(ids) - 1 - answer_length] = -1  # the question is not scored
        return self.model.log_probs(inputs, targets).cpu().double().sum(-1)
