"""CORE: the accuracy of a base model on multiple choice, schemas and continuations, few-shot.

A row becomes prompts, prompts become token ids with a span that is scored, and the model's
log-probabilities of the spans become a verdict:

    multiple_choice    one context, several continuations: the likeliest one, a token, is chosen
    schema             several contexts, one continuation: where it is likeliest
    language_modeling  right where greedy decoding would write the continuation, token by token

The prompts, the order of the rows and the solved examples in front are those of nanochat (its
core_eval.py, after DataComp-LM, arXiv 2406.11794), so that the numbers compare.

What makes it fast, and changes no verdict (tests/core_reference.py has the slow way):

1. Choices share their beginning, which has one prefill into a KV cache. Then each choice's own end
   is read behind it, over the end of the choice before.
2. Examples of similar length are read together.
3. Only at scored positions are logits computed, and those in float32. Of the other positions the
   last block computes keys and values, and no more.
4. The blocks compute in bfloat16 where the hardware multiplies it. Where a verdict hangs on a
   margin that rounding might turn, the example is computed again in float32, without the choices
   that are certainly worse. How large a margin rounding might turn is measured on a few examples
   of every task (see NearTies).

Shapes: N examples, K choices of each, P tokens of a shared beginning, n scored tokens, C width,
V vocabulary.
"""
import copy
import random
from typing import NamedTuple

import numpy as np
import torch

from nanochat.core_bundle import OPTIONS
from nanochat.gpt import Head, Linear
from nanochat.sampling import check_finite

ORDER_SEED = 1337       # of the rows of a task (nanochat)
SHOTS_SEED = 1234       # plus the index of the example (nanochat)
TIE = 1e-6              # nats a token; choices that are closer share the credit
CHUNK_LOGITS = 1 << 24  # logits in memory at once
BATCH_TOKENS = 8192     # read in one forward pass
FIRST_SAMPLE = 8        # examples that are computed in bfloat16 and in float32, of the first block
SAMPLE = 2              # and of every other block
SIMILAR = 32            # starts whose lengths differ by less are sorted by their ends
BLOCK = 1024            # examples that are rendered, encoded and sorted by length together
SAFETY = 4              # times the largest error of a margin that was seen


# --------------------------------------------------------------------------------------------------
# rows -> prompts

def in_order(rows):
    """The rows of a task in the order of the evaluation, shuffled by a fixed seed."""
    rows = list(rows)
    random.Random(ORDER_SEED).shuffle(rows)
    return rows


def few_shot_indices(count, index, shots):
    """Which of `count` rows are shown before row `index`: `shots` others, or as many as exist.

    The draw depends on the index alone.
    """
    others = count - 1
    drawn = random.Random(SHOTS_SEED + index).sample(range(others), min(shots, others))
    return [i + (i >= index) for i in drawn]


def control_index(rows, index):
    """The row whose query stands in for that of row `index`.

    It is the next one that asks another thing; where all rows ask the same, the row itself.
    """
    query = rows[index]["query"]
    for step in range(1, len(rows)):
        other = (index + step) % len(rows)
        if rows[other]["query"] != query:
            return other
    return index


def solved(task, row):
    """A row with its right answer, as the text of a solved example."""
    if task.kind == "multiple_choice":
        return row["query"] + task.delimiter + row["choices"][row["gold"]]
    if task.kind == "schema":
        return row["context_options"][row["gold"]] + task.delimiter + row["continuation"]
    return row["context"].strip() + task.delimiter + row["continuation"]


def render(task, rows, index, control=False):
    """The prompts of row `index`: one for each choice; of language_modeling [context, whole].

    control: multiple choice with the query of another row, which the choices do not answer.
    """
    shown = few_shot_indices(len(rows), index, task.shots)
    before = "".join(solved(task, rows[i]) + "\n\n" for i in shown)
    row = rows[index]
    if task.kind == "multiple_choice":
        asked = rows[control_index(rows, index)] if control else row
        context = before + asked["query"] + task.delimiter
        return [context + choice for choice in row["choices"]]
    if task.kind == "schema":
        end = task.delimiter + row["continuation"]
        return [before + option + end for option in row["context_options"]]
    context = before + row["context"].strip() + task.delimiter
    return [context.strip(), context + row["continuation"]]


# --------------------------------------------------------------------------------------------------
# prompts -> token ids and spans

class Example(NamedTuple):
    """A row as token ids. Scored are sequences[k][spans[k][0]:spans[k][1]]."""
    sequences: list    # of int arrays: one for each choice, or a single one
    spans: list        # of (start, end); start is at least 1, for a first token is not predicted
    gold: int          # the right choice; -1 where there are none


def common_start(sequences):
    """How many tokens at the beginning of all sequences are the same."""
    first, shortest = sequences[0], min(map(len, sequences))
    for other in sequences[1:]:
        differs = np.flatnonzero(first[:shortest] != other[:shortest])
        if len(differs):
            shortest = int(differs[0])
    return shortest


def make_example(task, sequences, gold, context):
    """The Example of a row's prompts as token ids, cut to `context` tokens.

    What is too long is cut at its beginning, the same number of tokens from all choices.
    """
    if task.kind == "schema":
        common_end = common_start([ids[::-1] for ids in sequences])
        spans = [(len(ids) - common_end, len(ids)) for ids in sequences]
    else:
        start = common_start(sequences)
        if task.kind == "language_modeling":
            sequences = sequences[1:]  # without the context alone
        spans = [(start, len(ids)) for ids in sequences]

    # at least one token is scored, although one choice may be the beginning of another, or end
    # before the cut
    too_many = max(0, max(map(len, sequences)) - context)
    cuts = [min(too_many, max(0, len(ids) - 2)) for ids in sequences]
    kept, shifted = [], []
    for ids, (start, end), cut in zip(sequences, spans, cuts):
        start = min(start, end - 1)
        kept.append(ids[cut:])
        shifted.append((max(1, start - cut), end - cut))
    return Example(kept, shifted, gold)


def as_encoder(tokenizer):
    """A function: a list of texts -> a list of int arrays, each opened by <|bos|>."""
    bos = tokenizer.get_bos_token_id()
    if not hasattr(tokenizer, "encode_to_numpy"):
        return lambda texts: [np.array(ids) for ids in tokenizer.encode(texts, prepend=bos)]

    def encode(texts):
        ids, lengths = tokenizer.encode_to_numpy(texts, bos, torch.get_num_threads())
        return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
    return encode


def make_examples(task, rows, indices, encode, context, control=False):
    """The Examples of these rows. encode: a list of texts -> a list of int arrays with <|bos|>."""
    prompts = [render(task, rows, index, control) for index in indices]
    encoded = encode([text for texts in prompts for text in texts])
    examples, start = [], 0
    for index, texts in zip(indices, prompts):
        sequences = encoded[start:start + len(texts)]
        start += len(texts)
        gold = rows[index]["gold"] if task.kind in OPTIONS else -1
        examples.append(make_example(task, sequences, gold, context))
    return examples


# --------------------------------------------------------------------------------------------------
# token ids -> units of work

class Scored(NamedTuple):
    """Tokens of one choice that are predicted in one pass, at neighbouring positions."""
    in_pass: int    # 0 reads the beginning, k the end k - 1
    first: int      # the position that predicts the first of them
    tokens: list
    choice: int


class Unit(NamedTuple):
    """A beginning that has one prefill, and the ends to be read behind it."""
    example: int
    start: np.ndarray
    ends: list      # of int arrays
    scored: list    # of Scored


def units_of(number, example, share):
    """The Units of an Example. share: whether the model has a cache to share a beginning through.
    """
    sequences, spans = example.sequences, example.spans
    common = min(common_start(sequences), *(start for start, _ in spans), len(sequences[0]) - 1)
    if len(sequences) == 1 or not share or not common:
        units = []
        for choice, (ids, (start, end)) in enumerate(zip(sequences, spans)):
            scored = Scored(0, start - 1, ids[start:end].tolist(), choice)
            units.append(Unit(number, ids[:-1], [], [scored]))
        return units

    # the longest end of every example in the first pass, and so on: less padding
    ends, scored = [], []
    choices = sorted(range(len(sequences)), key=lambda choice: -len(sequences[choice]))
    for choice in choices:
        ids, (start, end) = sequences[choice], spans[choice]
        tokens = ids[start:end].tolist()
        if start == common:
            scored.append(Scored(0, common - 1, tokens[:1], choice))
            start, tokens = start + 1, tokens[1:]
        if tokens:
            ends.append(ids[common:-1])
            scored.append(Scored(len(ends), start - 1 - common, tokens, choice))
    return [Unit(number, sequences[0][:common], ends, scored)]


def longest_end(units):
    """Tokens of the longest end of all Units, 0 where they have none."""
    return max((len(end) for unit in units for end in unit.ends), default=0)


def fit_ends(units, context):
    """Units whose ends, padded to the longest, stay inside of the context."""
    longest = longest_end(units)
    fitting = []
    for unit in units:
        moved = len(unit.start) + longest - context
        if not unit.ends or moved <= 0:
            fitting.append(unit)
            continue
        kept = len(unit.start) - moved
        fitting.append(_move_into_ends(unit, kept))
    return fitting


def _move_into_ends(unit, kept):
    """A Unit with only `kept` tokens of its start, and the others in front of each of its ends.

    What the last token of the start predicted is then predicted in one of the ends.
    """
    moved = unit.start[kept:]
    ends = [np.concatenate((moved, end)) for end in unit.ends]
    scored = []
    for part in unit.scored:
        if part.in_pass == 0:
            scored.append(part._replace(in_pass=1, first=part.first - kept))
        else:
            scored.append(part._replace(first=part.first + len(moved)))
    return Unit(unit.example, unit.start[:kept], ends, scored)


def batches(units, tokens):
    """Lists of Units of similar length, each of about so many tokens with their padding.

    Units with and without ends are never in one batch: a full start has no room for padded ends.
    """
    def size(unit):
        length = len(unit.start)
        return bool(unit.ends), length // SIMILAR, longest_end([unit]), length

    batch = []
    for unit in sorted(units, key=size):
        width = len(unit.start) + longest_end([unit])
        is_full = (len(batch) + 1) * width > tokens
        if batch and (is_full or bool(batch[0].ends) != bool(unit.ends)):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------
# units -> log-probabilities

def padded(sequences, device):
    """Int arrays -> (N, longest) int64, filled up with 0 at the end."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(ids, sequences):
        row[:len(sequence)] = sequence
    return torch.from_numpy(ids).to(device)


def positions_of(units, number, T):
    """Where pass `number` of each Unit is scored: (N, n), n neighbouring positions below T.

    A Unit that is scored at fewer gets others besides. None where that would be all T.
    """
    scored = []
    for unit in units:
        parts = [part for part in unit.scored if part.in_pass == number]
        first = min((part.first for part in parts), default=0)
        end = max((part.first + len(part.tokens) for part in parts), default=0)
        scored.append((first, end))
    n = max(end - first for first, end in scored)
    n = max(n, 1)
    if n == T:
        return None
    # where fewer are scored at the end of a pass, the positions begin earlier
    firsts = [min(first, T - n) for first, _ in scored]
    firsts = torch.tensor(firsts)
    return firsts[:, None] + torch.arange(n)


class Passes:
    """The features of the scored positions of a batch of Units, gathered pass by pass."""

    def __init__(self, units):
        self.x, self.recent = [], []
        self.targets, self.owners = [], []  # tokens, and (number of the example, choice)
        self.units = units

    def read(self, number, model, idx, **where):
        """Read pass `number`, idx (N, T), and keep the features of what is scored of it.

        where: of a model with a cache, kv_cache and slots.
        """
        # 1. the features of neighbouring positions, from the first scored one of each row on
        at = positions_of(self.units, number, idx.size(1))
        firsts = [0] * len(self.units)
        if at is not None:
            firsts = at[:, 0].tolist()
            at = at.to(idx.device)
        x, recent = model.features(idx, at=at, **where)  # N, n, C; N, n, lookback or None

        # 2. those that are scored
        rows, positions = [], []
        for row, unit in enumerate(self.units):
            for part in unit.scored:
                if part.in_pass == number:
                    # neighbouring positions predict the tokens of a part
                    count = len(part.tokens)
                    rows += [row] * count
                    begin = part.first - firsts[row]
                    positions += range(begin, begin + count)
                    self.targets += part.tokens
                    self.owners += [(unit.example, part.choice)] * count
        rows = torch.tensor(rows, dtype=torch.long, device=x.device)
        positions = torch.tensor(positions, dtype=torch.long, device=x.device)
        self.x.append(x[rows, positions])
        if recent is not None:
            self.recent.append(recent[rows, positions])

    def joined(self, device):
        """x (n, C) in float32, recent (n, lookback) or None, targets (n,) of all passes."""
        x = torch.cat(self.x).float()
        recent = torch.cat(self.recent) if self.recent else None
        targets = torch.tensor(self.targets, device=device)
        return x, recent, targets


def read_units(model, units, device):
    """Passes of a batch of Units."""
    units = fit_ends(units, model.config.max_seq_len)
    found = Passes(units)
    starts = [unit.start for unit in units]
    most = max(len(unit.ends) for unit in units)
    idx = padded(starts, device)
    if not most:
        found.read(0, model, idx)
        return found

    # 1. what the choices of an example share, into a slot of its own
    longest = longest_end(units)
    kv_cache = model.new_kv_cache(len(units), idx.size(1) + longest)
    slots = list(range(len(units)))
    found.read(0, model, idx, kv_cache=kv_cache, slots=slots)
    kv_cache.advance(slots, [len(start) for start in starts])

    # 2. one end after another behind it; the lengths of the slots stay, so each overwrites the last
    for number in range(most):
        ends = []
        for unit in units:
            has_one = number < len(unit.ends)
            ends.append(unit.ends[number] if has_one else [])
        idx = padded(ends, device)
        found.read(number + 1, model, idx, kv_cache=kv_cache, slots=slots)
    return found


@torch.inference_mode()
def log_probs_of(model, units, device):
    """{(example, choice): [log-probability of each scored token]} of a batch of Units.

    NonFiniteError where one of them is not finite.
    """
    found = read_units(model, units, device)
    x, recent, targets = found.joined(device)
    if recent is not None:
        recent = recent[None]
    values = model.target_log_probs(x[None], recent, targets[None])[0]
    check_finite(values)
    return by_owner(found.owners, values.tolist())


def by_owner(owners, values):
    """{owner: its values in their order}. owners: of each value."""
    result = {}
    for owner, value in zip(owners, values):
        result.setdefault(owner, []).append(value)
    return result


@torch.inference_mode()
def leads_of(model, units, device):
    """{(example, 0): [lead of each scored token]}: by how much its logit exceeds all others'.

    NonFiniteError where one of them is not finite.
    """
    found = read_units(model, units, device)
    x, recent, targets = found.joined(device)
    leads = []
    size = max(1, CHUNK_LOGITS // model.config.vocab_size)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        logits = model.logits(x[part], None if recent is None else recent[part])
        label = targets[part, None]
        wanted = logits.gather(1, label)[:, 0]
        best_other = logits.scatter(1, label, -torch.inf).amax(-1)
        check_finite(wanted - best_other)
        leads += (wanted - best_other).tolist()
    return by_owner(found.owners, leads)


# --------------------------------------------------------------------------------------------------
# log-probabilities -> verdicts

class Verdict(NamedTuple):
    """credit: 1 right, 0 wrong, a share where choices tie. margin: how far it is from the other.

    scores: of all choices; None of language_modeling.
    """
    credit: float
    margin: float
    scores: list = None


def choose(scores, gold):
    """The Verdict of choices with these mean log-probabilities.

    Choices that tie with the best share the credit: two tasks have gold = 0 in every row, and a tie
    that goes to the first choice would score 100 % there.
    """
    best = max(scores)
    tied = [best - score <= TIE for score in scores]
    others = [score for choice, score in enumerate(scores) if choice != gold]
    return Verdict(tied[gold] / sum(tied), scores[gold] - max(others), scores)


def verdict_of(example, values):
    """The Verdict of an Example. values: for each sequence the list of its scored tokens' numbers.
    """
    if example.gold < 0:
        lead = min(values[0])
        return Verdict(float(lead > 0), lead)
    scores, known = [], {}
    for ids, span, numbers in zip(example.sequences, example.spans, values):
        score = sum(numbers) / len(numbers)
        # equal choices are equal to the bit, whatever the shape of the batch does to rounding
        scores.append(known.setdefault((ids.tobytes(), span), score))
    return choose(scores, example.gold)


def judge(model, examples, device, progress=None):
    """The Verdicts of Examples of one task, by one model. progress: called with the share done."""
    share = getattr(model, "shares_beginnings", True)
    tokens = getattr(model, "batch_tokens", BATCH_TOKENS)
    units = []
    for number, example in enumerate(examples):
        units += units_of(number, example, share)
    has_choices = any(example.gold >= 0 for example in examples)
    work = log_probs_of if has_choices else leads_of
    values, done = {}, 0
    for batch in batches(units, tokens):
        values.update(work(model, batch, device))
        done += len(batch)
        if progress:
            progress(done / len(units))

    verdicts = []
    for number, example in enumerate(examples):
        choices = range(len(example.sequences))
        of_choices = [values[number, choice] for choice in choices]
        verdicts.append(verdict_of(example, of_choices))
    return verdicts


def block_linears(model):
    """The matrices of a GPT but for its head."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    return [linear for linear in linears if not isinstance(linear, Head)]


def half_precision_copy(model):
    """A copy of a GPT whose blocks compute in bfloat16; embeddings and head are the model's own.

    So the last rounding of a logit is float32's: half of a bfloat16's last bit at a logit of 10 is
    0.03 nats, more than all blocks together err.
    """
    # 1. what deepcopy finds in its memo, it does not copy
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    for linear in block_linears(model):
        del memo[id(linear.weight)]
    copied = copy.deepcopy(model, memo)

    # 2. the matrices of the blocks
    for linear in block_linears(copied):
        linear.weight.data = linear.weight.data.to(torch.bfloat16)
    copied.compute_dtype = torch.bfloat16
    return copied


def scored_tokens(example):
    """Of how many tokens the mean that decides is, at least; 1 where the least lead decides."""
    if example.gold < 0:
        return 1
    return min(end - start for start, end in example.spans)


class NearTies:
    """Which margins bfloat16 may turn, for one model and all tasks.

    A few examples of every task are computed both ways. What bfloat16 changed in their margins is a
    sample of its error. The error of a mean of n tokens shrinks with the root of n, so that the
    errors of all tasks make one sample, of a single token's. SAFETY times the largest is taken for
    more than any error will be: of 8 errors of a normal distribution the largest has about 1.7
    standard deviations, and 4 times that are 7. Every example with a smaller margin is computed in
    float32 as well, which makes the sample larger.
    """

    def __init__(self):
        self.largest_error = 0.0  # of a margin of one token, in nats or in units of a logit
        self.compared = 0         # examples, by judge_fast()

    def to_compare(self, examples):
        """Indices of the examples of a block that are computed both ways, whatever their margin."""
        wanted = SAMPLE if self.compared else FIRST_SAMPLE
        return range(min(wanted, len(examples)))

    def bound(self, example):
        """A margin that is larger stays on its side in float32."""
        return SAFETY * self.largest_error / scored_tokens(example) ** 0.5

    def is_near(self, example, margin):
        """Whether float32 might turn this margin."""
        return abs(margin) < self.bound(example)

    def rivals(self, example, scores):
        """The Example without the choices that are certainly worse than the right one.

        scores: of the choices by bfloat16. All of an example of language_modeling.
        """
        if example.gold < 0:
            return example
        least = scores[example.gold] - self.bound(example)
        kept = [i for i, score in enumerate(scores) if i == example.gold or score > least]
        sequences = [example.sequences[i] for i in kept]
        spans = [example.spans[i] for i in kept]
        return Example(sequences, spans, kept.index(example.gold))

    def compare(self, example, rough, exact):
        """Take the margins of one example as bfloat16 and float32 give them."""
        error = abs(rough - exact) * scored_tokens(example) ** 0.5
        self.largest_error = max(self.largest_error, error)


def judge_fast(model, fast, examples, near_ties, device, progress=None):
    """The Verdicts of Examples of one task: `fast` computes all of them, `model` the near ties.

    fast: half_precision_copy(model), or None: then `model` computes all of them.
    """
    if fast is None:
        return judge(model, examples, device, progress)
    rough = judge(fast, examples, device, progress)
    verdicts = list(rough)
    chosen = {i: examples[i] for i in near_ties.to_compare(examples)}
    repeated = {}
    while chosen:
        # 1. the chosen ones in float32
        exact = judge(model, list(chosen.values()), device)
        for i, verdict in zip(chosen, exact):
            near_ties.compare(examples[i], rough[i].margin, verdict.margin)
            verdicts[i] = verdict
        near_ties.compared += len(chosen.keys() - repeated.keys())
        repeated |= chosen

        # 2. those that are near now; a larger error may have been seen
        chosen = {}
        for i, example in enumerate(examples):
            if not near_ties.is_near(example, rough[i].margin):
                continue
            doubtful = near_ties.rivals(example, rough[i].scores)
            has_more = i not in repeated
            if not has_more:
                has_more = len(doubtful.sequences) > len(repeated[i].sequences)
            if has_more:
                chosen[i] = doubtful
    return verdicts
