"""A local Hugging Face model behind the few names by which one of ours is measured.

    model, tokenizer = load_hf_model("models/gpt2", device)

Whole sequences are read, without a shared beginning, for every architecture caches in its own way.
Nothing is fetched: the folder holds config.json, the weights and the tokenizer, as save_pretrained
and `hf download --local-dir` leave them. transformers is no package of this repository, so that it
has to be installed for this alone.
"""
import types
from pathlib import Path

import torch

from nanochat.common import UserError, expand_home
from nanochat.core_eval import CHUNK_LOGITS
from nanochat.gpt import take

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
LONGEST_CONTEXT = 2048  # tokens, as nanochat's own models have: longer prompts differ from CORE's


class HFModel:
    """A causal language model of transformers, in float32.

    features() gives what our models give logits from; here it is the logits themselves, and
    batch_tokens keeps them small.
    """
    shares_beginnings = False
    training = False

    causal = True
    val_bpb_name = "val_bpb"

    def __init__(self, model, vocab_size, context, unused=()):
        """unused: names of tensors in its files for which its class has no place."""
        self.model = model
        self.unused = unused
        self.config = types.SimpleNamespace(vocab_size=vocab_size, max_seq_len=context)
        self.batch_tokens = max(context, CHUNK_LOGITS // vocab_size)

    @property
    def max_targets(self):
        """As of a GPT."""
        return self.config.max_seq_len

    def features(self, idx, at=None):
        """idx (B, T) -> (logits (B, T, V) in float32, or (B, n, V) at positions (B, n); None).

        The padding is behind, where it changes nothing before it."""
        return take(self.model(input_ids=idx, use_cache=False).logits, at).float(), None

    def logits(self, x, recent):
        """x (n, V) as features() gave it."""
        return x

    def target_log_probs(self, x, recent, targets):
        """x (B, n, V), targets (B, n) -> (B, n) in nats."""
        found = x.gather(-1, targets[..., None])[..., 0]
        return found - x.logsumexp(-1)

    def log_probs(self, idx, targets):
        """idx, targets (B, T) -> (B, T) in nats; 0 where the target is -1."""
        x, recent = self.features(idx)
        found = self.target_log_probs(x, recent, targets.clamp(min=0))
        return torch.where(targets >= 0, found, 0.0)

    def log_probs_of_both(self, idx, targets):
        """As of GPT, where nothing is mixed in."""
        found = self.log_probs(idx, targets)
        return found, found

    def eval(self):
        """It always is."""
        return self

    def train(self, mode=True):
        """It never does."""
        return self

    def step_zero(self):
        """A model of the same shape as its class initialises it, on the same device."""
        device = next(self.model.parameters()).device
        model = type(self.model)(self.model.config).to(device).eval()
        return HFModel(model, self.config.vocab_size, self.config.max_seq_len)


class HFTokenizer:
    """The tokenizer of such a model, with the methods that are used."""

    def __init__(self, tokenizer, bos):
        self.tokenizer = tokenizer
        self.bos = bos

    def get_bos_token_id(self):
        """What opens a text: the model's own, else what ends its texts, as of GPT-2."""
        return self.bos

    def encode(self, texts, prepend):
        """A list of texts -> a list of lists of ids."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[prepend, *ids] for ids in encoded]

    def decode(self, ids):
        """The text of ordinary tokens."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def load_hf_model(path, device):
    """(HFModel, HFTokenizer) of a folder. UserError where it is none, or transformers is missing.
    """
    folder = Path(expand_home(path, "write the whole path"))
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is no folder with a config.json: fetch the model first, "
                        "for example with `hf download NAME --local-dir FOLDER`")
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"to read {path}, the package transformers is needed: "
                        "`uv pip install transformers`") from None
    failures = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except (*failures, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be loaded ({reason}): fetch the model again with "
                        "its tokenizer, or take a newer transformers") from error
    # transformers would draw these at random, and only warn
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(f"{path} cannot be loaded (its files lack {len(missing)} weights, "
                        f"such as {missing[0]}): fetch the model again")

    bos = tokenizer.bos_token_id
    bos = tokenizer.eos_token_id if bos is None else bos
    if bos is None:
        raise UserError(f"the tokenizer in {path} has no token that begins or ends a text: "
                        "set bos_token in its tokenizer_config.json")
    known = [getattr(model.config, name, None) for name in CONTEXT_NAMES]
    context = min([LONGEST_CONTEXT, *(length for length in known if length)])
    vocab_size = model.get_output_embeddings().weight.size(0)
    model = model.to(device).eval()
    unused = sorted(loaded["unexpected_keys"])
    return HFModel(model, vocab_size, context, unused), HFTokenizer(tokenizer, bos)
