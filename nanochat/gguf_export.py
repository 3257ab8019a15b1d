"""A portable model as a GGUF file, for llama.cpp and ollama.

    export_gguf(model, tokenizer, folder / "model.gguf", "bfloat16", True, "d4")

The file has the weights, the tokenizer and the chat template. Names of tensors and the forms of
quantised numbers are the `gguf` package's. Matrices are stored as asked for, gains always in
float32.

llama.cpp raises no error where it computes another model. Of its two architectures that fit, qwen3
turns halves of a head as transformers does, and llama turns pairs of neighbours: there the rows of
queries and keys change places. And it splits text by one of the patterns that it knows by name, of
which none makes pieces of two digits. gguf_check.py compares what was written.
"""
import re

import torch

from nanochat.common import UserError, atomic_write
from nanochat.hf_export import (
    ANSWER_END,
    BOS,
    LLAMA,
    chat_template,
    hf_class_of,
    token_texts,
    weights_for_hf,
)
from nanochat.tokenizer import byte_spelling, one_digit_pattern
from nanochat.tokenizer_json import GPT2_PATTERN

# Our name of a dtype: gguf's name of the numbers, and of a file of them
KINDS = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
Q8_BLOCK = 32           # numbers that share a scale, in a row of a matrix
NORMAL, CONTROL = 1, 3  # types of tokens
MANY_DIGITS = re.compile(r"\d\d")


def import_gguf():
    """The package gguf. UserError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError("an export for llama.cpp needs the package gguf: "
                        "`uv pip install gguf`") from None
    return gguf


# --------------------------------------------------------------------------------------------------
# the tokenizer

def known_patterns():
    """{pattern: llama.cpp's name of the same split}."""
    return {one_digit_pattern(): "bailingmoe", GPT2_PATTERN: "gpt-2"}


def pre_tokenizer(tokenizer, split_digits=False):
    """The name by which llama.cpp knows the tokenizer's split of text.

    split_digits: take the split into single digits although the tokenizer has tokens of two.
    UserError where there is none that gives the same tokens.
    """
    known = known_patterns()
    for pattern, name in known.items():
        # one that was read from a tokenizer.json also says what stands between its pieces
        if tokenizer.pattern == pattern or tokenizer.pattern.startswith(pattern + "|(?:(?!"):
            return name
    if one_digit_pattern(tokenizer.pattern) not in known:
        raise UserError("llama.cpp does not know the way in which this tokenizer splits text: "
                        "export with --to=hf, or train a model with `scripts.tok_train --digits=1`")
    if any(map(MANY_DIGITS.search, token_texts(tokenizer))) and not split_digits:
        raise UserError(
            "llama.cpp reads numbers digit by digit and this model in pairs of digits, so that "
            "it would get other tokens: train one with `scripts.tok_train --digits=1` first, or "
            "accept that with --split_digits=1")
    return known[one_digit_pattern(tokenizer.pattern)]


def add_tokenizer(writer, tokenizer, is_chat, split_digits):
    """Write the vocabulary, the merges, the control tokens and the chat template."""
    content = tokenizer.hugging_face()
    spelled = dict.fromkeys(content["model"]["vocab"], NORMAL)
    spelled |= {added["content"]: CONTROL for added in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")      # byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer, split_digits))
    writer.add_token_list(list(spelled))
    writer.add_token_types(list(spelled.values()))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])

    bos = tokenizer.encode_special(BOS)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(tokenizer.encode_special(ANSWER_END) if is_chat else bos)
    writer.add_add_bos_token(True)
    writer.add_chat_template(chat_template())


# --------------------------------------------------------------------------------------------------
# the weights

def stored(gguf, weight, dtype):
    """(the numbers as they are stored, gguf's type of them) of a weight, a numpy array."""
    kind = KINDS[dtype][0] if weight.ndim > 1 else "F32"
    kind = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(weight, kind), kind


@torch.no_grad()
def round_to_gguf(model, dtype):
    """Round a model's weights to what a file of this dtype holds, and keep them in float32.

    UserError where the rows of a matrix cannot be cut into blocks.
    """
    gguf = import_gguf()
    for name, parameter in model.named_parameters():
        if dtype == "q8_0" and parameter.size(-1) % Q8_BLOCK and parameter.ndim > 1:
            raise UserError(
                f"q8_0 needs rows of a multiple of {Q8_BLOCK} numbers, those of {name} have "
                f"{parameter.size(-1)}: take --dtype=bfloat16")
        numbers, kind = stored(gguf, parameter.float().cpu().numpy(), dtype)
        rounded = torch.from_numpy(gguf.quants.dequantize(numbers, kind))
        parameter.data = rounded.view(parameter.shape).to(parameter.device)


def weights_for_gguf(model):
    """{name in GGUF: float32 array} of a portable model."""
    gguf = import_gguf()
    hf_class = hf_class_of(model)
    arch = gguf.MODEL_ARCH[hf_class.model_type.upper()]
    names = gguf.get_tensor_name_map(arch, model.config.depth)
    weights = {}
    for hf_name, weight in weights_for_hf(model, "float32").items():
        if hf_class is LLAMA and hf_name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = neighbours_from_halves(weight, model.config.head_dim)
        weights[names.get_name(hf_name, try_suffixes=(".weight",))] = weight.numpy()
    return weights


def neighbours_from_halves(weight, head_dim):
    """The rows (H * D, C) of queries or keys whose rotated pairs are d and d + D/2, for a runtime
    that rotates the pairs 2d and 2d + 1."""
    heads = weight.view(-1, 2, head_dim // 2, weight.size(1))
    return heads.transpose(1, 2).reshape(weight.shape).contiguous()


# --------------------------------------------------------------------------------------------------
# the file

def require_portable(model):
    """UserError where llama.cpp has no architecture for a model."""
    if hf_class_of(model).model_type == "nanochat":
        raise UserError(
            "llama.cpp has no architecture of a plain GPT: export with --to=hf, or train "
            "`python -m scripts.base_train --model=portable`, which it can serve")


def export_gguf(model, tokenizer, path, dtype, is_chat, name, split_digits=False):
    """Write a portable model into a GGUF file (a Path).

    model: with the weights that round_to_gguf() left. dtype: a key of KINDS. is_chat: whether it
    answers conversations. name: for people. split_digits: as of pre_tokenizer(). UserError for a
    model or a tokenizer that llama.cpp does not know.
    """
    gguf = import_gguf()
    require_portable(model)
    config = model.config
    writer = gguf.GGUFWriter(path, hf_class_of(model).model_type)
    add_tokenizer(writer, tokenizer, is_chat, split_digits)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[KINDS[dtype][1]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for tensor_name, weight in weights_for_gguf(model).items():
        numbers, kind = stored(gguf, weight, dtype)
        writer.add_tensor(tensor_name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --------------------------------------------------------------------------------------------------
# ollama

# A conversation in ollama's language of templates, which puts <|bos|> before it by itself.
OLLAMA_CHAT = (
    '{{- range $i, $message := .Messages }}'
    '{{- if eq .Role "system" }}<|system_start|>{{ .Content }}<|system_end|>{{ end }}'
    '{{- if eq .Role "user" }}<|user_start|>{{ .Content }}<|user_end|>{{ end }}'
    '{{- if eq .Role "assistant" }}<|assistant_start|>{{ .Content }}'
    '{{- if gt (len (slice $.Messages $i)) 1 }}<|assistant_end|>{{ end }}{{ end }}'
    '{{- if eq (len (slice $.Messages $i)) 1 }}'
    '{{- if eq .Role "user" }}<|assistant_start|>{{ end }}{{ end }}'
    '{{- end }}'
)
OLLAMA_TEXT = "{{ .Prompt }}"


def modelfile(config, is_chat, sampling):
    """The text of ollama's Modelfile beside model.gguf. sampling: SamplingOptions."""
    template = OLLAMA_CHAT if is_chat else OLLAMA_TEXT
    stops = (ANSWER_END, "<|user_start|>", BOS) if is_chat else (BOS,)
    parameters = {
        "num_ctx": config.max_seq_len,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "repeat_penalty": sampling.repetition_penalty,
    }
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"


def write_modelfile(folder, config, is_chat, sampling):
    """Write the Modelfile into a folder that has model.gguf."""
    atomic_write(folder / "Modelfile", modelfile(config, is_chat, sampling))
