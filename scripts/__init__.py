"""One script a stage."""
import sys

from nanochat.hardware import limit_spinning

# A chat runs beside other programs, training mostly has the machine to itself. Here, because OpenMP
# reads it when a script imports torch.
CHATS = {"scripts.chat_cli", "scripts.chat_web", "scripts.complete"}
limit_spinning(sleep_at_once=bool(CHATS.intersection(sys.orig_argv)))
