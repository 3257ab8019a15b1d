"""Models of transformers come in: their logits, their tokens, and what cannot be computed here."""
import itertools
import runpy
import sys

import pytest
import torch

from conftest import last_json
from core_cases import small_tokenizer
from models import make_model
from nanochat import checkpoint_manager, hf_import
from nanochat.checkpoint_manager import build_model, load_model, load_weights
from nanochat.common import UserError
from nanochat.dataset import iter_documents
from nanochat.engine import Engine
from nanochat.export_check import MAX_LOGIT_ERROR
from nanochat.gpt import GPT
from nanochat.hf_export import export_hf
from nanochat.hf_model import load_hf_model
from nanochat.loss_eval import score_documents
from nanochat.sampling import SamplingOptions
from nanochat.tokenizer_json import read_with_ids
from nanochat.variants.portable import PortableGPT

transformers = pytest.importorskip("transformers", reason="the models to import are its own")
tokenizers = pytest.importorskip("tokenizers", reason="the models' tokenizers are its own")

CONTEXT = 48
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
MODELS = {
    "nanochat": {"intermediate_size": 256, "rms_norm_eps": 1.19e-7},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "llama": {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "mistral": {"sliding_window": CONTEXT},
}
TEXTS = ["Ann has a red hat.", "caf\u00e9 12 \U0001f600 \n x", "<|bos|> is text", "of the day  "]


def tokenizer_of_others():
    """A byte-level BPE that `tokenizers` trains; special tokens come first, as in Llama's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|endoftext|>", "<|mask|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5 + ["the red hat of the old day"] * 9, trainer)
    return tokenizer


def save_model(folder, kind, tokenizer=None, **more):
    """Save a random model of a model_type, all of whose weights matter, and its tokenizer."""
    tokenizer = tokenizer or tokenizer_of_others()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{
        **SHAPE,
        "vocab_size": tokenizer.get_vocab_size() + 5,  # rows without a token, as Qwen3 has them
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
        **MODELS[kind],
        **more,
    })
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return folder


class Imported:
    """What the script makes of a folder, step by step."""

    def __init__(self, folder, max_seq_len=None):
        self.read = read_with_ids(folder / "tokenizer.json")
        self.theirs, self.their_tokenizer = load_hf_model(str(folder), "cpu")
        vocab_size = self.read.tokenizer.get_vocab_size()
        self.model_class, self.config = hf_import.config_from(self.theirs, vocab_size, max_seq_len)
        self.rows = hf_import.rows_of_tokens(
            self.read, self.their_tokenizer.bos, self.theirs.config.vocab_size)
        self.weights = hf_import.weights_from(self.theirs, self.model_class, self.config, self.rows)

    def model(self):
        meta = {
            "model_class": self.model_class, "config": vars(self.config), "dtype": "float32"}
        model = build_model(meta, "cpu").eval()
        load_weights(model, self.weights, assign=False)
        return model


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    imported = Imported(save_model(tmp_path, kind))
    model = imported.model()
    assert imported.model_class == ("gpt" if kind == "nanochat" else "portable")
    sample = hf_import.sample_logits(imported.theirs, imported.rows, CONTEXT)
    assert sample.idx.shape == (4, CONTEXT) and sample.logits.abs().max() > 1
    assert hf_import.largest_difference(model, sample) < 1e-4

    # by every weight but those of our own special tokens, of which the model knows nothing
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            before = parameter.clone()
            parameter.mul_(1.05)
            difference = hf_import.largest_difference(model, sample)
            parameter.copy_(before)
        scale_is_normalised = kind == "nanochat" and name.endswith(
            ("embed.weight", "attention.q.weight", "attention.k.weight"))
        scale_is_normalised |= kind == "qwen3" and name.endswith(("q.weight", "k.weight"))
        assert scale_is_normalised or difference > MAX_LOGIT_ERROR, name


def test_tokens_keep_their_rows_whatever_the_order_of_their_ids(tmp_path):
    imported = Imported(save_model(tmp_path, "llama"))
    read, tokenizer = imported.read, imported.read.tokenizer
    assert read.differences == ["it changes text before it is split (NFC)"]
    assert hf_import.different_text(read, imported.their_tokenizer, TEXTS[:2]) is None
    combined = "e\u0301"     # an e and an accent
    texts = [*TEXTS[:2], combined]
    assert hf_import.different_text(read, imported.their_tokenizer, texts) == combined

    table = imported.theirs.model.get_input_embeddings().weight
    ours = imported.weights["embed.weight"]
    their_ids = imported.their_tokenizer.encode(["red hat"], prepend=1)[0]
    our_ids = tokenizer.encode("red hat", prepend=tokenizer.get_bos_token_id())
    assert their_ids != our_ids
    assert torch.equal(ours[our_ids], table[their_ids])  # <|bos|> is their <|endoftext|>
    assert torch.equal(ours[tokenizer.encode_special("<|mask|>")], table[2])
    added = tokenizer.encode_special("<|user_start|>")
    known = [row for row in imported.rows if row >= 0]
    torch.testing.assert_close(ours[added], table[known].mean(0))


@pytest.mark.parametrize("model_class", [GPT, PortableGPT])
def test_what_we_export_comes_back_as_it_was(model_class, tmp_path):
    tokenizer = small_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    model = make_model(model_class, vocab_size=vocab_size, kv_heads=2)
    export_hf(model, tokenizer, tmp_path, "float32", True, SamplingOptions(), "a card")
    imported = Imported(tmp_path)
    assert imported.read.tokenizer.fingerprint == tokenizer.fingerprint
    assert imported.read.differences == [] and imported.rows == list(range(vocab_size))
    assert vars(imported.config) == vars(model.config)
    for name, weight in model.state_dict().items():
        rows = vocab_size if name in ("embed.weight", "head.weight") else len(weight)
        assert torch.equal(imported.weights[name][:rows], weight[:rows]), name


@pytest.mark.parametrize("kind, change, words", [
    ("llama", {"attention_bias": True}, "biases for which our models have no place"),
    ("qwen3", {"attention_bias": True}, "biases for which our models have no place"),
    ("llama", {"mlp_bias": True}, "biases for which our models have no place"),
    ("nanochat", {"intermediate_size": 128}, "its MLP is 128 wide, ours 4 times the width, 256"),
    ("llama", {"hidden_act": "gelu"}, "activation of its MLP is gelu, ours silu"),
    ("mistral", {"sliding_window": 16}, "give --max_seq_len=16 or less"),
    ("llama", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, r"are scaled \(linear\)"),
])
def test_what_our_models_do_not_compute_is_refused_in_one_line(kind, change, words, tmp_path):
    folder = save_model(tmp_path, kind, **change)
    with pytest.raises(UserError, match=words) as error:
        Imported(folder)
    assert "\n" not in str(error.value)


def test_other_contexts_types_and_tensors_are_refused_or_taken(tmp_path):
    folder = save_model(tmp_path, "mistral", sliding_window=16)
    assert Imported(folder, max_seq_len=16).config.max_seq_len == 16
    with pytest.raises(UserError, match="more than the 48 tokens"):
        Imported(folder, max_seq_len=49)

    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="biases .*1, such as model.layers.0.self_attn.q_proj.bias"):
        Imported(folder, max_seq_len=16)

    imported = Imported(save_model(tmp_path / "llama", "llama"))
    with pytest.raises(UserError, match=r"token \d+, but the model knows 100 tokens"):
        hf_import.rows_of_tokens(imported.read, 1, 100)
    imported.theirs.model.config.model_type = "gpt2"
    with pytest.raises(UserError, match="of type gpt2 cannot be imported: take one of type nanoc"):
        hf_import.config_from(imported.theirs, 300, None)


# ------------------------------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


def run_import(monkeypatch, base, *words):
    """Run the script in this process, which has imported transformers."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(sys, "argv", ["import_hf", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own
    runpy.run_module("scripts.import_hf", run_name="__main__")


def test_an_imported_model_is_one_like_any_other(stages, text, qwen3, monkeypatch, capsys):
    run_import(monkeypatch, stages.base, qwen3)
    out = capsys.readouterr().out
    record = last_json(out)
    assert record["largest_difference"] < 1e-4 and record["model_class"] == "portable"
    assert "warning: it changes text before it is split (NFC)" in out
    run_import(monkeypatch, stages.base, qwen3, "--max_seq_len=32")
    again = last_json(capsys.readouterr().out)
    assert again["checkpoint"].endswith("tiny-qwen3-2"), "nothing is overwritten"
    with pytest.raises(UserError, match="tiny-qwen3 holds a finished run"):
        run_import(monkeypatch, stages.base, qwen3, "--model_tag=tiny-qwen3")

    # bits per byte of the same documents, whose text is in the normal form
    record = stages.fork_record(
        "scripts.base_loss", f"--data={text}", "--documents=3", "--model_tag=tiny-qwen3")
    documents = list(itertools.islice(iter_documents("val", str(text)), 3))
    theirs = score_documents(*load_hf_model(str(qwen3), "cpu"), documents, "cpu")
    assert record["domains"]["val"]["bytes"] == theirs.bytes
    # ours shares the probability with our control tokens, theirs with rows that have no token
    assert record["val_bpb"] == pytest.approx(theirs.bits_per_byte, rel=0.02)

    # it generates, and learns
    model, tokenizer, _ = load_model("base", "cpu", model_tag="tiny-qwen3")
    prompt = tokenizer.encode("red", prepend=tokenizer.get_bos_token_id())
    assert list(Engine(model, tokenizer).stream(prompt, max_new_tokens=5, temperature=0))
    tuned = stages.fork_record(
        "scripts.chat_sft", "--source=base", "--model_tag=tiny-qwen3", "--num_iterations=1",
        "--compile=0", "--device_batch_size=2")
    assert tuned["stage"] == "chat_sft" and tuned["checkpoint"].endswith("tiny-qwen3")


def scale_a_weight(weights):
    return {**weights, "blocks.1.mlp.down.weight": 1.1 * weights["blocks.1.mlp.down.weight"]}


@pytest.mark.parametrize("where", ["in memory", "on the disk"])
def test_other_logits_leave_no_checkpoint_behind(
        where, qwen3, tmp_path, monkeypatch, capsys):
    if where == "in memory":
        whole = hf_import.weights_from
        monkeypatch.setattr(
            hf_import, "weights_from", lambda *given: scale_a_weight(whole(*given)))
    else:
        save = checkpoint_manager.save_checkpoint
        monkeypatch.setattr(
            checkpoint_manager, "save_checkpoint",
            lambda dir, step, weights, *more: save(dir, step, scale_a_weight(weights), *more))
    with pytest.raises(SystemExit) as end:
        run_import(monkeypatch, tmp_path, qwen3)
    assert end.value.code == 1
    assert "more than 0.001" in capsys.readouterr().out
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(left) <= {".lock", ".verified.json"}


@pytest.mark.parametrize("words, said", [
    ([], "one folder can be imported, not 0"),
    (["a", "b"], "one folder can be imported, not 2"),
    (["nowhere"], "nowhere is not a folder"),
    (["nowhere", "--source=chat"], "source=chat is not a stage"),
    (["nowhere", "--model_tag=a/b"], "is not the name of a folder"),
])
def test_a_wrong_command_is_refused_in_one_line(words, said, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=said) as error:
        run_import(monkeypatch, tmp_path, *words)
    assert "\n" not in str(error.value)
