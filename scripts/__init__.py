"""One script a stage."""
import sys

from nanochat.environment import set_gpu_variables
from nanochat.hardware import limit_spinning

# A chat runs beside other programs, training and a server mostly have the machine to themselves.
# Here, because OpenMP and torch read these variables when a script imports torch.
CHATS = {"scripts.chat_cli", "scripts.complete"}
limit_spinning(sleep_at_once=bool(CHATS.intersection(sys.orig_argv)))
set_gpu_variables()
