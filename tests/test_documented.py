"""What the five documents call by name is here: functions with their signatures, and commands.

LATER lists the names that are missing, each with what it waits for. docs/coming-from.md maps every
documented command to ours, and each of ours is run here, in a way that does nothing.
"""
import dataclasses
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import threading
import types

import pytest
import torch

from chat_fakes import FakeEngine, serve
from conftest import ROOT
from nanochat.checkpoint_manager import CheckpointManager, load_model, save_checkpoint
from nanochat.common import UserError
from nanochat.configurator import configure
from nanochat.parallel import Layout, ShardedBucket
from tasks.common import Task, TaskMixture, TaskSequence

if sys.version_info >= (3, 11):
    import tomllib

# --------------------------------------------------------------------------------------------------
# names

# (module, name, the words with which it is called); None: its parameters are not documented
NAMES = [
    ("nanochat.common", "compute_init", ""),
    ("nanochat.common", "compute_cleanup", ""),
    ("nanochat.common", "print0", "text"),
    ("nanochat.gpt", "GPT", None),
    ("nanochat.gpt", "GPT.setup_optimizers", "self"),
    ("nanochat.muon", "DistMuon", "params"),
    ("nanochat.muon", "DistMuon.step", "self"),
    ("nanochat.adamw", "DistAdamW", "params"),
    ("nanochat.adamw", "DistAdamW.step", "self"),
    ("nanochat.dataloader", "tokenizing_distributed_data_loader_with_state", None),
    ("nanochat.dataloader", "sft_data_generator", None),
    (
        "nanochat.checkpoint_manager",
        "save_checkpoint",
        "dir, step, model, optimizer, meta, rank",
    ),
    ("nanochat.checkpoint_manager", "load_model", "source, device, phase, model_tag, step"),
    ("nanochat.checkpoint_manager", "CheckpointManager", None),
    ("nanochat.engine", "Engine", "model, tokenizer"),
    ("nanochat.engine", "Engine.generate", "self, prompt, max_new_tokens, temperature, top_k"),
    ("nanochat.tokenizer", "Tokenizer", None),
    ("nanochat.variants.mla", "MLAGPT", None),
    ("nanochat.variants.deepseek", "DeepSeekGPT", None),
    ("tasks.common", "Task", "start, stop, step"),
    ("tasks.common", "Task.__len__", "self"),
    ("tasks.common", "Task.__getitem__", "self, idx"),
    ("tasks.common", "TaskMixture", "tasks"),
    ("tasks.common", "TaskSequence", "tasks"),
    ("tasks.spellingbee", "SpellingBee", None),
    ("tasks.arc", "ARC", "subset, split"),
    ("tasks.gsm8k", "GSM8K", "split"),
    ("tasks.humaneval", "HumanEval", None),
    ("tasks.mmlu", "MMLU", "split"),
    ("tasks.smoltalk", "SmolTalk", "split"),
]
# modules, or files
LATER = {
    "requirements.txt": "nothing: pyproject.toml names the packages",
    "optimize.sh": "nothing: scripts.doctor takes its options",
}
FILES = [
    "speedrun.sh",
    "serve_r1.sh",
    "launch_6x_amd_xtx.sh",
    "compose.yaml",
    "chat.py",
    "emergency_training.sh",
    "docs/models/qwen3-32b.md",
    "docs/numerical_stability.md",
    "docs/models/families.md",
    "docs/llada.md",
    "nanochat/variants/llada.py",
    "nanochat/configurator.py",
    "nanochat/dataset.py",
    "rustbpe/Cargo.toml",
    "scripts/tok_train.py",
    "scripts/base_eval.py",
    "scripts/base_train.py",
    "scripts/mid_train.py",
    "scripts/chat_sft.py",
    "scripts/chat_rl.py",
    "scripts/chat_cli.py",
    "scripts/chat_web.py",
    "scripts/chat_eval.py",
    "scripts/simple_train_benchmark.py",
    "scripts/transformer_benchmark.py",
    "scripts/multigpu_benchmark.py",
    "tests/test_rustbpe.py",
    "tests/test_engine.py",
]


def parameters_of(words):
    return [word.strip() for word in words.split(",") if word.strip()]


@pytest.mark.parametrize("module, name, words", NAMES, ids=lambda word: str(word)[:30])
def test_a_documented_name_is_imported_from_its_place_and_takes_its_words(module, name, words):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if words is None:
        return
    signature = inspect.signature(found)
    positional = parameters_of(words)
    if name == "Engine.generate":  # the documented call names all but the first two
        signature.bind(*positional[:2], **dict.fromkeys(positional[2:]))
    else:
        signature.bind(*positional)


@pytest.mark.parametrize("function, words", [
    (save_checkpoint, "dir, step, model, optimizer, meta, rank"),
    (load_model, "source, device, phase, model_tag, step"),
    (Task, "start, stop, step"),
])
def test_the_parameters_have_the_documented_names_and_order(function, words):
    names = list(inspect.signature(function).parameters)
    assert names[:len(parameters_of(words))] == parameters_of(words)


@pytest.mark.parametrize("path", FILES)
def test_a_documented_file_is_there(path):
    assert (ROOT / path).is_file()


def is_here(name):
    """Whether a module, or a file with a suffix, exists."""
    if re.search(r"\.(sh|md|txt)$", name):
        return (ROOT / name).exists()
    return (ROOT / (name.replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize("name", LATER)
def test_what_is_called_missing_is_missing(name):
    assert not is_here(name), (
        f"{name} is here now: move it from LATER to NAMES or FILES, "
        "and change its row of docs/coming-from.md"
    )


def test_the_training_script_has_the_documented_generator():
    text = (ROOT / "scripts" / "chat_sft.py").read_text(encoding="utf-8")
    assert re.search(r"from nanochat.dataloader import .*\bsft_data_generator\b", text)


def test_the_checkpoint_manager_keeps_the_documented_three():
    assert inspect.signature(CheckpointManager).parameters["keep"].default == 3


# --------------------------------------------------------------------------------------------------
# what the names do, where no other test says it

class Numbers(Task):
    def num_examples(self):
        return 10

    def get_example(self, i):
        return i


def test_a_task_takes_every_step_th_example_between_start_and_stop():
    assert list(Numbers(1, 8, 3)) == [1, 4, 7] and len(Numbers(step=4)) == 3
    assert list(Numbers(start=7)) == [7, 8, 9] and list(Numbers(stop=2)) == [0, 1]
    both = TaskSequence([Numbers(0, 3), Numbers(step=5)], step=2)
    assert list(both) == [0, 2, 5]
    mixed = TaskMixture([Numbers(0, 3), Numbers(step=5)])
    assert sorted(mixed) == [0, 0, 1, 2, 5]
    with pytest.raises(IndexError):
        Numbers(1, 8, 3)[3]


def test_the_documented_calls_save_and_load_a_model(base_dir, monkeypatch):
    from nanochat import checkpoint_manager
    from nanochat.gpt import GPT, GPTConfig

    tokenizer = types.SimpleNamespace(
        fingerprint="of the test", get_vocab_size=lambda: 64)
    monkeypatch.setattr(checkpoint_manager, "get_tokenizer", lambda: tokenizer)
    config = GPTConfig.from_depth(1, vocab_size=64, max_seq_len=16)
    model = GPT(config)
    model.init_weights()
    meta = {
        "model_class": "gpt",
        "config": dataclasses.asdict(config),
        "dtype": "float32",
        "tokenizer": "of the test",
    }
    folder = base_dir / "base_checkpoints" / "d1"
    save_checkpoint(folder, 3, model, {"step": 3}, meta, 0)
    assert {path.name for path in folder.iterdir()} >= {
        "model_000003.pt",
        "optim_000003_rank0.pt",
        "meta_000003.json",
    }
    loaded, used, said = load_model("base", "cpu", "eval", "d1", 3)
    assert used is tokenizer and said["step"] == 3
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_ownership_of_parameters_is_block_cyclic(monkeypatch):
    """Rank r of 2 owns the second half of every bucket, not the second half of all parameters."""
    monkeypatch.setattr("nanochat.parallel.BUCKET_BYTES", 4 * 64)
    params = [torch.nn.Parameter(torch.full((64,), float(i))) for i in range(4)]
    place = types.SimpleNamespace(rank=1, ranks=2)
    buckets = Layout._buckets_of(place, params, "elements", ShardedBucket)
    assert len(buckets) == 4
    owned = torch.cat([bucket.held()[0] for bucket in buckets])
    assert owned.tolist() == [0.0] * 32 + [1.0] * 32 + [2.0] * 32 + [3.0] * 32


SCRIPT = '''"""What it does."""
logger = ""     # where to
no_logs = False     # another
settings = configure(globals(), aliases={"no_wandb": "logger="})
'''


@pytest.mark.parametrize("words, logger", [
    (["--logger=wandb", "--no-wandb"], ""),
    (["--logger=wandb", "--no_wandb"], ""),
    (["--no-wandb"], ""),
    (["--no-wandb", "--logger=tensorboard"], "tensorboard"),
    (["--no-wandb", "--no-logs"], ""),
    (["--logger=wandb", "--no-wandb=1"], ""),
    (["--logger=wandb", "--no-wandb=false"], "wandb"),
    (["--logger=wandb", "--no-wandb", "true"], ""),
    (["--logger=wandb", "ours.py"], ""),
    (["ours.py", "--logger=wandb"], "wandb"),
])
def test_an_alias_may_hold_a_value(tmp_path, monkeypatch, words, logger):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.py").write_text("no_wandb = True", encoding="utf-8")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    namespace = {"__file__": str(path), "logger": "", "no_logs": False}
    settings = configure(namespace, words, aliases={"no_wandb": "logger="})
    assert settings == {"logger": logger, "no_logs": "--no-logs" in words}
    with pytest.raises(UserError, match="--no_wandbx"):
        configure(namespace, ["--no-wandbx"], aliases={"no_wandb": "logger="})


def test_the_packages_are_the_documented_ones_beside_rustbpe_and_plots_are_optional():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if sys.version_info < (3, 11):
        pytest.skip("this Python has no tomllib")
    project = tomllib.loads(text)["project"]
    names = {re.match(r"[\w-]+", word)[0] for word in project["dependencies"]}
    assert names == {
        "torch", "numpy", "pyarrow", "tiktoken", "fastapi", "uvicorn", "requests"}
    plots = project["optional-dependencies"]["plots"]
    assert [re.match(r"\w+", word)[0] for word in plots] == ["matplotlib"]
    assert set(plots) <= set(project["optional-dependencies"]["dev"]), "the tests draw plots"


# --------------------------------------------------------------------------------------------------
# the token of the hub

@pytest.mark.parametrize("token, sent", [
    ("hf_secret", "Bearer hf_secret"),
    (" hf_secret\n", "Bearer hf_secret"),
    ("", None),
    (None, None),
])
def test_a_download_sends_the_hubs_token_whatever_netrc_says(tmp_path, monkeypatch, token, sent):
    import requests

    from nanochat.download import authorize

    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login me password other\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    session = requests.Session()
    request = requests.Request("GET", "http://localhost/file", auth=authorize)
    assert session.prepare_request(request).headers.get("Authorization") == sent


def test_the_hubs_token_stays_with_the_hub(monkeypatch):
    """A file of the hub lies on another host, to which a signed address leads."""
    import requests

    from nanochat.download import authorize

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    request = requests.Request("GET", "https://huggingface.co/file", auth=authorize)
    prepared = requests.Session().prepare_request(request)
    reply = types.SimpleNamespace(request=prepared.copy())
    prepared.url = "https://cdn.example.org/file?signature=1"
    requests.Session().rebuild_auth(prepared, reply)
    assert "Authorization" not in prepared.headers


@pytest.mark.parametrize("token", ["hf secret", "hf_sécret", "hf\nsecret"])
def test_a_token_that_is_none_is_refused_and_not_shown(base_dir, monkeypatch, token):
    from nanochat.sources import download_fineweb

    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as error:
        download_fineweb(1)
    assert "HF_TOKEN" in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("status, hint", [(401, True), (403, True), (404, False)])
def test_a_download_that_the_hub_refuses_says_where_the_token_is(
    tmp_path, monkeypatch, status, hint,
):
    import requests

    from nanochat import download

    def refuse(*_):
        response = types.SimpleNamespace(status_code=status)
        raise requests.HTTPError(f"{status} Client Error", response=response)

    monkeypatch.setattr(download, "fetch", refuse)
    reason = download.download("http://localhost/x", tmp_path / "x", threading.Event())
    assert str(status) in reason and ("HF_TOKEN" in reason) is hint


# --------------------------------------------------------------------------------------------------
# chat.py

def test_chat_py_at_the_root_is_the_client_from_any_folder(tmp_path):
    with serve(FakeEngine(["Hello."])) as url:
        done = subprocess.run(
            [sys.executable, str(ROOT / "chat.py"), f"--url={url}", "--once", "Hello!"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout) == (0, "Hello.\n"), done.stderr
    assert not (tmp_path / "__pycache__").exists()


def test_chat_py_refuses_as_the_client_does(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), "--max_tokens=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


# --------------------------------------------------------------------------------------------------
# docs/coming-from.md

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
COMMANDS = """
docker ps | grep deepseek
docker logs deepseek-r1 --tail 50
docker logs deepseek-r1 2>&1 | grep "throughput" | tail -5
curl http://localhost:8000/v1/models
curl -X POST http://localhost:8000/v1/chat/completions
python3 chat.py
docker exec deepseek-r1 python3 /tmp/simple_train_benchmark.py
docker exec deepseek-r1 python3 /tmp/transformer_benchmark.py
python3 /workspace/multigpu_benchmark.py --model 7b --scaling-test
python3 /workspace/multigpu_benchmark.py --model 7b --gpus 8 --batch-size 8
python3 /workspace/transformer_benchmark.py --model 7b --batch-size 8 --seq-len 1024
export HSA_FORCE_FINE_GRAIN_PCIE=1
export NCCL_P2P_LEVEL=PHB
WANDB_REQUIRE_SERVICE
docker stop deepseek-r1
docker start deepseek-r1
madengine discover --tags training
madengine run --tags pyt_train_llama-3.1-8b --live-output --timeout 3600
docker compose --profile fp8 up -d vllm-qwen3-32b-fp8
docker compose up -d vllm-qwen3-32b
docker compose up -d
docker compose down
docker compose logs -f [service-name]
docker compose restart [service-name]
docker exec vllm-qwen3-32b-fp8 nvidia-smi
docker exec vllm-qwen3-32b nvidia-smi
curl http://localhost:8000/metrics
source .venv/bin/activate
bash speedrun.sh
bash launch_6x_amd_xtx.sh
python -m scripts.tok_train
torchrun --standalone --nproc_per_node=8 -m scripts.base_train
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl
python -m scripts.base_train
python -m scripts.chat_cli
python -m scripts.chat_web
python -m scripts.base_eval
python -m scripts.chat_eval
python -m pytest tests/test_rustbpe.py -v -s
python -m pytest tests/test_engine.py -v -s
python -m nanochat.dataset -n 240
python -m scripts.base_train --device_batch_size=16 --learning_rate=0.01
python -m scripts.base_train config/my_config.py
pyenv activate 5090
pip install -r requirements.txt
export HF_TOKEN=your_huggingface_token
./train_simplified.sh [size] [batch_size] [block_size] [output_dir] [use_fp8]
./train_simplified.sh small 8 2048 out_mla 0
./optimize.sh --help
./optimize.sh --all
./optimize.sh --memory --cuda
./emergency_training.sh [checkpoint_dir]
./optimize_nan.sh
./emergency_training.sh
--grad_clip 1.0
--use_fp8
python train_te_v2.py --config configs/te_v2_config.yaml
python train_te_v2.py --benchmark --batch-size 32
python train_fp8.py --config configs/fineweb_training_ultra_curriculum.yaml
python train.py --config configs/fineweb_training.yaml
python train_curriculum.py --config configs/fineweb_training_ultra_curriculum.yaml
tensorboard --logdir logs/
--no-wandb
WANDB_API_KEY
--resume_from_checkpoint
python test_dataset_loading.py
python src/multi_domain_validation.py
python compare_superbpe_variants.py
python -c "import torch; print(f'CUDA: {torch.cuda.is_available()}')"
python src/model_te_v2.py
ls fineweb-edu-highest-quality-2025/data/*.parquet | wc -l
docker run --gpus all -it --rm -v $(pwd):/workspace nvcr.io/nvidia/pytorch:25.05-py3
configs/te_v2_config.yaml
configs/fineweb_training_ultra_curriculum.yaml
configs/model_config.yaml
configs/model_config_270m.yaml
configs/fineweb_training_fp8.yaml
configs/optimization.yaml
"""


def rows_of(page):
    """[(commands on the left, cell on the right)] of all tables of a page."""
    rows = []
    for line in re.findall(r"^\| (`.*) \|$", page, re.M):
        left, right = re.split(r" (?<!\\)\| ", line)
        rows.append((re.findall("`([^`]+)`", left.replace("\\|", "|")), right.replace("\\|", "|")))
    return rows


ROWS = rows_of(PAGE)


def commands_here():
    """Our commands on the right of the page, each once."""
    spans = [span for _, right in ROWS for span in re.findall("`([^`]+)`", right)]
    begins = re.compile(r"(GPUS=\d )?(python3? |torchrun |bash |source )")
    return sorted({span for span in spans if begins.match(span)})


def test_the_rows_of_a_page_are_read():
    page = "| documented | here |\n|---|---|\n| `a \\| b`, `c` | not yet: `d` |\n"
    assert rows_of(page) == [(["a | b", "c"], "not yet: `d`")]
    assert len(ROWS) > 60 and len(commands_here()) > 30


@pytest.mark.parametrize("command", COMMANDS.strip().splitlines())
def test_every_documented_command_has_a_row(command):
    assert [right for left, right in ROWS if command in left], command


def called_missing(rows):
    """The modules and files that rows of the page say are not there yet."""
    found = [re.match(r"not yet: `([^`]+)`", right) for _, right in rows]
    return [match[1] for match in found if match]


def test_what_the_page_calls_missing_is_missing():
    named = called_missing(ROWS)
    assert called_missing([(["a"], "not yet: `docs/llada.md`, later")]) == ["docs/llada.md"]
    assert [name for name in named if is_here(name)] == []
    assert set(named) <= LATER.keys()


def test_the_page_has_a_row_for_each_missing_command():
    scripts = {name for name in LATER if name.startswith("scripts.")}
    said = " ".join(right for _, right in ROWS)
    assert [name for name in scripts if f"`{name}`" not in said] == []


@pytest.fixture(scope="module")
def run_here(server, tmp_path_factory):
    """A function that runs a command of ours in a way that does nothing, and gives its output."""
    base = tmp_path_factory.mktemp("here")

    def run_script(words, **variables):
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, "NANOCHAT_BASE_DIR": str(base), **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def fork(words):
        out, err = base / "out", base / "err"
        environment = {"NANOCHAT_BASE_DIR": str(base)}
        statuses = server.run(
            words=[*words, "--help"], environments=[environment], out=str(out), err=str(err))
        assert statuses == [0], (words, err.read_text(encoding="utf-8"))
        return out.read_text(encoding="utf-8")

    def run(command):
        words = [word for word in shlex.split(command) if not re.match("GPUS=", word)]
        if "pytest" in words:
            files = [word for word in words if word.endswith(".py")]
            assert files and all((ROOT / name).is_file() for name in files), command
            return "tests"
        if "-m" in words:
            return fork(words[words.index("-m") + 1:])
        script = words[1]
        if script == "speedrun.sh":
            return run_script(words, DRY_RUN="1", **dict(re.findall(r"(GPUS)=(\d)", command)))
        if script == "serve_r1.sh":
            return run_script([*words, "--dry-run"])
        if script == "launch_6x_amd_xtx.sh":
            return run_script([*words, "--dry_run=1"])
        if script == "chat.py":
            return run_script([sys.executable, *words[1:], "--help"])
        if script == "emergency_training.sh":
            return run_script([*words[:2], "--help"])
        assert words[0] == "source" and (ROOT / script).is_file(), command
        return run_script(["bash", "-n", script])

    return run


def test_what_the_page_tells_people_to_type_runs(run_here):
    """Modules run once each, with the settings of all their rows: a later one overrides."""
    others = []
    settings = {}
    for command in commands_here():
        match = re.fullmatch(
            r"(?:python|torchrun) (?:.* )?-m ((?:scripts|nanochat)\.\w+)(.*)", command)
        if match:
            settings[match[1]] = settings.get(match[1], "") + match[2]
        else:
            others.append(command)
    assert len(settings) > 9

    modules = [f"python -m {module}{words}" for module, words in settings.items()]
    for command in [*modules, *others]:
        checks_syntax = command.startswith("source ")
        assert run_here(command).strip() or checks_syntax, command


@pytest.mark.parametrize("stage", ["base_train", "mid_train", "chat_sft", "chat_rl"])
def test_every_training_stage_takes_no_wandb(run_here, stage):
    out = run_here(f"python -m scripts.{stage} --logger=wandb --no-wandb")
    assert re.search(r"--logger='' ", out) and "--no-wandb" in out


def test_the_pages_say_what_the_documented_depths_have_with_the_vocabulary_of_a_gpu_run():
    from nanochat.gpt import GPTConfig

    def millions(depth):
        config = GPTConfig.from_depth(depth, 65536, 2048)
        layers = 12 * depth * config.width**2
        tables = 2 * config.vocab_size * config.width
        return (layers + tables) / 1e6

    # tests/test_gpt.py counts those of depth 20 in the model itself
    assert millions(20) == 560.98816 and round(millions(32), -2) == 1900
    for depth in (20, 26, 32):
        assert f"depth {depth}: {millions(depth):,.0f} M parameters" in PAGE
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (readme, PAGE):
        assert "561 M parameters" in page and "65,536" in page
    assert "coming-from.md" in readme and "tensorboard --logdir" in readme
