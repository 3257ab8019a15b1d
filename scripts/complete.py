"""
Continue a text with a base model.

    python -m scripts.complete "My name is"
    python -m scripts.complete "My name is" "The sea was" --max_tokens=50 --temperature=0
    python -m scripts.complete <draft.txt               # the text is what is piped in
    python -m scripts.complete -- "- milk"              # a text that begins with a dash

A base model has read texts and no conversations: it does not answer, it writes what may come next.
Each text is printed with its continuation. Of a text that is longer than the model's context the
end is continued. An empty text gives a new one. Ctrl+C ends the current continuation.
"""
import sys

from nanochat.checkpoint_manager import load_model
from nanochat.common import compute_cleanup, compute_init, print0
from nanochat.completion import print_continuation
from nanochat.configurator import configure
from nanochat.diffusion_engine import engine_of
from nanochat.engine import check_sampling
from nanochat.folders import chosen_line

model_tag: str = None       # the base model's folder, such as d4. None: the newest
step: int = None            # its step. None: the best by validation
temperature = 0.8           # 0 always takes the likeliest token
top_k = 50                  # sample among this many tokens; 0: among all
max_tokens = 128            # longest continuation
seed = 42                   # the same seed gives the same continuations
device_type = ""            # cuda, mps or cpu. Empty: the best one here
dtype = ""                  # float32 or bfloat16. Empty: what the hardware does well


def piped_text():
    """What standard input holds, without its last line break."""
    if sys.stdin.isatty():
        print("type the text to continue; Ctrl+D on an empty line ends it", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def main(texts):
    check_sampling(temperature, top_k, max_tokens)
    texts = texts or [piped_text()]

    # the model
    compute = compute_init(device_type, dtype)
    model, tokenizer, meta = load_model("base", compute.device, "eval", model_tag, step)
    if sys.stderr.isatty():
        print0(chosen_line("base", meta), file=sys.stderr)  # standard output is for the texts
    model.cast_for_inference(compute.dtype)  # the checkpoint's may be another machine's
    engine = engine_of(model, tokenizer)

    # each text and its continuation, a line between them
    for number, text in enumerate(texts):
        if number:
            print("---")
        print_continuation(
            engine,
            tokenizer,
            text,
            max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
    compute_cleanup()


if __name__ == "__main__":
    given = []
    configure(globals(), texts=given)
    main(given)
