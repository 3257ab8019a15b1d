"""
Chat with a trained model in the terminal.

    python -m scripts.chat_cli                          # a conversation
    python -m scripts.chat_cli -p "what is 12 * 34?"    # one answer
    python -m scripts.chat_cli --source=mid --temperature=0
    python -m scripts.chat_cli --source=base            # texts in place of questions

A base model has read no conversations: it continues the text that it is given, and does not answer.
In a conversation, quit ends it and clear starts a new one. Ctrl+C ends the current answer; at the
prompt it ends the program.
"""
import sys

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.completion import print_continuation, print_stream
from nanochat.configurator import configure
from nanochat.conversation import (
    fit_conversation,
    normalise_messages,
    prompt_room,
    questions_of,
)
from nanochat.engine import Engine
from nanochat.folders import chosen_line
from nanochat.passage_store import load_passages
from tasks.identity import shown_name

source = "sft"              # which checkpoint: base, mid, sft or rl
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: the last, of a base model the best
prompt: str = None          # one question (-p): answer it and leave
temperature = 0.6           # 0 always takes the likeliest token
top_k = 50                  # sample among this many tokens
max_tokens = 256            # longest answer
seed = 42                   # the same seed gives the same answers
device_type = ""            # cuda, mps or cpu. Empty: the best one here
dtype = ""                  # float32 or bfloat16. Empty: what the hardware does well


def answer(engine, tokenizer, messages):
    """Print the answer as it comes and return its text.

    Ctrl+C ends the answer early. UserError if the question is too long for the context.
    """
    # 1. the conversation as ids, its oldest turns dropped where there is no room for an answer
    room = prompt_room(engine.max_seq_len, max_tokens)
    messages = normalise_messages(messages)
    questions = questions_of(messages)
    messages = fit_conversation(tokenizer, messages, room)
    ids = tokenizer.render_for_completion({"messages": messages})

    # 2. the answer, piece by piece
    stream = engine.stream(
        ids,
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed + len(messages),  # with one seed, every turn would sample alike
        questions=questions,
    )
    text = print_stream(stream)
    cut = stream.finish_reason == "length"
    print(" (cut at max_tokens)" if cut else "", flush=True)
    return text


def question(text):
    """The text as a user's message. UserError when there is nothing in it.

    Half a character, which -p may bring as a lone surrogate, becomes "?".
    """
    if not text.strip():
        raise UserError('the prompt is empty: write -p "your question"')
    text = text.encode("utf-8", "replace").decode("utf-8")
    return {"role": "user", "content": text.strip()}


def chat(engine, tokenizer, name="nanochat"):
    """Question and answer until quit, the end of input, or Ctrl+C at the prompt."""
    messages = []
    print("quit ends the conversation, clear starts a new one")
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "quit":
            return
        if text == "clear":
            messages = []
            print("a new conversation")
        elif text:
            print(f"{name}: ", end="", flush=True)
            try:
                reply = answer(engine, tokenizer, [*messages, question(text)])
            except UserError as error:
                print(f"({error})")
                continue
            if reply.strip():   # an answer stopped before its first word leaves no trace
                messages += [question(text), {"role": "assistant", "content": reply}]


def continue_text(engine, tokenizer, text):
    """Print a text and what the model continues it with."""
    print_continuation(
        engine,
        tokenizer,
        text,
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )


def continue_texts(engine, tokenizer):
    """Text and continuation until quit, the end of input, or Ctrl+C at the prompt."""
    print("a base model: it continues the text that you type, and does not answer; quit ends")
    while True:
        try:
            text = input("\ntext: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip() == "quit":
            return
        if text.strip():
            continue_text(engine, tokenizer, text)


def say_choice(line, once):
    """Print which model was taken. Where one answer was asked for, standard output is for that, and
    standard error for at most one line, where no person reads it."""
    if not once:
        print0(line)
    elif sys.stderr.isatty():
        print0(line, file=sys.stderr)


def main():
    continues = source == "base"
    once = None
    if prompt is not None and not continues:
        once = [question(prompt)]
    compute = compute_init(device_type, dtype)
    model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
    model.cast_for_inference(compute.dtype)  # the checkpoint's may be another machine's
    engine = Engine(model, tokenizer, load_passages(meta))
    say_choice(chosen_line(source, meta), prompt is not None)
    if once:
        answer(engine, tokenizer, once)
    elif continues and prompt is not None:
        continue_text(engine, tokenizer, prompt)
    elif continues:
        continue_texts(engine, tokenizer)
    else:
        chat(engine, tokenizer, shown_name(meta))
    compute_cleanup()


if __name__ == "__main__":
    configure(globals(), aliases={"p": "prompt"})
    main()
