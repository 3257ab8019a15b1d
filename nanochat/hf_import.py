"""A local model of transformers as one of ours: its config, weights and vocabulary.

    theirs, their_tokenizer = load_hf_model("models/Qwen3-0.6B", "cpu")
    read = read_with_ids(Path("models/Qwen3-0.6B/tokenizer.json"))
    model_class, config = config_from(theirs, read.tokenizer.get_vocab_size(), None)
    rows = rows_of_tokens(read, their_tokenizer.bos, theirs.config.vocab_size)
    weights = weights_from(theirs, model_class, config, rows)

NanoChat becomes our plain GPT; Qwen3, Llama and Mistral become the portable model (tied or not, any
number of key/value heads, with the gains of their norms). The names of the weights are those of
hf_names.py. What our models cannot compute is refused in one line rather than left away: biases,
scaled rotary positions, windows of attention. Whoever imports compares the logits, besides.

Our tokenizer numbers tokens in its own order and ends with our special tokens (tokenizer_json.py),
so that the rows of embedding and head are put into that order. A special token of ours that their
tokenizer has by the same name keeps its row, <|bos|> gets that of the token that opens their texts,
and the others, of which their model knows nothing, get the mean of the rows of all tokens: the
usual beginning of a token that is added (Hewitt, "Initializing New Word Embeddings", 2021).
"""
from dataclasses import asdict
from typing import NamedTuple

import torch

from nanochat.checkpoint_manager import uninitialised_model
from nanochat.common import UserError
from nanochat.hf_model import LONGEST_CONTEXT
from nanochat.hf_names import hf_names
from nanochat.tokenizer import SPECIAL_TOKENS
from nanochat.variants import MODEL_CLASSES

SEQUENCES, TOKENS = 4, 128  # on which logits are compared


class Family(NamedTuple):
    """An architecture of transformers that one of our classes computes."""
    model_class: str    # in MODEL_CLASSES
    activation: str     # of the MLP
    qk_norm: bool


FAMILIES = {    # by the model_type of their config
    "nanochat": Family("gpt", "relu2", True),
    "qwen3": Family("portable", "silu", True),
    "llama": Family("portable", "silu", False),
    "mistral": Family("portable", "silu", False),
}


# ------------------------------------------------------------------------------------------------
# the config

def config_from(theirs, vocab_size, max_seq_len):
    """(name of our class, our config) of an HFModel.

    vocab_size: of our tokenizer. max_seq_len: the context, in tokens; None: theirs, at most
    LONGEST_CONTEXT. UserError for a model that ours cannot compute.
    """
    config = theirs.model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"a model of type {config.model_type} cannot be imported: take one of type "
            f"{', '.join(FAMILIES)}, or measure it in place with --hf-path of scripts.base_loss")
    length = max_seq_len or min(config.max_position_embeddings, LONGEST_CONTEXT)
    rotary_base = _checked_rotary_base(config)
    _check_shape(config, family, length)

    fields = {
        "depth": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocab_size": vocab_size,
        "max_seq_len": length,
        "rotary_base": rotary_base,
    }
    if family.model_class == "gpt":
        fields["softcap"] = config.final_logit_softcapping or 0.0
    else:
        fields.update(
            mlp_width=config.intermediate_size,
            tied=bool(config.tie_word_embeddings),
            norm_eps=config.rms_norm_eps,
            head_dim=_head_dim(config),
            qk_norm=family.qk_norm,
        )
    return family.model_class, MODEL_CLASSES[family.model_class].config_class(**fields)


def _head_dim(config):
    """The dimensions of a head; older configs do not tell."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _checked_rotary_base(config):
    """The base of the rotary frequencies. UserError where they are scaled, or turn a part alone.

    Older versions of transformers have rope_theta and rope_scaling in place of rope_parameters.
    """
    older = {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    older.update(getattr(config, "rope_scaling", None) or {})
    rope = getattr(config, "rope_parameters", None) or older
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise UserError(
            f"its rotary positions are scaled ({kind}), which our models do not compute: take a "
            "model without rope_scaling")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"rotary positions turn {rope['partial_rotary_factor']:g} of each head, all of it in "
            "our models: take another model")
    return float(rope["rope_theta"])


def _check_shape(config, family, length):
    """UserError for what our class has in one form only. length: of our context, in tokens."""
    width, heads = config.hidden_size, config.num_attention_heads
    if config.hidden_act != family.activation:
        raise UserError(
            f"the activation of its MLP is {config.hidden_act}, ours {family.activation}: "
            "take another model")
    if length > config.max_position_embeddings:
        raise UserError(
            f"max_seq_len={length} is more than the {config.max_position_embeddings} tokens that "
            "the model has learnt to read: give less")
    window = getattr(config, "sliding_window", None)
    if window and length > window:
        raise UserError(
            f"its attention looks back {window} tokens at most, ours over the whole context of "
            f"{length}: give --max_seq_len={window} or less")
    if width % heads:
        raise UserError(
            f"its width of {width} is not a multiple of its {heads} heads, as that of our models "
            "is: take another model")
    needed = 4 * width
    if family.model_class == "gpt" and config.intermediate_size != needed:
        raise UserError(
            f"its MLP is {config.intermediate_size} wide, ours 4 times the width, {needed}: take "
            "another model")
    if family.model_class == "gpt" and _head_dim(config) != width // heads:
        raise UserError(
            f"its heads have {_head_dim(config)} dimensions, ours width / heads = "
            f"{width // heads}: take another model")


# ------------------------------------------------------------------------------------------------
# the weights

def rows_of_tokens(read, bos, their_rows):
    """The row of their embedding of each of our tokens, a list; -1 where it gets the mean.

    read: a TheirTokenizer. bos: their id of what opens a text. their_rows: how many rows they have.
    UserError where a token has no row.
    """
    rows = [-1 if token_id is None else token_id for token_id in read.ids]
    first_special = len(rows) - len(SPECIAL_TOKENS)
    at_bos = first_special + SPECIAL_TOKENS.index("<|bos|>")
    if rows[at_bos] < 0:
        rows[at_bos] = bos
    if max(rows) >= their_rows:
        raise UserError(
            f"its tokenizer.json has a token {max(rows)}, but the model knows {their_rows} tokens: "
            "fetch model and tokenizer again")
    return rows


def weights_from(theirs, model_class, config, rows):
    """Our state dict of an HFModel's weights, in float32.

    model_class, config: of config_from(). rows: of rows_of_tokens(). UserError where either of the
    two has weights that the other lacks, or of another shape.
    """
    meta = {"model_class": model_class, "config": asdict(config)}
    wanted = uninitialised_model(meta, "meta")
    names = hf_names(wanted)
    given = dict(theirs.model.named_parameters())
    given["lm_head.weight"] = theirs.model.get_output_embeddings().weight  # tied, it has no name
    _check_names(given.keys(), set(names.values()), theirs.unused)

    weights = {}
    for ours, tensor in wanted.state_dict().items():
        weight = given[names[ours]].detach().float()
        if ours in ("embed.weight", "head.weight"):
            weight = _reordered(weight, rows, tensor.size(0))
        if weight.shape != tensor.shape:
            raise UserError(
                f"{names[ours]} is of shape {list(weight.shape)}, in our model "
                f"{list(tensor.shape)}: take another model")
        weights[ours] = weight
    return weights


def _check_names(given, wanted, unused):
    """UserError unless these are the same names, but for a tied head, and no tensor is unused."""
    extra = sorted(given - wanted - {"lm_head.weight"})
    extra += [name for name in unused if not name.endswith("rotary_emb.inv_freq")]
    if extra:
        kind = "biases" if extra[0].endswith(".bias") else "weights"
        raise UserError(
            f"it has {kind} for which our models have no place ({len(extra)}, such as {extra[0]}): "
            "take a model without them, or measure it in place with --hf-path of "
            "scripts.base_loss")
    missing = sorted(wanted - given)
    if missing:
        raise UserError(
            f"it lacks {len(missing)} weights of our model, such as {missing[0]}: take another "
            "model")


def _reordered(weight, rows, padded):
    """weight (their tokens, C) in the order of our tokens, (padded, C); 0 for the padding.

    rows: of rows_of_tokens().
    """
    index = torch.tensor(rows)
    known = index >= 0
    result = weight.new_zeros(padded, weight.size(1))
    ours = result[:len(rows)]
    ours[known] = weight[index[known]]
    ours[~known] = ours[known].mean(0)
    return result


# ------------------------------------------------------------------------------------------------
# the comparison

class Sample(NamedTuple):
    """Sequences, and what their model says of them."""
    idx: torch.Tensor       # (B, T) ids of ours
    known: torch.Tensor     # the ids of ours that their model has
    logits: torch.Tensor    # (B, T, known)


@torch.inference_mode()
def sample_logits(theirs, rows, max_seq_len, seed=0):
    """The Sample of an HFModel: sequences of random tokens. rows: of rows_of_tokens()."""
    index = torch.tensor(rows)
    known = (index >= 0).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, min(TOKENS, max_seq_len))
    idx = known[torch.randint(len(known), shape, generator=generator)]
    logits, _ = theirs.features(index[idx])
    return Sample(idx, known, logits[..., index[known]])


@torch.inference_mode()
def largest_difference(model, sample):
    """Between the logits of our model and those of a Sample, the largest; inf if one is no number.

    Read at once, and the second half through a KV cache, as the engine reads.
    """
    B, T = sample.idx.shape
    half = T // 2
    kv_cache = model.new_kv_cache(B, T)
    pieces = []
    for piece in sample.idx.split([half, T - half], dim=1):
        pieces.append(model(piece, kv_cache=kv_cache))
        kv_cache.advance(list(range(B)), [piece.size(1)] * B)

    worst = 0.0
    for logits in (model(sample.idx), torch.cat(pieces, 1)):
        difference = (logits[..., sample.known] - sample.logits).abs().max().item()
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def different_text(read, their_tokenizer, texts):
    """The first of some texts that gets other tokens from the two tokenizers, or None.

    read: a TheirTokenizer. their_tokenizer: an HFTokenizer.
    """
    their_ids = their_tokenizer.encode(texts, prepend=-1)
    for text, ids, found in zip(texts, read.tokenizer.encode(texts), their_ids):
        if [read.ids[token] for token in ids] != found[1:]:
            return text
    return None
