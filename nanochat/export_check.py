"""Whether an exported model is the model: the same logits, ids, prompts and greedy text.

    for finding in check_hf(model, tokenizer, folder):
        print(finding.line())

A tensor that a runtime leaves out, a rotation the other way round or another split of the text
raise no error: they are a different model. Therefore every export is loaded by the runtime that it
is for, and compared with the model it was made from.

1. logits: the largest difference over texts, conversations and random tokens, in float32.
2. ids: texts of many scripts and every token of the vocabulary as a text of its own.
3. conversations: the rendered prompt token for token; with a system message, several turns, calls
   of the tool, content as parts, and control tokens that a user has typed.
4. greedy text: of ten texts and ten questions. Where two tokens are nearly level, so that float32
   cannot order them, the comparison of that text ends.
"""
from typing import NamedTuple

import torch

from nanochat import prompts
from nanochat.conversation import normalise_messages
from nanochat.engine import Engine
from nanochat.hf_export import token_texts
from nanochat.hf_model import load_hf_model
from nanochat.loss_check import PROBE
from nanochat.tokenizer import ESCAPE

MAX_LOGIT_ERROR = 1e-3      # between two logits of the same token, in float32; of imports, too
RANDOM_SEQUENCES = 4
GREEDY_TOKENS = 32

TEXTS = (
    *prompts.TEXTS,
    "My name is",
    "In 1984 there were 12 of 365",
    "The cat sat on the",
    "class Point:\n    def __init__(self",
    "Die Stadt",
)
QUESTIONS = (
    *prompts.QUESTIONS,
    "I had 120 stamps and gave away 45. How many are left?",
    "Hello!",
    "What is the capital of France?",
    "Say <|assistant_end|> for me.",
    "Tell me a story.",
)
TRICKY_TEXTS = (
    PROBE.decode("utf-8"),
    "0 12 345 6789 3,141.59 2026-11-27 ½ ٣٤",
    "it's we'LL I'd they'Ve",
    "a  b   c\t\td\r\n\r\n  e\n\n\n",
    "x = {'a': [1, 2], \"b\": (3,)}  # comment!!! ...\n",
    "naïve façade, Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語, 한국어, 👩‍🚀",
    "",
)


def _call(code):
    function = {"name": "python", "arguments": {"code": code}}
    return {"type": "function", "function": function}


TYPED = "<|assistant_end|><|bos|><|python_start|>1+1 <| | > <|nothing|>"
CONVERSATIONS = {
    "one question": [
        {"role": "user", "content": "Hi"},
    ],
    "a system message": [
        {"role": "system", "content": "Be brief.\nAnswer in English."},
        {"role": "user", "content": "  Why? \n"},
    ],
    "several turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "12 times 7?"},
        {"role": "assistant", "content": "84"},
        {"role": "user", "content": "and 8?"},
    ],
    "a call as parts": [
        {"role": "user", "content": "12 times 7?"},
        {"role": "assistant", "content": [
            {"type": "python", "text": "12*7"},
            {"type": "python_output", "text": "84"},
            {"type": "text", "text": "It is 84."},
        ]},
        {"role": "user", "content": "Thanks"},
    ],
    "a call and a tool's reply": [
        {"role": "user", "content": "12 times 7?"},
        {"role": "assistant", "content": "Let me see: ", "tool_calls": [_call("12*7")]},
        {"role": "tool", "content": "84"},
        {"role": "assistant", "content": "It is 84."},
        {"role": "user", "content": "Thanks"},
    ],
    "content as parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [
            {"type": "text", "text": "12 times"},
            {"type": "text", "text": " 7?"},
        ]},
    ],
    "typed control tokens": [
        {"role": "system", "content": TYPED},
        {"role": "user", "content": TYPED},
        {"role": "assistant", "content": [{"type": "python", "text": TYPED}]},
        {"role": "user", "content": f"{ESCAPE}<|bos|>{ESCAPE}{ESCAPE} <{ESCAPE}|bos|>"},
    ],
}


class Finding(NamedTuple):
    """One comparison. detail: what was compared, or the first thing that differs."""
    name: str
    passed: bool
    detail: str

    def line(self):
        return f"{self.name:14s} {'passed' if self.passed else 'FAILED'}  {self.detail}"


# --------------------------------------------------------------------------------------------------
# what is compared, for any runtime

def render(tokenizer, messages, **options):
    """The ids of a conversation's prompt as the server makes them."""
    conversation = {"messages": normalise_messages(messages)}
    return tokenizer.render_for_completion(conversation, **options)


def greedy_prompts(model, tokenizer):
    """The prompts whose greedy text is compared: ids of TEXTS and QUESTIONS, cut to half of the
    context."""
    bos = tokenizer.get_bos_token_id()
    id_lists = tokenizer.encode(list(TEXTS), prepend=bos)
    for question in QUESTIONS:
        id_lists.append(render(tokenizer, [{"role": "user", "content": question}]))
    return [prompt[-(model.config.max_seq_len // 2):] for prompt in id_lists]


def our_greedy(model, tokenizer, prompt):
    """The greedy tokens after a prompt, a list of ids, up to an end token or the reply of a tool.

    The engine calls the tool, which other runtimes leave to their caller.
    """
    engine = Engine(model, tokenizer)
    sequence = engine.new_sequence(prompt, max_new_tokens=GREEDY_TOKENS, temperature=0)
    engine.admit(sequence)
    while sequence.status != "finished" and all(sequence.sampled):
        engine.step()
    engine.retire(sequence)
    if all(sequence.sampled):
        return sequence.tokens
    return sequence.tokens[:sequence.sampled.index(False)]


def logit_sequences(model, tokenizer):
    """Lists of ids on which logits are compared: the greedy prompts, and random tokens."""
    length = min(model.config.max_seq_len, 256)
    generator = torch.Generator().manual_seed(0)
    size = (RANDOM_SEQUENCES, length)
    noise = torch.randint(model.config.vocab_size, size, generator=generator)
    return greedy_prompts(model, tokenizer) + noise.tolist()


@torch.inference_mode()
def check_greedy(model, tokenizer, their_greedy, tie=0.0):
    """The Finding that greedy texts are the same.

    their_greedy: (prompt, number of tokens) -> list of ids, up to and with an end token. tie: by
    how much the logits of two tokens may differ where texts part, if more than MAX_LOGIT_ERROR.
    """
    tie = max(tie, MAX_LOGIT_ERROR)
    compared = 0
    for prompt in greedy_prompts(model, tokenizer):
        ours = our_greedy(model, tokenizer, prompt)
        theirs = their_greedy(prompt, len(ours))[:len(ours)]
        if ours != theirs and not _parts_at_a_tie(model, prompt, ours, theirs, tie):
            found = tokenizer.decode(theirs)
            wanted = tokenizer.decode(ours)
            return Finding("greedy text", False, f"{found[:60]!r} where {wanted[:60]!r} is due")
        compared += len(ours) if ours == theirs else _common(ours, theirs)
    count = len(TEXTS) + len(QUESTIONS)
    return Finding("greedy text", True, f"{count} prompts, {compared} tokens")


def _common(ours, theirs):
    """How many tokens two lists have in common at their beginning."""
    pairs = list(zip(ours, theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _parts_at_a_tie(model, prompt, ours, theirs, tie):
    """Whether two greedy texts part where their two tokens are level, as far as logits are exact.
    """
    place = _common(ours, theirs)
    if place == min(len(ours), len(theirs)):
        return False    # one of them ended early
    logits = model.next_token_logits([prompt + ours[:place]])[0]
    difference = logits[ours[place]] - logits[theirs[place]]
    return bool(difference.abs() <= tie)


def check_ids(tokenizer, their_encode, is_compared=lambda text: True):
    """The Finding that texts have the same ids.

    their_encode: list of texts -> lists of ids. is_compared: says of a text whether it is.
    """
    texts = [*TEXTS, *QUESTIONS, *TRICKY_TEXTS, *token_texts(tokenizer)]
    texts = [text for text in texts if text and is_compared(text)]
    # runtimes search plain text for control tokens, and escapes are the template's alone
    texts = [text for text in texts if "<|" not in text and ESCAPE not in text]
    ours, theirs = tokenizer.encode(texts), their_encode(texts)
    for text, wanted, found in zip(texts, ours, theirs):
        if wanted != list(found):
            detail = f"{text[:40]!r} has {list(found)[:8]} where {wanted[:8]} is due"
            return Finding("ids", False, detail)
    return Finding("ids", True, f"{len(texts)} texts")


def check_conversations(tokenizer, their_render, escapes_vanish=True):
    """The Finding that conversations are rendered alike: prompts, and conversations that end with
    an answer or a tool's reply.

    their_render: (messages, whether an answer follows) -> ids. escapes_vanish: whether the escapes
    in typed control tokens do; else those conversations are compared by their control tokens.
    """
    first_special = tokenizer.get_bos_token_id()
    for name, messages in CONVERSATIONS.items():
        for part, is_prompt, wanted in _cases_of(tokenizer, messages):
            found = their_render(part, is_prompt)
            if name == "typed control tokens" and not escapes_vanish:
                found = [token for token in found if token >= first_special]
                wanted = [token for token in wanted if token >= first_special]
            if found != wanted:
                return Finding("conversations", False, f"{name}: {found} where {wanted} is due")
    return Finding("conversations", True, ", ".join(CONVERSATIONS))


def _cases_of(tokenizer, messages):
    """(messages, whether an answer follows, ids) of a conversation and of its beginnings."""
    yield messages, True, render(tokenizer, messages)
    for end in range(1, len(messages)):
        part = messages[:end]
        role = part[-1]["role"]
        if role == "assistant":
            ids, _ = tokenizer.render_conversation({"messages": normalise_messages(part)})
            yield part, False, ids
        if role == "tool":
            yield part, True, render(tokenizer, part, continue_final_message=True)


# --------------------------------------------------------------------------------------------------
# transformers

@torch.inference_mode()
def check_hf(model, tokenizer, folder):
    """Yield a Finding of each comparison with the export in a folder, loaded by transformers.

    model: the model whose weights were written, on any device, computing in float32. UserError
    where the folder cannot be loaded.
    """
    loaded, loaded_tokenizer = load_hf_model(str(folder), model.device)
    theirs, fast = loaded.model, loaded_tokenizer.tokenizer
    yield _check_logits(model, tokenizer, theirs)

    def encode(texts):
        return fast(list(texts), add_special_tokens=False)["input_ids"]

    yield check_ids(tokenizer, encode)

    def render_by_template(messages, is_prompt):
        return fast.apply_chat_template(
            messages, add_generation_prompt=is_prompt, tokenize=True, return_dict=False)

    yield check_conversations(tokenizer, render_by_template)

    def greedy(prompt, count):
        ids = torch.tensor([prompt], device=model.device)
        found = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, count),
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=tokenizer.get_bos_token_id(),
        )
        return found[0, len(prompt):].tolist()

    yield check_greedy(model, tokenizer, greedy)


def _check_logits(model, tokenizer, theirs):
    worst = 0.0
    sequences = logit_sequences(model, tokenizer)
    for ids in sequences:
        idx = torch.tensor([ids], device=model.device)
        wanted = model(idx)
        found = theirs(input_ids=idx, use_cache=False).logits.float()
        if found.shape != wanted.shape:
            return Finding("logits", False, f"shape {list(found.shape)}, not {list(wanted.shape)}")
        difference = (found - wanted).abs().max().item()
        worst = max(worst, difference) if difference == difference else float("inf")
    detail = (f"{len(sequences)} sequences, largest difference {worst:.2g}, "
              f"at most {MAX_LOGIT_ERROR:g}")
    return Finding("logits", worst <= MAX_LOGIT_ERROR, detail)
