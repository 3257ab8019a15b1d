"""The model classes: a checkpoint names one of these, and `--model` chooses one.

A variant overrides GPT in a file of its own; this table is the only place that lists them.
"""
from nanochat.gpt import GPT
from nanochat.variants.deepseek import DeepSeekGPT
from nanochat.variants.llada import LLaDAGPT
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.mla import MLAGPT
from nanochat.variants.ngrams import NGramGPT
from nanochat.variants.portable import PortableGPT

MODEL_CLASSES = {
    "gpt": GPT,                   # the documented model, everywhere the reference
    "lookup": LookupGPT,          # with tables of pairs, triples and values: for minutes of time
    "lookup_ngrams": NGramGPT,    # and with counts of the training text mixed into its prediction
    "portable": PortableGPT,      # shaped like Qwen3, for runtimes that others wrote
    "mla": MLAGPT,                # with latent attention, whose cache is a sixth of the size
    "deepseek": DeepSeekGPT,      # and with experts, of which each token uses a few
    "llada": LLaDAGPT,            # fills in masked tokens in any order: masked diffusion
}

# What pretraining makes of a class where it counts n-grams; --model names the class without.
WITH_COUNTS = {"lookup": "lookup_ngrams"}
CAUSAL = [name for name, kind in MODEL_CLASSES.items() if kind.causal]
TRAINABLE = [name for name in MODEL_CLASSES if name not in WITH_COUNTS.values()]


def default_model(device_type):
    """The class that pretraining takes on a device: lookups pay on a CPU (dev/LOG.md).

    On MPS as well, whose budget and shapes are the CPU's: minutes, and few layers.
    """
    return "gpt" if device_type == "cuda" else "lookup"


def name_of(model):
    """The name of a model's class in MODEL_CLASSES, for a checkpoint's meta file."""
    return next(name for name, kind in MODEL_CLASSES.items() if kind is type(model))
