"""One script a stage."""
import sys

from nanochat.hardware import let_waiting_threads_sleep

# A chat runs beside other programs. Training mostly has the machine to itself, and threads that
# sleep would cost it a tenth of its speed (dev/LOG.md). Here, because OpenMP reads it when a script
# imports torch.
CHATS = {"scripts.chat_cli", "scripts.chat_web"}
if CHATS.intersection(sys.orig_argv):
    let_waiting_threads_sleep()
