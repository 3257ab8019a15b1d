"""One script a stage."""
import sys

from nanochat.common import install_error_hook
from nanochat.environment import set_gpu_variables
from nanochat.hardware import limit_spinning

# Ctrl+C while a script imports torch, which takes seconds. runpy calls the program "-m" until it
# has found the script; whoever imports a script keeps a hook of its own.
if sys.argv[0] == "-m":
    install_error_hook()

# A chat runs beside other programs, training and a server mostly have the machine to themselves.
# Here, because OpenMP and torch read these variables when a script imports torch.
CHATS = {"scripts.chat_cli", "scripts.complete"}
limit_spinning(sleep_at_once=bool(CHATS.intersection(sys.orig_argv)))
set_gpu_variables()
