"""A first look at pretraining in a minute or two on any CPU.

    python -m scripts.base_train config/cpu_small.py
"""
depth = 2                  # 0.9 M weights in matmuls at a vocabulary of 4,096, 35 M in tables
max_seq_len = 256          # a multiple-choice conversation needs about 130 tokens
total_batch_size = 2048    # eight sequences: many small steps beat few large ones in so short a run
minutes = 1.0
compile = False            # compiling takes longer than it saves here
