"""
Chat with a trained model in the browser.

    python -m scripts.chat_web                          # then open http://localhost:8000
    python -m scripts.chat_web --source=mid --port=8080
    python -m scripts.chat_web --source=base            # a page that continues texts

The same address serves OpenAI's API under /v1: /v1/chat/completions, or of a base model, which has
read no conversations and continues texts, /v1/completions. The server listens on this machine only;
whoever sets --host=0.0.0.0 lets everyone on the network talk to the model, as there is no password.
"""
import contextlib
import socket

import uvicorn

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_cleanup, compute_init, print0
from nanochat.configurator import configure
from nanochat.engine import Engine, check_sampling
from nanochat.folders import chosen_line
from nanochat.passage_store import load_passages
from nanochat.prompts import suggestions_of
from nanochat.server import create_app
from tasks.identity import shown_name

source = "sft"              # which checkpoint: base, mid, sft or rl
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: the last
host = "127.0.0.1"          # the address to listen on
port = 8000                 # and its port
temperature = 0.6           # where a request does not say: 0 always takes the likeliest token
top_k = 50                  # sample among this many tokens
max_tokens = 256            # longest answer
device_type = ""            # cuda, mps or cpu. Empty: the best one here
dtype = ""                  # float32 or bfloat16. Empty: what the hardware does well


def listen(host, port):
    """A listening socket. UserError where it cannot be had.

    It is opened before the model is loaded, so that a port in use is known at once.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port} ({reason}): choose another with --port=N"
        ) from error


def main():
    check_sampling(temperature, top_k, max_tokens)
    with listen(host, port) as listener:
        # 1. the model
        compute = compute_init(device_type, dtype)
        model, tokenizer, meta = load_model(source, compute.device, "eval", model_tag, step)
        print0(chosen_line(source, meta))
        model.cast_for_inference(compute.dtype)  # the checkpoint's may be another machine's
        engine = Engine(model, tokenizer, load_passages(meta))

        # 2. the application
        name, continues = f"nanochat-{source}", source == "base"
        app = create_app(
            engine,
            tokenizer,
            name,
            temperature,
            top_k,
            max_tokens,
            continues=continues,
            suggestions=suggestions_of(meta),
            shown_name=shown_name(meta),
        )
        local = host in ("127.0.0.1", "0.0.0.0", "::1", "::")
        shown = "localhost" if local else host
        purpose = "continue texts" if continues else "chat"
        port_here = listener.getsockname()[1]
        print0(f"open http://{shown}:{port_here} to {purpose}; Ctrl+C ends the server")

        # 3. serve, without an access log; on Ctrl+C an unfinished answer has three seconds to end
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
    compute_cleanup()


if __name__ == "__main__":
    configure(globals())
    main()
