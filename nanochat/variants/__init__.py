"""The model classes: a checkpoint names one of these, and `--model` chooses one.

A variant overrides GPT in a file of its own; this table is the only place that lists them.
"""
from nanochat.gpt import GPT
from nanochat.variants.lookup import LookupGPT
from nanochat.variants.ngrams import NGramGPT
from nanochat.variants.portable import PortableGPT

MODEL_CLASSES = {
    "gpt": GPT,                   # the documented model, everywhere the reference
    "lookup": LookupGPT,          # with tables of pairs, triples and values: the CPU's default
    "lookup_ngrams": NGramGPT,    # and with counts of the training text mixed into its prediction
    "portable": PortableGPT,      # shaped like Qwen3, for runtimes that others wrote
}

# What --model may name: pretraining makes lookup_ngrams of lookup where it counts n-grams.
TRAINABLE = [name for name in MODEL_CLASSES if name != "lookup_ngrams"]
