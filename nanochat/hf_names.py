"""What the parameters of our models are called in transformers' classes of the same models.

    hf_names(model)            # {"blocks.0.mlp.up.weight": "model.layers.0.mlp.fc1.weight", ...}
    parameters_by_hf_name(model)    # {"model.layers.0.mlp.fc1.weight": the parameter, ...}

One table, read in both directions: what leaves (export) and what comes in (import). The matrices
are the same ones: nothing is transposed or permuted. Ours may have more rows, which pad the
vocabulary.
"""
from nanochat.common import UserError
from nanochat.variants import name_of

AROUND_BLOCKS = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.gain": "model.norm.weight",
}
ATTENTION = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
}
OF_A_BLOCK = {
    # transformers' NanoChatForCausalLM
    "gpt": {
        **ATTENTION,
        "mlp.up.weight": "mlp.fc1.weight",
        "mlp.down.weight": "mlp.fc2.weight",
    },
    # transformers' Qwen3ForCausalLM; LlamaForCausalLM has all of it but q_norm and k_norm
    "portable": {
        **ATTENTION,
        "attention.q_norm.gain": "self_attn.q_norm.weight",
        "attention.k_norm.gain": "self_attn.k_norm.weight",
        "attention_norm.gain": "input_layernorm.weight",
        "mlp_norm.gain": "post_attention_layernorm.weight",
        "mlp.gate.weight": "mlp.gate_proj.weight",
        "mlp.up.weight": "mlp.up_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
    },
}


def hf_names(model):
    """{name of our parameter: its name in transformers}, of every parameter of a model.

    UserError for a model of which transformers has no class.
    """
    of_a_block = OF_A_BLOCK.get(name_of(model))
    if of_a_block is None:
        choices = " or ".join(OF_A_BLOCK)
        raise UserError(
            f"transformers has no class of the model {name_of(model)}: train --model={choices}")
    names = {}
    for name, _ in model.named_parameters():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            names[name] = f"model.layers.{number}.{of_a_block[rest]}"
        else:
            names[name] = AROUND_BLOCKS[name]
    return names


def parameters_by_hf_name(model):
    """{name in transformers: our parameter}, of every parameter of a model. Errors as above."""
    parameters = dict(model.named_parameters())
    return {theirs: parameters[ours] for ours, theirs in hf_names(model).items()}
