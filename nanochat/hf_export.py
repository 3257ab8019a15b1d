"""A model of ours as a folder that Hugging Face's transformers loads.

    export_hf(model, tokenizer, folder, "float32", sampling, card)

    model.safetensors, config.json                 the weights under transformers' names
    generation_config.json                         where an answer ends, and how it is sampled
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    README.md                                      the model card

GPT is transformers' NanoChatForCausalLM and PortableGPT its Qwen3ForCausalLM, or LlamaForCausalLM
where it has no QK norm. Of the other variants transformers has no class that computes the same.
export_check.py compares what was written.
"""
import json
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from nanochat.common import UserError, atomic_write
from nanochat.hf_names import parameters_by_hf_name
from nanochat.tokenizer import ESCAPE, UNESCAPE
from nanochat.variants import name_of

DTYPES = ("float32", "bfloat16")
TEMPLATE = Path(__file__).parent / "chat_template.jinja"
BOS, ANSWER_END = "<|bos|>", "<|assistant_end|>"


# --------------------------------------------------------------------------------------------------
# config.json

def shared_config(config):
    """The fields that all these classes have, from a GPTConfig: a dict."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "rope_theta": config.rotary_base,   # as older versions of transformers have it
        "attention_bias": False,
    }


def nanochat_config(config):
    """A GPTConfig as the fields of transformers' NanoChatConfig, a dict."""
    return {
        **shared_config(config),
        "intermediate_size": 4 * config.width,
        "rms_norm_eps": torch.finfo(torch.float32).eps,     # what F.rms_norm takes by itself
        "final_logit_softcapping": config.softcap,
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
    }


def portable_config(config):
    """A PortableConfig as the fields of transformers' Qwen3Config or LlamaConfig, a dict."""
    return {
        **shared_config(config),
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
    }


class HFClass(NamedTuple):
    """A class of transformers that computes what a model does, its name in config.json, and
    config_of: our config -> the fields of theirs."""
    architecture: str
    model_type: str
    config_of: Callable


NANOCHAT = HFClass("NanoChatForCausalLM", "nanochat", nanochat_config)
QWEN3 = HFClass("Qwen3ForCausalLM", "qwen3", portable_config)
LLAMA = HFClass("LlamaForCausalLM", "llama", portable_config)
# Why the other classes cannot leave
REASONS = {
    "lookup": "it looks pairs and triples of tokens up in tables, which no other runtime does",
    "lookup_ngrams": "it mixes n-gram counts into its prediction, which no other runtime does",
    "mla": "the logits of DeepSeek's class have no softcap, those of this one have",
    "deepseek": "the logits of DeepSeek's class have no softcap, those of this one have",
    "llada": "it fills in masked tokens in any order, which needs a sampler of its own",
}


def hf_class_of(model):
    """The HFClass of a model. UserError, with the command that trains another, where none fits."""
    name = name_of(model)
    if name == "gpt":
        return NANOCHAT
    if name == "portable":
        return QWEN3 if model.config.qk_norm else LLAMA
    raise UserError(
        f"a {name} model cannot leave ({REASONS[name]}): train one that can, "
        "`python -m scripts.base_train --model=portable` (or --model=gpt, for transformers alone), "
        "and the chat stages after it")


# --------------------------------------------------------------------------------------------------
# the weights

@torch.no_grad()
def round_weights(model, dtype):
    """Round a model's weights to a dtype (its name) and keep them in float32, so that it computes
    what a runtime does that reads them in that dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()


@torch.no_grad()
def weights_for_hf(model, dtype):
    """{name in transformers: tensor}, on the CPU, without the padding of the vocabulary.

    dtype: its name. Gains are 1 where the model has none.
    """
    dtype = getattr(torch, dtype)
    weights = {}
    for name, parameter in parameters_by_hf_name(model).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            parameter = parameter[:model.config.vocab_size]
        weights[name] = parameter.detach().to("cpu", dtype).contiguous().clone()
    for name, shape in missing_gains(model).items():
        weights[name] = torch.ones(shape, dtype=dtype)
    return weights


def missing_gains(model):
    """{name in transformers: shape} of the gains that a portable model does without."""
    if getattr(model.config, "gains", True):
        return {}
    with torch.device("meta"):
        with_gains = type(model)(replace(model.config, gains=True))
    own = parameters_by_hf_name(model).keys()
    gains = parameters_by_hf_name(with_gains).items()
    return {name: gain.shape for name, gain in gains if name not in own}


# --------------------------------------------------------------------------------------------------
# the tokenizer

def chat_template():
    """The chat template, Jinja."""
    return TEMPLATE.read_text(encoding="utf-8").replace("ESCAPE", ESCAPE)


def token_texts(tokenizer):
    """The text of every ordinary token that is text by itself, a list of str."""
    texts = []
    for token_id in range(tokenizer.get_vocab_size()):
        try:
            texts.append(tokenizer.id_to_bytes(token_id).decode("utf-8"))
        except UnicodeDecodeError:
            continue    # a part of a character
    return [text for text in texts if text]


def tokenizer_json(tokenizer):
    """The content of tokenizer.json: <|bos|> opens a text, and what the template has escaped is
    ordinary text again."""
    bos_id = tokenizer.get_bos_token_id()
    text = {"Sequence": {"id": "A", "type_id": 0}}
    opened = {"SpecialToken": {"id": BOS, "type_id": 0}}
    opener = {
        "type": "TemplateProcessing",
        "single": [opened, text],
        "pair": [opened, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
    }
    return {**tokenizer.hugging_face(), "normalizer": UNESCAPE, "post_processor": opener}


def tokenizer_config(config, is_chat):
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": ANSWER_END if is_chat else BOS,
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
    }


# --------------------------------------------------------------------------------------------------
# the folder

def generation_config(tokenizer, is_chat, sampling):
    """The content of generation_config.json. A text ends where the next one would begin.

    sampling: the SamplingOptions of a runtime where a request does not say.
    """
    ends = [tokenizer.get_bos_token_id()]
    if is_chat:
        ends.insert(0, tokenizer.encode_special(ANSWER_END))
    fields = {"bos_token_id": tokenizer.get_bos_token_id(), "eos_token_id": ends}
    if not sampling.is_greedy:
        fields |= {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    return {**fields, "repetition_penalty": sampling.repetition_penalty}


def export_hf(model, tokenizer, folder, dtype, is_chat, sampling, card):
    """Write a model into a folder (a Path) that exists, for transformers.

    model: a GPT or PortableGPT. dtype: of the weights, a name in DTYPES. is_chat: whether it
    answers conversations. sampling: of generation_config(). card: the text of the model card.
    UserError for another variant, and where safetensors is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("the export needs safetensors and transformers: "
                        "`uv pip install safetensors transformers`") from None
    hf_class = hf_class_of(model)
    weights = weights_for_hf(model, dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)     # safetensors makes it for its owner alone

    generation = generation_config(tokenizer, is_chat, sampling)
    contents = {
        "config.json": {
            "architectures": [hf_class.architecture],
            "model_type": hf_class.model_type,
            "dtype": dtype,
            **hf_class.config_of(model.config),
            "bos_token_id": generation["bos_token_id"],
            "eos_token_id": generation["eos_token_id"],
            "pad_token_id": None,
        },
        "generation_config.json": generation,
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(model.config, is_chat),
    }
    for name, content in contents.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        atomic_write(folder / name, text)
    atomic_write(folder / "chat_template.jinja", chat_template())
    atomic_write(folder / "README.md", card)

