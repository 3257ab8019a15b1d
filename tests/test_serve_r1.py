"""serve_r1.sh against a docker, a curl and a clock that only replay a scene.

No engine runs, no GPU is needed, and nobody waits.
"""
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from conftest import ROOT
from vllm_flags import problems

IMAGE = "rocm/vllm:rocm7.0.0_vllm_0.11.2_20251210"
MODEL = "deepseek-ai/DeepSeek-R1"
VERBS = ("start", "stop", "status", "logs", "throughput", "test")
AWKWARD = """a 'b' "c" $HOME `d` \\ * e"""
LISTED = json.dumps({"object": "list", "data": [{"id": MODEL}]}, separators=(",", ":"))
READY = {
    "/health": [[0, 200, ""]],
    "/v1/models": [[0, 200, LISTED]],
    "/v1/completions": [[0, 200, "{}"]],
}

# docker and curl in one: writes down its words and its environment, and answers from scene.json by
# the seconds since `docker run`.
FAKE = r"""
import json, os, sys
os.chdir(os.environ["FAKES"])

def read(name):
    return json.loads(open(name).read())

def write(name, value):
    open(name, "w").write(json.dumps(value))

program, words, scene, clock = sys.argv[1], sys.argv[2:], read("scene.json"), read("clock")
call = {"words": [program, *words], "environment": dict(os.environ)}
for i, word in enumerate(words):
    if word.startswith("@"):
        call["header"] = open(word[1:]).read()
open("calls", "a").write(json.dumps(call) + "\n")
there = read("container.json") if os.path.exists("container.json") else None

def now(rows):
    age = clock - there["began"] if there else 0
    return [row for row in rows if row[0] <= age][-1][1:]

def end(text="", status=0):
    sys.stdout.write(text)
    sys.exit(status)

if program == "curl":
    url = next(word for word in words if word.startswith("http://"))
    path = "/" + url.split("/", 3)[3]
    rows = scene["http"].get(path, [])
    if there is None or not rows or rows[0][0] > clock - there["began"]:
        end("\n000", 7)
    if scene.get("in_turn"):                 # each request its own row
        rows, left = rows[:1], rows[1:]
        scene["http"][path] = left or rows
        write("scene.json", scene)
    code, body = now(rows)
    end(f"{body}\n{code}")
if words[0] == "version":
    end(status=0 if scene.get("daemon", True) else 1)
if words[:2] == ["image", "inspect"]:
    end(status=0 if scene.get("image") else 1)
if words[0] == "pull":
    end(status=scene.get("pull", 0))
if words[0] == "run":
    if there or scene.get("run"):
        sys.stderr.write("docker: Error response from daemon: no\n")
        sys.exit(125)
    label = next(word for word in words if word.startswith("nanochat.serve_r1="))
    write("container.json", {"began": clock, "label": label.partition("=")[2]})
    end("0123abcd\n")
if there is None:
    if words[:2] == ["container", "inspect"]:
        print()                              # as docker does
    sys.stderr.write("Error: No such container\n")
    sys.exit(1)
if words[:2] == ["container", "inspect"]:
    status, restarts, code = now(scene.get("life", [[0, "running", 0, 0]]))
    status = "exited" if there.get("stopped") else status
    if status == "gone":
        sys.exit(1)
    end(f"{status} {restarts} {code} {there['label']}\n")
if words[0] == "logs":
    end(scene.get("log", "Loading shards: 1/163\n"))
if words[0] == "stop":
    write("container.json", {**there, "stopped": True})
elif words[0] == "rm":
    os.remove("container.json")
else:
    sys.exit("the fake docker knows no " + words[0])
"""
GETENT = """#!/bin/sh
[ "$2" = render ] && echo render:x:109: || echo video:x:44:
"""
SLEEP = """#!/bin/sh
echo "$(($(cat "$FAKES/clock") + $1))" >"$FAKES/clock"
if [ -e "$FAKES/interrupt" ]; then kill -INT $PPID; fi
"""


class Machine:
    """Eight idle GPUs under a folder of their own, and nothing running.

    docker, curl, clock and disk are fakes.
    """

    def __init__(self, folder):
        self.folder, self.bin, self.cache = folder, folder / "bin", folder / "hf cache"
        self.bin.mkdir()
        self.tool("sleep", SLEEP)
        self.tool("date", '#!/bin/sh\ncat "$FAKES/clock"\n')
        self.tool("getent", GETENT)
        self.disk(2000)
        for name in ("docker", "curl"):
            fake = f'"{sys.executable}" -IS "{folder}/fake.py" {name}'
            self.tool(name, f'#!/bin/sh\nexec {fake} "$@"\n')
        (folder / "fake.py").write_text(FAKE, encoding="utf-8")
        self.clock = folder / "clock"
        self.clock.write_text("1000", encoding="utf-8")
        self.root = folder / "root"
        for device in ("dev/kfd", "dev/dri/card0"):
            (self.root / device).mkdir(parents=True)
        for card in range(8):
            self.gpu(card)
        self.gpu("9 integrated", total=2)
        self.memory(500)
        self.calls_file, self.container = folder / "calls", folder / "container.json"
        self.set(http=READY)

    def tool(self, name, text):
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def disk(self, gigabytes):
        free = gigabytes * 10**9 // 1024 + 1
        self.tool("df", f"#!/bin/sh\necho Filesystem\necho /dev/x 0 0 {free} 0% /\n")

    def gpu(self, card, total=268, used=1):
        device = self.root / "sys" / "class" / "drm" / f"card{card}" / "device"
        device.mkdir(parents=True, exist_ok=True)
        (device / "mem_info_vram_total").write_text(str(total << 30), encoding="utf-8")
        (device / "mem_info_vram_used").write_text(str(used << 30), encoding="utf-8")

    def memory(self, gigabytes):
        (self.root / "proc").mkdir(exist_ok=True)
        available = gigabytes * 10**9 // 1024
        (self.root / "proc" / "meminfo").write_text(
            f"MemTotal: 1 kB\nMemAvailable: {available} kB\n",
            encoding="utf-8",
        )

    def set(self, **scene):
        text = json.dumps({"http": READY, **scene})
        (self.folder / "scene.json").write_text(text, encoding="utf-8")

    def foreign_container(self):
        self.container.write_text(json.dumps({"began": 0, "label": ""}), encoding="utf-8")

    def run(self, *words, status=0, **variables):
        """The finished process of serve_r1.sh.

        Sets `calls` to what it asked of docker and curl, as lists of words.
        """
        self.calls_file.write_text("", encoding="utf-8")
        environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "FAKES": str(self.folder),
            "SYSTEM_ROOT": str(self.root),
            "HF_CACHE": str(self.cache),
            "PORT": "1",  # nobody listens there
            "REVISION": "c0ffee",
            **variables,
        }
        done = subprocess.run(
            ["bash", str(ROOT / "serve_r1.sh"), *words],
            cwd=self.folder,
            env=environment,
            timeout=120,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == status, done.stdout + done.stderr
        lines = self.calls_file.read_text(encoding="utf-8").splitlines()
        self.records = [json.loads(line) for line in lines]
        self.calls = [record["words"] for record in self.records]
        return done

    def docker(self, verb):
        return [words for words in self.calls if words[:2] == ["docker", verb]]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def dry_run(*words, **variables):
    """The commands, as lists of words, of a dry run on this very machine."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/nobody", **variables}
    done = subprocess.run(
        ["bash", "serve_r1.sh", "--dry-run", *words],
        cwd=ROOT,
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def docker_run(commands):
    found = [words for words in commands if words[:2] == ["docker", "run"]]
    assert len(found) == 1
    return found[0]


def has(words, *part):
    return any(words[i:i + len(part)] == list(part) for i in range(len(words)))


def sent_by(words):
    """What a curl command posts."""
    return json.loads(words[words.index("--data-binary") + 1])


# --------------------------------------------------------------------------------------------------
# the commands


def test_the_command_is_the_documented_one_with_its_corrections():
    words = docker_run(dry_run(GPU_GROUPS="video 109"))
    cut = words.index(IMAGE)
    options, serve = words[:cut], words[cut + 1:]
    documented = [
        ["--name", "deepseek-r1"],
        ["--network", "host"],
        ["--device", "/dev/kfd"],
        ["--device", "/dev/dri"],
        ["--env", "NCCL_MIN_NCHANNELS=112"],
        ["--env", "VLLM_ROCM_USE_AITER=1"],
        ["--env", "HIP_FORCE_DEV_KERNARG=1"],
        ["--env", "TORCH_BLAS_PREFER_HIPBLASLT=1"],
    ]
    corrections = [
        ["--detach"],
        ["--ipc=host"],
        ["--group-add", "video"],
        ["--group-add", "109"],
        ["--security-opt", "seccomp=unconfined"],
        ["--restart", "on-failure:3"],
        ["--health-start-period", "30m"],
        ["--volume", "/home/nobody/.cache/huggingface:/root/.cache/huggingface"],
        ["--log-driver", "json-file"],
        ["--log-opt", "max-size=100m"],
        ["--log-opt", "max-file=5"],
    ]
    for part in (*documented, *corrections):
        assert has(options, *part), part
    assert "--privileged" not in options and not has(options, "--publish")
    assert serve == shlex.split(
        f"vllm serve {MODEL} --tensor-parallel-size 8 --max-model-len 32768 --host 127.0.0.1"
        " --port 8000 --trust-remote-code --block-size 1 --no-enable-prefix-caching"
        " --reasoning-parser deepseek_r1 --allowed-origins []"
    )
    assert problems(serve, (0, 11)) == []


def test_the_documented_command_is_a_matter_of_variables():
    words = docker_run(
        dry_run(
            MAX_MODEL_LEN="8192",
            PREFIX_CACHING="",
            REASONING_PARSER="",
            ALLOWED_ORIGINS="",
            ADDRESS="0.0.0.0",
            VLLM_API_KEY="k",
            GPU_GROUPS="",
            IPC="",
            SECCOMP="",
        )
    )
    assert words[words.index(IMAGE) + 1:] == shlex.split(
        f"vllm serve {MODEL} --tensor-parallel-size 8 --max-model-len 8192 --host 0.0.0.0"
        " --port 8000 --trust-remote-code --block-size 1"
    )
    assert not {"--group-add", "--ipc=host", "--security-opt"} & set(words)


SETTINGS = [  # (variable, value, words), in runs that do not contradict themselves
    [
        ("IMAGE", "rocm/vllm@sha256:0f", ["rocm/vllm@sha256:0f", "vllm", "serve"]),
        ("MODEL", f"/models/{AWKWARD}", ["serve", f"/models/{AWKWARD}"]),
        ("REVISION", "0f0f", ["--revision", "0f0f"]),
        ("CONTAINER", "r1.b_2", ["--name", "r1.b_2"]),
        ("ADDRESS", "localhost", ["--host", "localhost"]),
        ("PORT", "9000", ["--port", "9000"]),
        ("TENSOR_PARALLEL_SIZE", "4", ["--tensor-parallel-size", "4"]),
        ("MAX_MODEL_LEN", "163840", ["--max-model-len", "163840"]),
        ("BLOCK_SIZE", "64", ["--block-size", "64"]),
        ("PREFIX_CACHING", "1", ["--enable-prefix-caching"]),
        ("REASONING_PARSER", "qwen3", ["--reasoning-parser", "qwen3"]),
        ("ALLOWED_ORIGINS", '["http://a b"]', ["--allowed-origins", '["http://a b"]']),
        ("RESTARTS", "5", ["--restart", "on-failure:5"]),
    ],
    [
        ("NCCL_MIN_NCHANNELS", "64", ["--env", "NCCL_MIN_NCHANNELS=64"]),
        ("VLLM_ROCM_USE_AITER", AWKWARD, ["--env", f"VLLM_ROCM_USE_AITER={AWKWARD}"]),
        ("HIP_FORCE_DEV_KERNARG", "0", ["--env", "HIP_FORCE_DEV_KERNARG=0"]),
        ("TORCH_BLAS_PREFER_HIPBLASLT", "0", ["--env", "TORCH_BLAS_PREFER_HIPBLASLT=0"]),
        ("HF_CACHE", f"/x/{AWKWARD}", ["--volume", f"/x/{AWKWARD}:/root/.cache/huggingface"]),
        ("RESTARTS", "0", ["--restart", "no"]),
        ("GPU_GROUPS", "44", ["--group-add", "44"]),
        ("IPC", "private", ["--ipc=private"]),
        ("SECCOMP", "/etc/a b.json", ["--security-opt", "seccomp=/etc/a b.json"]),
    ],
    [
        ("NETWORK", "bridge", ["--network", "bridge", "--publish", "127.0.0.1:8000:8000"]),
        ("NETWORK", "bridge", ["--host", "0.0.0.0"]),
        (
            "DEVICES",
            "/dev/kfd /dev/dri/renderD128",
            ["--device", "/dev/kfd", "--device", "/dev/dri/renderD128"],
        ),
        ("HF_HOME", "/h", ["--volume", "/h:/root/.cache/huggingface"]),
        ("HEALTH_START", "1h", ["--health-start-period", "1h"]),
        ("HEALTH_INTERVAL", "5s", ["--health-interval", "5s"]),
        ("HEALTH_RETRIES", "9", ["--health-retries", "9"]),
        ("LOG_SIZE", "1g", ["--log-opt", "max-size=1g"]),
        ("LOG_FILES", "2", ["--log-opt", "max-file=2"]),
    ],
]


@pytest.mark.parametrize("rows", SETTINGS, ids=["vllm", "container", "docker"])
def test_every_setting_comes_from_the_environment_as_one_word(rows):
    words = docker_run(dry_run(**{variable: value for variable, value, _ in rows}))
    for variable, _, part in rows:
        assert has(words, *part), variable


def test_an_empty_setting_leaves_its_flag_out():
    flags = {
        "BLOCK_SIZE": "--block-size",
        "TRUST_REMOTE_CODE": "--trust-remote-code",
        "REASONING_PARSER": "--reasoning-parser",
        "ALLOWED_ORIGINS": "--allowed-origins",
        "PREFIX_CACHING": "--no-enable-prefix-caching",
        "IPC": "--ipc=host",
        "SECCOMP": "--security-opt",
        "GPU_GROUPS": "--group-add",
        "NCCL_MIN_NCHANNELS": "NCCL_MIN_NCHANNELS=112",
        "VLLM_ROCM_USE_AITER": "VLLM_ROCM_USE_AITER=1",
        "HIP_FORCE_DEV_KERNARG": "HIP_FORCE_DEV_KERNARG=1",
        "TORCH_BLAS_PREFER_HIPBLASLT": "TORCH_BLAS_PREFER_HIPBLASLT=1",
    }
    assert set(flags.values()) <= set(docker_run(dry_run()))
    assert not set(flags.values()) & set(docker_run(dry_run(**dict.fromkeys(flags, ""))))


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_asks_docker_for_nothing_but_what_is_there(machine, verb):
    done = machine.run("--dry-run", verb)
    programs = {shlex.split(line)[0] for line in done.stdout.splitlines()}
    assert programs and programs <= {"docker", "curl", "mkdir", "sleep"}
    assert all(words[1] in ("version", "container") for words in machine.calls)
    assert machine.run(verb, DRY_RUN="1").stdout == done.stdout
    assert machine.run(verb, "--dry-run", DRY_RUN="0").stdout == done.stdout
    assert not machine.cache.exists() and not machine.container.exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_works_without_docker_and_curl(tmp_path, verb):
    for tool in ("bash", "sed", "cut", "awk", "cksum", "tr", "head", "df", "du", "dirname", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    assert dry_run(verb, PATH=str(tmp_path)) == dry_run(verb, GPU_GROUPS="video")


def without_status(calls):
    return [words[:-2] if words[-2:-1] == ["--write-out"] else words for words in calls]


def test_what_a_dry_run_prints_is_what_is_run(machine):
    """Also beside a stopped container of ours, which is removed, and beside a running one."""
    settings = {"MODEL": f"/models/{AWKWARD}", "VLLM_ROCM_USE_AITER": AWKWARD}
    listed = {
        **READY,
        "/health": [[30, 200, ""]],
        "/v1/models": [[0, 200, json.dumps({"data": [{"id": settings["MODEL"]}]})]],
    }
    for life, status in ((None, 0), ("exited", 1), ("running", 0)):  # the new one ends at once, too
        machine.set(http=listed, **({"life": [[0, life, 0, 0]]} if life else {}))
        dry = machine.run("--dry-run", **settings)
        printed = [shlex.split(line) for line in dry.stdout.splitlines()]
        machine.run("start", status=status, **settings)
        asked = [
            words
            for words in without_status(machine.calls)
            if words[1] != "version" and "--tail" not in words
        ]
        assert all(words in printed for words in asked), asked
        promised = [w for w in printed if w[0] == "docker" and "--tail" not in w]
        assert all(words in asked for words in promised), printed
        verbs = [words[1] for words in asked if words[0] == "docker"]
        assert ("pull" in verbs) == (life != "running")
        assert ("rm" in verbs) == (life == "exited")
        assert ("run" in verbs) == (life != "running")
    last_line = ["docker", "logs", "--tail", "1", "deepseek-r1"]
    assert last_line in printed and last_line in machine.calls
    assert all(words in asked for words in printed if words[0] == "curl")
    assert json.loads(asked[-1][-1])["model"] == settings["MODEL"]


def test_words_after_two_dashes_reach_vllm_untouched(machine):
    machine.run("start", "--", "--max-num-seqs", "64", "--hf-overrides", AWKWARD)
    assert docker_run(machine.calls)[-4:] == ["--max-num-seqs", "64", "--hf-overrides", AWKWARD]


@pytest.mark.parametrize(
    "words, needle",
    [
        (["restart"], "restart"),
        (["start", "stop"], "one verb"),
        (["--dry"], "--dry"),
        (["stop", "--", "x"], "start"),
        (["--dry-run", "restart"], "restart"),
        ([""], "unknown"),
    ],
)
def test_an_unknown_word_is_one_line_and_status_2(machine, words, needle):
    done = machine.run(*words, status=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert needle in done.stderr
    assert not machine.calls



def test_help_shows_the_verbs(machine):
    assert "throughput" in machine.run("--help").stdout and "set -e" not in machine.run("-h").stdout


@pytest.mark.parametrize(
    "variable, value",
    [
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "http"),
        ("PORT", "08"),
        ("PORT", "1\n2"),
        ("MAX_MODEL_LEN", "163841"),
        ("MAX_MODEL_LEN", "-1"),
        ("TENSOR_PARALLEL_SIZE", "0"),
        ("RESTARTS", "many"),
        ("READY_SECONDS", "1.5"),
        ("LOG_FILES", "99999999999999999999"),
        ("BLOCK_SIZE", "one"),
        ("PREFIX_CACHING", "yes"),
        ("TRUST_REMOTE_CODE", "yes"),
        ("ADDRESS", "::"),
        ("ADDRESS", "a b"),
        ("CONTAINER", "-x"),
        ("CONTAINER", "a b"),
        ("VLLM_API_KEY", "two words"),
        ("HF_CACHE", "/a:b"),
        ("IMAGE", "x\ny"),
        ("PROMPT", "x\x1b[2J"),
        ("ADDRESS", "0.0.0.0"),
        ("ADDRESS", "10.0.0.1"),
        ("ADDRESS", "127.evil.example"),
        ("DEVICES", "/dev/kfd\n/x"),
        ("SECCOMP", "\t"),
        ("HEALTH_START", "30"),
        ("HEALTH_INTERVAL", "0s"),
        ("LOG_SIZE", "big"),
        ("STOP_SECONDS", "1m"),
        ("HEALTH_RETRIES", "0"),
    ],
)
def test_a_bad_setting_is_one_line_before_anything_is_asked(machine, variable, value):
    done = machine.run("--dry-run", status=2, **{variable: value})
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert variable in done.stderr and not machine.calls


def test_off_the_hosts_network_a_port_is_published_at_an_address_and_not_at_a_name(machine):
    done = machine.run("--dry-run", status=2, NETWORK="bridge", ADDRESS="localhost")
    assert "must be an IPv4 address" in done.stderr
    assert "the words after --" in machine.run("start", "--", "a\nb", status=2).stderr


def test_a_relative_cache_is_no_volume_name(machine):
    machine.run(HF_CACHE="models")
    volume = f"{machine.folder}/models:/root/.cache/huggingface"
    assert has(docker_run(machine.calls), "--volume", volume)
    assert (machine.folder / "models").is_dir()


@pytest.mark.parametrize("verb", VERBS)
def test_secrets_are_on_no_command_line_and_in_no_output(machine, verb):
    secrets = {"VLLM_API_KEY": "key-$HOME-\"'", "HF_TOKEN": "hf_secret"}
    if verb != "start":
        machine.foreign_container()
    machine.set(
        http={
            **READY,
            "/metrics": [[0, 200, "vllm:generation_tokens_total 1\nvllm:num_requests_running 0"]],
            "/v1/chat/completions": [[0, 200, '{"finish_reason":"stop"}']],
        }
    )
    printed = machine.run("--dry-run", verb, **secrets).stdout
    done = machine.run(verb, status=2 if verb == "stop" else 0, ADDRESS="0.0.0.0", **secrets)
    shown = printed + done.stdout + done.stderr + json.dumps(machine.calls)
    assert not any(secret in shown for secret in secrets.values())
    assert "key-" not in str(machine.calls)
    for record in machine.records:
        if record["words"][0] == "curl":
            assert record["header"] == f"Authorization: Bearer {secrets['VLLM_API_KEY']}\n"
        if record["words"][1] == "run":
            assert has(record["words"], "--env", "HF_TOKEN")
            assert has(record["words"], "--env", "VLLM_API_KEY")
            assert {name: record["environment"][name] for name in secrets} == secrets
    if verb in ("status", "throughput", "test"):
        assert '--header @<(printf "Authorization: Bearer %s\\n" "$VLLM_API_KEY")' in printed


# --------------------------------------------------------------------------------------------------
# starting and stopping


def test_two_starts_in_a_row_make_one_container_and_a_stop_removes_it(machine):
    assert "ready after 0 s" in machine.run().stdout
    verbs = [words[1] for words in machine.calls if words[0] == "docker"]
    assert verbs == ["version", "container", "image", "pull", "run", "container"]
    assert machine.cache.is_dir()
    for card in range(8):
        machine.gpu(card, used=250)  # by the container itself
    machine.memory(20)
    machine.disk(5)
    done = machine.run("start", HF_TOKEN="only for downloads")
    assert "there already" in done.stdout
    assert "ready after 0 s" in done.stdout
    assert not machine.docker("run") + machine.docker("pull")
    assert machine.run("status").stdout.endswith(f"ready: {MODEL} at http://127.0.0.1:1/v1\n")
    machine.run("stop")
    assert machine.docker("stop") and machine.docker("rm") and not machine.container.exists()
    for card in range(8):
        machine.gpu(card)
    machine.memory(500)
    machine.disk(2000)
    assert "nothing to stop" in machine.run("stop").stdout and not machine.docker("stop")
    machine.run()
    assert machine.docker("run")


def test_a_stopped_container_of_ours_makes_room(machine):
    machine.run()
    machine.set(life=[[0, "exited", 3, 1]])
    machine.run("start", status=1)  # the scene stays: the new one dies as well
    verbs = [words[1] for words in machine.calls]
    assert verbs.index("rm") < verbs.index("run")


def test_an_image_that_is_there_is_not_pulled(machine):
    machine.set(image=True)
    machine.run()
    assert not machine.docker("pull") and machine.docker("run")


def test_other_settings_do_not_pass_for_the_running_ones(machine):
    machine.run()
    done = machine.run(MAX_MODEL_LEN="8192", status=2)
    assert "other settings" in done.stderr and not machine.docker("run")


def test_a_foreign_container_of_that_name_is_left_alone(machine):
    machine.foreign_container()
    for verb in ("start", "stop"):
        done = machine.run(verb, status=2)
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "deepseek-r1" in done.stderr
        assert not machine.docker("run") + machine.docker("stop") + machine.docker("rm")
    machine.container.unlink()
    machine.run("start", CONTAINER="another-name")


def test_a_taken_port_is_known_before_anything_is_started(machine):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = machine.run(status=2, PORT=port)
        assert f"port {port} is taken" in done.stderr
        assert not machine.docker("run") + machine.docker("pull")
        assert f"warning: port {port} is taken" in machine.run("--dry-run", PORT=port).stderr


def remove_device(machine):
    (machine.root / "dev" / "kfd").rmdir()


@pytest.mark.parametrize(
    "harm, needles",
    [
        (lambda m: m.set(daemon=False), ["docker does not answer"]),
        (remove_device, ["/dev/kfd is missing"]),
        (
            lambda m: shutil.rmtree(m.root / "sys" / "class" / "drm" / "card3"),
            ["7 GPUs of 64 GiB or more, 8 are needed"],
        ),
        (lambda m: m.gpu(5, used=40), ["card5 has 40 of 268 GiB"]),
        (lambda m: m.disk(500), ["500 GB are free"]),
        (lambda m: m.memory(20), ["20 GB of host memory"]),
        (lambda m: shutil.rmtree(m.root), ["/dev/kfd", "/dev/dri", "0 GPUs", "unknown GB"]),
    ],
)
def test_preflight_names_what_is_wrong_and_starts_nothing(machine, harm, needles):
    harm(machine)
    done = machine.run(status=2)
    lines = done.stderr.splitlines()
    assert len(lines) == len(needles) and all(line.startswith("error: ") for line in lines)
    assert all(needle in line for needle, line in zip(needles, lines))
    assert not machine.docker("run") + machine.docker("pull")
    dry = machine.run("--dry-run")
    assert dry.stderr == done.stderr.replace("error: ", "warning: ") and "docker run" in dry.stdout


def test_missing_groups_are_a_warning(machine):
    machine.tool("getent", "#!/bin/sh\nexit 2\n")
    assert machine.run().stderr.startswith("warning: this machine lacks the group")
    assert docker_run(machine.calls).count("--group-add") == 1


def test_what_the_cache_holds_need_not_fit_on_the_disk_again(machine):
    blobs = machine.cache / "hub" / "models--deepseek-ai--DeepSeek-R1" / "blobs"
    blobs.mkdir(parents=True)
    machine.tool("du", f"#!/bin/sh\necho {689 * 10**9 // 1024}\n")
    machine.disk(20)
    # All is there: 700 GB is the sum of rounded shards.
    assert "still to be downloaded" not in machine.run().stdout
    machine.run("stop")
    machine.disk(5)
    machine.run()
    machine.run("stop")
    # du ends with 1 where one of the folders may not be read.
    machine.tool("du", f"#!/bin/sh\necho {600 * 10**9 // 1024}\nexit 1\n")
    assert "5 GB are free" in machine.run(status=2).stderr
    machine.disk(200)
    assert "up to 100 GB are still to be downloaded" in machine.run().stdout


def test_a_disk_of_unknown_size_is_a_finding(machine):
    machine.tool("df", "#!/bin/sh\nexit 1\n")
    assert "df does not say" in machine.run(status=2).stderr
    assert "docker run" in machine.run("--dry-run").stdout



def test_the_first_download_pins_the_revision_and_that_is_no_other_setting(machine):
    done = machine.run(REVISION="")
    assert "--revision" not in docker_run(machine.calls)
    assert "warning: REVISION is empty" in done.stderr
    refs = machine.cache / "hub" / "models--deepseek-ai--DeepSeek-R1" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0f" * 20, encoding="utf-8")
    machine.run(REVISION="")
    assert not machine.docker("run")
    machine.run("stop")
    machine.run(REVISION="")
    assert docker_run(machine.calls)[-2:] == ["--revision", "0f" * 20]
    machine.run("stop")
    machine.run(REVISION="main")
    assert docker_run(machine.calls)[-2:] == ["--revision", "main"]


@pytest.mark.parametrize(
    "scene, needle", [({"pull": 1}, "could not pull"), ({"run": 125}, "could not start")]
)
def test_what_docker_refuses_is_a_failure(machine, scene, needle):
    machine.set(**scene)
    assert needle in machine.run(status=1).stderr


# --------------------------------------------------------------------------------------------------
# waiting until it answers, on a clock that the fake sleep moves


def test_a_load_of_600_seconds_shows_its_progress(machine):
    machine.set(
        http={path: [[0, 503, ""], [600, *rows[0][1:]]] for path, rows in READY.items()},
        log="older\n\x1b[31mLoading safetensors checkpoint shards:  12% \x07\n",
    )
    done = machine.run()
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("serve_r1: ready after 600 s")
    shown = [line for line in lines if "of at most 1800 s" in line]
    assert len(shown) == 20
    assert "\x1b" not in done.stdout + done.stderr
    assert "12%" in shown[0]
    assert "/health" in shown[0]



def test_ready_means_health_and_model_and_a_token(machine):
    machine.set(
        http={
            "/health": [[30, 200, ""]],
            "/v1/models": [[0, 200, '{"data":[{"id":"other"}]}'], [60, 200, LISTED]],
            "/v1/completions": [[0, 500, ""], [90, 200, "{}"]],
        }
    )
    done = machine.run()
    assert "ready after 90 s" in done.stdout
    for step in ("/health", "in /v1/models", "first token"):
        assert step in done.stdout, step
    assert sent_by(machine.calls[-1]) == {"model": MODEL, "prompt": "1", "max_tokens": 1}


def test_the_deadline_ends_the_waiting_and_not_the_container(machine):
    machine.set(http={})
    done = machine.run(status=1, READY_SECONDS="90")
    assert "not ready after 90 s" in done.stderr
    assert machine.container.exists()
    assert not machine.docker("stop")
    assert "not ready" in machine.run("status", status=1).stderr
    machine.set()
    assert "there already" in machine.run().stdout


def test_a_container_that_dies_while_loading_shows_why(machine):
    machine.set(
        http={},
        log="torch.OutOfMemoryError: HIP out of memory\x1b[0m\n",
        life=[
            [0, "running", 0, 0],
            [60, "restarting", 1, 1],
            [70, "running", 1, 0],
            [120, "exited", 3, 137],
        ],
    )
    done = machine.run(status=1)
    assert "1 of 3 times" in done.stdout and "ended with status 137 after 3 restarts" in done.stderr
    assert done.stderr.count("HIP out of memory") == 2 and "\x1b" not in done.stderr
    assert machine.clock.read_text(encoding="utf-8").strip() == "1120", "and not at the deadline"


def test_a_container_that_somebody_removes_is_not_waited_for(machine):
    machine.set(http={}, life=[[0, "running", 0, 0], [10, "gone", 0, 0]])
    assert "is gone" in machine.run(status=1).stderr


def test_a_wrong_key_is_said_at_once(machine):
    machine.set(http={**READY, "/v1/models": [[0, 401, "{}"]]})
    assert "VLLM_API_KEY" in machine.run(status=1, VLLM_API_KEY="wrong").stderr
    assert machine.clock.read_text(encoding="utf-8").strip() == "1000"


def test_ctrl_c_ends_the_waiting_and_says_that_the_container_stays(machine):
    machine.set(http={})
    (machine.folder / "interrupt").touch()
    done = machine.run(status=128 + signal.SIGINT)
    assert "continues to load" in done.stdout and machine.container.exists()


# --------------------------------------------------------------------------------------------------
# asking the running one


def metrics(*values):
    """The counter once per reading, from two engines, with a label that holds spaces."""
    rows = []
    for value in values:
        lines = [
            "# HELP vllm:generation_tokens_total Number.",
            "vllm:generation_tokens_created 9e9",
            f'vllm:generation_tokens_total{{engine="0",model_name="a b"}} {value}',
            'vllm:generation_tokens_total{engine="1"} 1e+03',
            'vllm:num_requests_running{engine="0"} 3.0',
        ]
        rows.append([0, 200, "\n".join(lines)])
    return rows


@pytest.mark.parametrize(
    "readings, status, needle",
    [
        ((5000.0, 1.25e4, 1.25e4), 0, "750.0 tokens/s: 7500 in 10 s, 3 requests now"),
        ((5.0, 5.0, 5.0), 0, "0.0 tokens/s"),
        ((5000.0, 10.0, 10.0), 1, "restarted"),
    ],
)
def test_throughput_is_the_counters_growth_over_ten_seconds(machine, readings, status, needle):
    machine.foreign_container()
    machine.set(in_turn=True, http={"/metrics": metrics(*readings)})
    done = machine.run("throughput", status=status)
    assert needle in done.stdout + done.stderr
    assert machine.clock.read_text(encoding="utf-8").strip() == "1010"



@pytest.mark.parametrize(
    "rows, needle",
    [([], "status 000"), ([[0, 404, ""]], "status 404"), ([[0, 200, "up 1"]], "is this vLLM?")],
)
def test_throughput_without_a_counter_is_a_failure(machine, rows, needle):
    machine.foreign_container()
    machine.set(http={"/metrics": rows})
    assert needle in machine.run("throughput", status=1).stderr


@pytest.mark.parametrize(
    "code, body, status, needle",
    [
        (200, '{"choices": [{"finish_reason": "stop"}]}', 0, ""),
        (200, '{"choices":[{"finish_reason":"length"}]}', 1, "MAX_TOKENS"),
        (200, '{"choices":[]}', 1, "finish_reason"),
        (500, "sorry", 1, "status 500"),
    ],
)
def test_the_test_request_wants_a_whole_answer(machine, code, body, status, needle):
    machine.foreign_container()
    machine.set(http={"/v1/chat/completions": [[0, code, body]]})
    done = machine.run("test", status=status, PROMPT=AWKWARD)
    assert done.stdout == body + "\n" and needle in done.stderr
    assert sent_by(machine.calls[-1]) == {
        "model": MODEL,
        "messages": [{"role": "user", "content": AWKWARD}],
        "max_tokens": 2048,
    }


def test_logs_follow_the_container(machine):
    machine.foreign_container()
    (machine.bin / "curl").unlink()  # of no use here
    assert "Loading" in machine.run("logs", PATH=f"{machine.bin}:/usr/bin:/bin").stdout
    assert machine.calls[-1] == ["docker", "logs", "--tail", "100", "--follow", "deepseek-r1"]
    machine.container.unlink()
    assert "bash serve_r1.sh start" in machine.run("logs", status=2).stderr


def test_without_a_container_the_status_is_one_line_and_a_test_request_prints_nothing(machine):
    assert machine.run("status", status=1).stdout == "serve_r1: deepseek-r1: no such container\n"
    assert machine.run("test", status=1).stdout == ""


@pytest.mark.parametrize("verb", ["stop", "status", "logs"])
def test_a_docker_that_does_not_answer_is_said(machine, verb):
    machine.set(daemon=False)
    assert "docker does not answer" in machine.run(verb, status=2).stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_real_curl_sends_what_a_real_server_understands(machine):
    seen = []
    answers = {"/v1/models": LISTED, "/v1/chat/completions": '{"finish_reason": "stop"}'}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kind, key = self.headers.get("Content-Type"), self.headers["Authorization"]
            seen.append((self.command, self.path, kind, key, body))
            said = answers.get(self.path, "").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = answer
        log_message = lambda *_: None

    (machine.bin / "curl").unlink()
    machine.foreign_container()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            settings = {
                "PORT": str(server.server_port),
                "VLLM_API_KEY": "$k'\"",
                "http_proxy": "http://127.0.0.1:9",
            }
            assert "ready:" in machine.run("status", **settings).stdout
            assert "finish_reason" in machine.run("test", PROMPT=AWKWARD, **settings).stdout
        finally:
            server.shutdown()
            thread.join()
    assert [row[:3] for row in seen] == [
        ("GET", "/health", None),
        ("GET", "/v1/models", None),
        ("POST", "/v1/completions", "application/json"),
        ("POST", "/v1/chat/completions", "application/json"),
    ]
    assert {row[3] for row in seen} == {"Bearer $k'\""}
    assert json.loads(seen[-1][4])["messages"][0]["content"] == AWKWARD
