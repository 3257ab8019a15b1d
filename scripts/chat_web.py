"""
Chat with a trained model in the browser.

    python -m scripts.chat_web                          # then open http://localhost:8000
    python -m scripts.chat_web --source=mid --port=8080
    python -m scripts.chat_web --source=base            # a page that continues texts
    python -m scripts.chat_web --host=0.0.0.0 --api_key=SECRET --allowed_hosts=chat.example.org

The same address serves OpenAI's API under /v1: /v1/chat/completions, and /v1/completions, with
which any model continues texts (docs/serving.md). The server listens on this machine only, unless
--host names another address. Then it needs a key, as everyone on the network could use the model.
"""
import os

from nanochat.async_engine import EnginePool
from nanochat.benchmark import free_memory
from nanochat.checkpoint_manager import load_model, require_model
from nanochat.common import (
    UserError,
    check_dtype,
    choose_device_type,
    compute_cleanup,
    compute_init,
    print0,
)
from nanochat.configurator import configure
from nanochat.diffusion_engine import denoising_of, serving_engine_of
from nanochat.engine import check_sampling, require_weights
from nanochat.folders import chosen_line
from nanochat.http_guard import Access, check_names, is_loopback, listen
from nanochat.passage_store import load_passages
from nanochat.prompts import suggestions_of
from nanochat.server import ChatServer, Settings, create_app, end_process
from nanochat.serving_stats import ServingStats
from tasks.identity import shown_name

source = "sft"              # which checkpoint: base, mid, sft or rl
model_tag: str = None       # its folder, such as d4. None: the newest
step: int = None            # its step. None: the last
host = "127.0.0.1"          # the address to listen on
port = 8000                 # and its port
api_key = ""                # what clients must send; several are separated by commas
allowed_hosts = ""          # names besides localhost under which it is reached, commas between
allowed_origins = ""        # other addresses whose pages may use it, such as http://localhost:3000
temperature = 0.6           # where a request does not say: 0 always takes the likeliest token
top_k = 50                  # sample among this many tokens
max_tokens = 256            # longest answer
block_length: int = None    # of a diffusion model (docs/llada.md), tokens of a block. None: 32
steps: int = None           # of such a model, passes for a block. None: one for each token
edit_below: float = None    # of such a model, confidence below which tokens are edited. None: 0
max_slots: int = None       # sequences that run at a time. None: 32, as far as memory allows
max_queue = 128             # sequences that may wait besides; more are refused
drain_seconds = 30          # after Ctrl+C or SIGTERM, answers under way have so long to end
hang_seconds = 120          # a step of the model that takes longer counts as one that never ends
num_gpus = 1                # GPUs that hold the model, each answering its share of the requests
weights = ""                # int8: weights of 8 bits on a CPU. Empty: those of the dtype
compile = True              # compile the decode step behind the server, and on a GPU capture it
device_type = ""            # cuda, mps or cpu. Empty: the best one here
dtype = ""                  # float32 or bfloat16. Empty: what the hardware does well

KEY_VARIABLE = "NANOCHAT_API_KEY"   # the environment's api_key, which no list of processes shows
MOST_SLOTS = 32             # by default
SLOTS_SHARE = 0.25          # of the memory that is free, which their KV cache may take by default


def listed(text):
    """The items of a text with commas: "a, b" -> ["a", "b"]."""
    return [item.strip() for item in text.split(",") if item.strip()]


def read_keys(host):
    """The keys that clients must send. UserError where others could come without one."""
    keys = listed(api_key or os.environ.get(KEY_VARIABLE, ""))
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise UserError("api_key: a key may have ASCII characters only, as no header holds others")
    if not keys and not is_loopback(host):
        raise UserError(
            f"host={host} lets others on the network use the model: set --api_key=SECRET "
            f"(or {KEY_VARIABLE}), or leave --host out"
        )
    return keys


def check_settings():
    """UserError for settings with which nothing can be served."""
    check_sampling(temperature, top_k, max_tokens)
    require_weights(weights)
    check_dtype(dtype)
    check_names(listed(allowed_hosts), listed(allowed_origins))
    smallest = {"max_slots": 1, "max_queue": 0, "drain_seconds": 0, "num_gpus": 1}
    for name, least in smallest.items():
        value = globals()[name]
        if value is not None and value < least:
            raise UserError(f"{name}={value}: it must be at least {least}")


class Loader:
    """Loads the model for one engine. meta: what its checkpoint says, once it is loaded.

    number: of the GPU.
    """

    def __init__(self, number):
        self.number, self.meta = number, None

    def __call__(self):
        compute = compute_init(device_type, dtype)
        device = compute.device
        if device.type == "cuda":
            device = gpu(self.number)
        model, tokenizer, meta = load_model(source, device, "eval", model_tag, step)
        if self.number == 0:
            print0(chosen_line(source, meta))
        model.cast_for_inference(compute.dtype)  # the checkpoint's may be another machine's
        self.meta = meta
        slots = max_slots or fitting_slots(model, device)
        passages = load_passages(meta)
        denoising = denoising_of(
            model, block_length=block_length, steps=steps, edit_below=edit_below)
        engine = serving_engine_of(
            model, tokenizer, passages, slots, weights, compile, denoising)
        warm_up(engine)
        return engine

    def describe(self):
        """What the page shows of the model."""
        return {"name": shown_name(self.meta), "suggestions": suggestions_of(self.meta)}


def warm_up(engine):
    """Take a first prefill and decode step, which prepare kernels and take longer than others."""
    prompt = [engine.tokenizer.get_bos_token_id()]
    engine.generate_batch([prompt], max_new_tokens=2, ignore_stop_tokens=True)


def fitting_slots(model, device):
    """How many slots of the whole context take no more than their share of the free memory.

    Where nothing is cached, a slot takes none.
    """
    if not model.causal:
        return MOST_SLOTS
    layers = model.new_kv_cache(1, model.config.max_seq_len).layers
    slot_bytes = sum(layer.nbytes for layer in layers)
    free = free_memory(device)
    if free is None:
        return MOST_SLOTS
    return max(1, min(MOST_SLOTS, int(SLOTS_SHARE * free / slot_bytes)))


def gpu(number):
    """A GPU, which becomes the one of this thread. UserError for one that is not here."""
    import torch
    here = torch.cuda.device_count()
    if number >= here:
        raise UserError(f"num_gpus={num_gpus}: this machine has {here}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def main():
    # 1. what must be right before anything is loaded
    check_settings()
    access = Access(host, read_keys(host), listed(allowed_hosts), listed(allowed_origins))
    kind = choose_device_type(device_type)
    if num_gpus > 1 and kind != "cuda":
        raise UserError(f"num_gpus={num_gpus}: there is no GPU to use here")

    with listen(host, port) as listener:
        require_model(source, model_tag, step)

        # 2. the engines, which load the model on their own threads
        loaders = [Loader(number) for number in range(num_gpus)]
        stats = ServingStats()
        pool = EnginePool(loaders, max_queue, stats)

        # 3. the application
        continues = source == "base"
        settings = Settings(
            f"nanochat-{source}",
            temperature,
            top_k,
            max_tokens,
            continues,
            loaders[0].describe,
            hang_seconds,
        )
        app = create_app(pool, settings, access, stats)
        local = host in ("127.0.0.1", "0.0.0.0", "::1", "::")
        shown = "localhost" if local else host
        purpose = "continue texts" if continues else "chat"
        port_here = listener.getsockname()[1]
        print0(f"open http://{shown}:{port_here} to {purpose}; Ctrl+C ends the server")

        # 4. serve until a signal comes
        status = ChatServer(app, pool, drain_seconds).serve_until_end(listener)
    compute_cleanup()
    end_process(pool, status)


if __name__ == "__main__":
    configure(globals())
    main()
