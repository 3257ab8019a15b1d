"""One script a stage."""
import sys

from nanochat.environment import set_gpu_variables
from nanochat.hardware import limit_spinning

# A chat runs beside other programs, training mostly has the machine to itself. Here, because OpenMP
# and torch read these variables when a script imports torch.
CHATS = {"scripts.chat_cli", "scripts.chat_web", "scripts.complete", "scripts.infer_benchmark"}
limit_spinning(sleep_at_once=bool(CHATS.intersection(sys.orig_argv)))
set_gpu_variables()
