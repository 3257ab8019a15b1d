"""What the tests of models share: small models of every class, with weights that all matter."""
import torch

from nanochat.gpt import GPT
from nanochat.variants.ngrams import NGramGPT, count_ngrams

VOCAB_SIZE = 97  # no multiple of 64: the model pads it to 128
CONTEXT = 32


def noise(*shape):
    """Random token ids."""
    return torch.randint(VOCAB_SIZE, shape)


def make_model(model_class=GPT, depth=2, kv_heads=4, vocab_size=VOCAB_SIZE, **more):
    """A model of width 64 with 4 heads, the same at every call. more: of its config.

    Nothing is left at zero or one: matrices (also in stacks) and tables are normal, std .1; scalars
    are moved by noise; an NGramGPT has counted the n-grams of some noise.
    """
    torch.manual_seed(0)
    counted = None
    if model_class is NGramGPT and "ngrams" not in more:
        counted = count_ngrams(torch.randint(vocab_size, (400,)))
        more = {**more, "ngrams": len(counted[0])}
    config = model_class.config_class(depth, 64, 4, kv_heads, vocab_size, CONTEXT, **more)
    model = model_class(config)
    model.init_weights()
    if counted:
        model.ngrams.fill(*counted)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                torch.nn.init.normal_(p, std=0.1)
            else:
                p.add_(0.3 * torch.randn_like(p))
    return model


def empty_model(model_class, config):
    """A model that was built on the meta device and got memory full of NaN."""
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    return model


def in_pieces(model, idx, sizes):
    """The logits of idx (B, T), read through a KV cache in pieces of these sizes."""
    sequences = list(range(len(idx)))
    kv_cache = model.new_kv_cache(len(idx), CONTEXT)
    pieces = []
    with torch.no_grad():
        for piece in idx.split(sizes, dim=1):
            pieces.append(model(piece, kv_cache=kv_cache))
            kv_cache.advance(sequences, [piece.size(1)] * len(idx))
    return torch.cat(pieces, 1)


def steps_of(decode, kv_cache, turns):
    """Logits of some decode steps, each of other slots; the tokens are given."""
    found = []
    for slots in turns:
        tokens = [10 + slot + len(found) for slot in slots]
        found.append(decode(tokens, slots))
        kv_cache.advance(slots, [1] * len(slots))
    return found


def count_graphs(monkeypatch):
    """Let torch.compile trace and not generate code; the list of the graphs that it will trace."""
    graphs, compile = [], torch.compile

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, backend=count, **options))
    return graphs
