"""One script a stage."""
from nanochat.hardware import let_waiting_threads_sleep

let_waiting_threads_sleep()  # here, because OpenMP reads it when a script imports torch
