"""
Chat with a trained model in the terminal.

    python -m scripts.chat_cli                          # a conversation
    python -m scripts.chat_cli -p "what is 12 * 34?"    # one answer
    python -m scripts.chat_cli --source=mid --temperature=0
    python -m scripts.chat_cli --system="Be brief." --load=talk.json
    python -m scripts.chat_cli --source=base            # texts in place of questions

A base model has read no conversations: it continues the text that it is given, and does not answer.
In a conversation, quit ends it, clear starts a new one, and /help lists what else there is. Ctrl+C
ends the current answer; at the prompt it ends the program.
"""
import contextlib
import json
import math
import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from nanochat.checkpoint_manager import load_model
from nanochat.common import (
    UserError,
    atomic_write,
    compute_cleanup,
    compute_init,
    expand_home,
    print0,
)
from nanochat.completion import print_continuation, print_stream
from nanochat.configurator import configure
from nanochat.conversation import (
    fit_conversation,
    normalise_messages,
    prompt_room,
    questions_of,
)
from nanochat.diffusion_engine import denoising_of, engine_of
from nanochat.engine import check_sampling
from nanochat.folders import chosen_line
from nanochat.passage_store import load_passages
from tasks.identity import shown_name

source = "sft"              # which checkpoint: base, mid, sft or rl
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: the last, of a base model the best
prompt: str = None          # one question (-p): answer it and leave
system = ""                 # the system prompt
load = ""                   # a file that /save wrote: continue its conversation
temperature = 0.6           # 0 always takes the likeliest token
top_k = 50                  # sample among this many tokens
max_tokens = 256            # longest answer
seed = 42                   # the same seed gives the same answers
block_length: int = None    # of a diffusion model (docs/llada.md), tokens of a block. None: 32
steps: int = None           # of such a model, passes for a block. None: one for each token
edit_below: float = None    # of such a model, confidence below which tokens are edited. None: 0
capture = True               # on a GPU, replay the decode step as a CUDA graph
stats = False               # after each answer, say how many tokens a second there were
device_type = ""            # cuda, mps or cpu. Empty: the best one here
dtype = ""                  # float32 or bfloat16. Empty: what the hardware does well

# What /set changes, with the type of its value and the lowest one
SAMPLING = {
    "temperature": (float, 0),
    "top_k": (int, 0),
    "max_tokens": (int, 1),
    "seed": (int, 0),
}


class Chat:
    """A conversation and how its answers are sampled.

    name: what stands before an answer; "" for nothing. system: the system prompt, "" for none.
    messages: question and answer in turn. sampling: a value for each name of SAMPLING. answers:
    how many were begun; each is sampled with a seed of its own.
    """

    def __init__(self, engine, tokenizer, name=""):
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self.system = in_unicode(system)
        self.messages = []
        self.sampling = {key: globals()[key] for key in SAMPLING}
        self.answers = 0

    def take(self, line):
        """Do what a line at the prompt asks for. A UserError is printed: the chat continues."""
        word, _, rest = line.partition(" ")
        try:
            if line == "clear":
                self.clear("")
            elif re.fullmatch(r"/[a-z]+", word):
                command(word).action(self, rest.strip())
            else:
                self.ask(line)
        except UserError as error:
            print(f"({error})")
        except KeyboardInterrupt:   # before the answer's first step
            print(" (stopped)")

    def ask(self, text):
        """Print the answer to a question, and keep both."""
        self._reply([*self.messages, question(text)])

    def _reply(self, messages):
        """Answer the last message. An answer stopped before its first word leaves no trace."""
        if self.name:
            print(f"{self.name}: ", end="", flush=True)
        self.answers += 1
        sampling = {**self.sampling, "seed": self.sampling["seed"] + self.answers}
        reply = answer(self.engine, self.tokenizer, self._with_system(messages), **sampling)
        if reply.strip():
            self.messages = [*messages, {"role": "assistant", "content": reply}]

    def _with_system(self, messages):
        """The messages behind the system prompt, if there is one."""
        if not self.system:
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    # what the commands do; each gets the text behind its word

    def clear(self, _):
        self.messages = []
        print("a new conversation")

    def regenerate(self, _):
        """Answer the last question again, with other random numbers."""
        messages = self.messages
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError("there is no question yet: ask one")
        self._reply(messages)

    def set_system(self, text):
        self.system = text
        print("the system prompt holds from the next answer on" if text else "no system prompt")

    def save(self, name):
        """Write the conversation. A file that holds something else is not overwritten."""
        path = file_of(name)
        messages = self._with_system(self.messages)
        if not messages:
            raise UserError("there is nothing to save yet: ask a question")
        try:
            if path.exists():
                read_conversation(path)
            atomic_write(path, json.dumps({"messages": messages}, indent=1, ensure_ascii=False))
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): name another file") from error
        print(f"saved {path}: {len(self.messages)} messages")

    def load(self, name):
        """Continue a conversation that was saved."""
        path = file_of(name)
        messages = read_conversation(path)
        self.system = ""
        if messages[0]["role"] == "system":
            self.system = messages.pop(0)["content"]
        self.messages = messages
        print0(f"loaded {path}: {len(messages)} messages", file=sys.stderr)

    def set(self, text):
        """Change how answers are sampled: "temperature 0.3"."""
        key, _, value = text.partition(" ")
        if key not in SAMPLING:
            current = ", ".join(f"{key} {value}" for key, value in self.sampling.items())
            raise UserError(f"/set takes a name and a value; now: {current}")
        kind, lowest = SAMPLING[key]
        try:
            number = kind(value)
        except ValueError:
            number = -1
        if not lowest <= number < math.inf:
            raise UserError(f"{key} must be a number from {lowest}, such as {self.sampling[key]}")
        sampling = {**self.sampling, key: number}
        check_sampling(sampling["temperature"], sampling["top_k"], sampling["max_tokens"])
        self.sampling = sampling
        print(f"{key} is {number} from the next answer on")

    def help(self, _):
        for known in COMMANDS:
            print(f"  {known.word + ' ' + known.argument:16} {known.meaning}")
        print("  quit             end the program; Ctrl+C ends an answer")


class Command(NamedTuple):
    """A word at the prompt, the argument that it takes, and what it does."""
    word: str
    argument: str
    meaning: str
    action: object      # called with the Chat and the argument


COMMANDS = [
    Command("/system", "TEXT", "set the system prompt; without TEXT: none", Chat.set_system),
    Command("/regenerate", "", "answer the last question again", Chat.regenerate),
    Command("/set", "NAME N", "change temperature, top_k, max_tokens or seed", Chat.set),
    Command("/save", "FILE", "write the conversation to a file, as JSON", Chat.save),
    Command("/load", "FILE", "continue a conversation that was saved", Chat.load),
    Command("/clear", "", "start a new conversation; the system prompt stays", Chat.clear),
    Command("/help", "", "this list", Chat.help),
]


def command(word):
    """The Command of a word. UserError for an unknown one."""
    for known in COMMANDS:
        if known.word == word:
            return known
    raise UserError(f"{word} is not known: /help lists what there is")


def file_of(name):
    """The path of a file that the user named. UserError for no name."""
    if not name or "\0" in name:
        raise UserError("name a file, such as talk.json")
    return Path(expand_home(name, "name the file by its whole path"))


def read_conversation(path):
    """The messages of a file that /save wrote, well formed. UserError for any other file."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no conversation, which is JSON: name another file") from error
    messages = saved.get("messages") if isinstance(saved, dict) else saved
    try:
        messages = normalise_messages(messages)
    except UserError as error:
        raise UserError(f"{path} is no conversation ({error}): name another file") from error
    if not messages:
        raise UserError(f"{path} has no message with a text: name another file")
    return messages


def answer(engine, tokenizer, messages, temperature, top_k, max_tokens, seed):
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
        seed=seed,
        questions=questions,
    )
    started = time.perf_counter()
    text = print_stream(stream)
    cut = stream.finish_reason == "length"
    print(" (cut at max_tokens)" if cut else "", flush=True)
    if stats:
        print_stats(stream, time.perf_counter() - started)
    return text


def print_stats(stream, seconds):
    """One line about an answer, on standard error: standard output may be a pipe for the answer."""
    count = stream.completion_tokens
    print0(
        f"({stream.prompt_tokens} tokens of the prompt and {count} of the answer in {seconds:.2f} "
        f"s: {count / seconds:,.0f} tokens/s)",
        file=sys.stderr,
    )


def question(text):
    """The text as a user's message. UserError when there is nothing in it."""
    if not text.strip():
        raise UserError('the prompt is empty: write -p "your question"')
    return {"role": "user", "content": in_unicode(text).strip()}


def in_unicode(text):
    """The text with "?" for half a character, which the command line brings as a lone surrogate."""
    return text.encode("utf-8", "replace").decode("utf-8")


def converse(chat):
    """Question and answer until quit, the end of input, or Ctrl+C at the prompt."""
    print("quit ends the conversation, clear starts a new one, /help lists what else there is")
    while True:
        try:
            text = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("quit", "/quit"):
            return
        if text:
            chat.take(text)


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


def check_settings(continues):
    """UserError for settings that can be refused before a model is loaded.

    continues: whether it is a base model.
    """
    check_sampling(temperature, top_k, max_tokens)
    if continues and (system or load):
        raise UserError("a base model has read no conversations: leave --system and --load out")
    if prompt is not None and not continues:
        question(prompt)
    if load:
        read_conversation(file_of(load))


def main():
    continues = source == "base"
    check_settings(continues)
    compute = compute_init(device_type, dtype)
    model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
    model.cast_for_inference(compute.dtype)  # the checkpoint's may be another machine's
    denoising = denoising_of(
        model, block_length=block_length, steps=steps, edit_below=edit_below)
    # On a GPU in one slot that is kept, whose decode step is captured (graph_decode.py).
    slots = 1 if capture and compute.device.type == "cuda" else None
    engine = engine_of(model, tokenizer, load_passages(meta), denoising, slots)
    say_choice(chosen_line(source, meta), prompt is not None)
    with contextlib.suppress(ImportError):
        import readline     # noqa: F401, gives input() a history and lets a line be edited
    if continues and prompt is not None:
        continue_text(engine, tokenizer, prompt)
    elif continues:
        continue_texts(engine, tokenizer)
    else:
        talk(Chat(engine, tokenizer), shown_name(meta))
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl+C twice: the program is ending already
    compute_cleanup()


def talk(chat, name):
    """Answer the one question of -p, or hold a conversation as `name`."""
    if load:
        chat.load(load)
        chat.system = in_unicode(system) or chat.system
    if prompt is not None:
        chat.ask(prompt)
        return
    chat.name = name
    converse(chat)


if __name__ == "__main__":
    configure(globals(), aliases={"p": "prompt"})
    main()
