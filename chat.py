"""Chat in the terminal with any OpenAI-compatible server: runs scripts/chat.py, from any folder.

    python3 chat.py            # quit ends it, clear begins again
    python3 chat.py --help     # every setting
"""
import runpy
from pathlib import Path

if __name__ == "__main__":
    client = Path(__file__).resolve().parent / "scripts" / "chat.py"
    runpy.run_path(str(client), run_name="__main__")
