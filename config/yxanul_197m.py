"""The documented 197 M model: 28 layers, grouped queries, RoPE, SwiGLU, a tied head.

    python -m scripts.tok_train --tokenizer=t80k/tokenizer.json
    python -m scripts.base_train config/yxanul_197m.py

What it has, what was documented and what it takes: docs/models/yxanul.md.
"""
model = "portable"         # RMSNorm with gains, SwiGLU, and QK norm besides
depth = 28
width = 512
heads = 8                  # of 64 dimensions
kv_heads = 2               # a quarter of the keys and values in the cache
mlp_width = 1792           # 3.5 x width, and divisible by 16 as FP8 needs it
tied = True                # with 200,005 tokens the embedding is half of the parameters
rotary_base = 10000.0
max_seq_len = 2048         # of the curriculum's last stage
total_batch_size = 491520  # 80 x 3 x 2,048, which all lengths of the curriculum divide
fp8 = "hybrid"             # needs an H100, an RTX 4090 or newer; else --fp8=none
curriculum = "ten_stage"   # 8 to 2,048 tokens (docs/curriculum.md); else --curriculum=None
