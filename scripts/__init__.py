"""One script a stage. This file runs before a stage imports torch, which is when OpenMP reads its environment."""
import os

# Each OpenMP thread stays on a core of its own. Left alone, a scheduler was seen to keep both threads of a two-core
# machine on one core for minutes, each spinning while it waited for the other: 15 times slower. Ranks share cores.
if "RANK" not in os.environ:
    os.environ.setdefault("OMP_PROC_BIND", "true")
