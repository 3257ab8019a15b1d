"""Whether a GGUF file is the model, as the `gguf` package and llama.cpp read it.

    for finding in check_gguf(model, tokenizer, path, "bfloat16"):
        print(finding.line())

Every tensor is read back and compared to the bit. What llama.cpp makes of the file is compared as
export_check.py compares transformers, where llama-cpp-python is installed. llama.cpp also rounds
the activations to the dtype of the weights, so that its logits may differ by a share of their
standard deviation; greedy texts may part where two tokens are as near as the logits differ.
"""
import numpy as np
import torch

from nanochat.export_check import (
    MAX_LOGIT_ERROR,
    Finding,
    check_conversations,
    check_greedy,
    check_ids,
    logit_sequences,
)
from nanochat.gguf_export import MANY_DIGITS, import_gguf, weights_for_gguf

# Of the logits' standard deviation, the largest difference that rounding may make (a third of that
# was seen); that of float32 is MAX_LOGIT_ERROR, absolutely
MAX_SHARE = {"bfloat16": 0.25, "q8_0": 0.5}
KV_FLOAT32 = 0      # ggml's number of the type


def check_gguf(model, tokenizer, path, dtype, split_digits=False):
    """Yield a Finding of each comparison of a file (a Path) with the model it was made of.

    model: with the weights that round_to_gguf() left, computing in float32. dtype: a key of
    gguf_export.KINDS. split_digits: numbers are known to be read in another way.
    """
    yield _check_tensors(model, path)
    if not has_llama_cpp():
        return
    import llama_cpp
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=min(model.config.max_seq_len, 512),
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        logits_all=True,
        type_k=KV_FLOAT32,
        type_v=KV_FLOAT32,
        verbose=False,
    )
    worst, finding = _check_logits(model, tokenizer, llama, dtype)
    yield finding

    def encode(texts):
        return [llama.tokenize(text.encode("utf-8"), add_bos=False) for text in texts]

    def is_compared(text):
        return not (split_digits and MANY_DIGITS.search(text))

    yield check_ids(tokenizer, encode, is_compared)
    if not split_digits:
        yield check_conversations(tokenizer, _renderer(llama), escapes_vanish=False)

    def greedy(prompt, count):
        tokens = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [next(tokens) for _ in range(count)]

    yield check_greedy(model, tokenizer, greedy, tie=worst)


def has_llama_cpp():
    """Whether llama-cpp-python is installed."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def _check_tensors(model, path):
    """The Finding that the tensors in the file are those of the model, to the bit."""
    gguf = import_gguf()
    wanted = weights_for_gguf(model)
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = numbers
    if found.keys() != wanted.keys():
        names = sorted(found.keys() ^ wanted.keys())
        return Finding("tensors", False, f"{names[0]} is in one of the two alone")
    for name, weight in wanted.items():
        if not np.array_equal(found[name].reshape(weight.shape), weight):
            return Finding("tensors", False, f"{name} has other numbers")
    return Finding("tensors", True, f"{len(found)} tensors")


@torch.inference_mode()
def _check_logits(model, tokenizer, llama, dtype):
    """(the largest difference of logits, the Finding)."""
    worst, spread = 0.0, 0.0
    sequences = logit_sequences(model, tokenizer)
    for ids in sequences:
        wanted = model(torch.tensor([ids], device=model.device))[0].cpu().numpy()
        llama.reset()
        llama.eval(ids)
        difference = np.abs(llama.scores[:len(ids)] - wanted).max()
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf)))
        spread = max(spread, float(wanted.std()))
    limit = MAX_LOGIT_ERROR
    if dtype in MAX_SHARE:
        limit = max(limit, MAX_SHARE[dtype] * spread)
    detail = f"{len(sequences)} sequences, largest difference {worst:.2g}, at most {limit:.2g}"
    return worst, Finding("logits", worst <= limit, detail)


def _renderer(llama):
    """(messages, is_prompt) -> ids, by the template in the file and llama.cpp's tokenizer."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(llama.metadata["tokenizer.chat_template"])

    def render(messages, is_prompt):
        text = template.render(messages=messages, add_generation_prompt=is_prompt)
        return llama.tokenize(text.encode("utf-8"), add_bos=False, special=True)

    return render
