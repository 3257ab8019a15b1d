"""compose.yaml and the commands in docs/models: right by schema, by vLLM's flags, and safe to start
on a shared memory."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from vllm_flags import BYTES, problems

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

PROFILES = {"fp8": "vllm-qwen3-32b-fp8", "bf16": "vllm-qwen3-32b"}
VERSIONS = [(0, 11), (0, 13), (0, 19)]  # compose.yaml must not depend on which vLLM the image holds
# of models that vLLM serves; the other pages there are of models that are trained here
PAGES = [ROOT / "docs" / "models" / f"{name}.md" for name in ("deepseek-r1", "qwen3-32b")]
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def services(**environment):
    """The services with their variables put in, as docker compose does it."""
    text = VARIABLE.sub(
        lambda found: environment.get(found[1]) or found[2],
        (ROOT / "compose.yaml").read_text(encoding="utf-8"),
    )
    assert "${" not in text, "a variable without a default"
    return yaml.safe_load(text)["services"]


def flag(service, name):
    return next(
        word.partition("=")[2] for word in service["command"] if word.startswith(f"--{name}=")
    )


def started(profile):
    """{name: service} of what `docker compose --profile PROFILE up` starts."""
    return {
        name: service
        for name, service in services().items()
        if profile in service.get("profiles", [profile])
    }


def test_the_file_fits_the_compose_specification():
    tool = shutil.which("check-jsonschema") or shutil.which(
        "check-jsonschema", path=str(Path(sys.executable).parent)
    )
    if tool is None:
        pytest.skip("check-jsonschema is not installed")
    done = subprocess.run(
        [tool, "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_three_services_and_their_profiles():
    assert {name: service.get("profiles") for name, service in services().items()} == {
        "ollama": None,
        "vllm-qwen3-32b-fp8": ["fp8"],
        "vllm-qwen3-32b": ["bf16"],
    }
    for profile, name in PROFILES.items():
        assert set(started(profile)) == {"ollama", name}


@pytest.mark.parametrize("profile", PROFILES)
def test_each_port_has_one_owner_in_a_profile_and_is_published_on_loopback(profile):
    ports = [port for service in started(profile).values() for port in service["ports"]]
    assert sorted(ports) == ["127.0.0.1:11434:11434", "127.0.0.1:8000:8000"]


def test_docker_exec_finds_each_container_by_the_name_of_its_service():
    assert all(service["container_name"] == name for name, service in services().items())


def test_both_models_want_the_same_port_so_that_they_never_share_the_memory():
    assert (
        len({tuple(services(VLLM_PORT="9000")[name]["ports"]) for name in PROFILES.values()}) == 1
    )


@pytest.mark.parametrize("name, service", services().items())
def test_a_service_is_pinned_watched_bounded_and_keeps_its_downloads(name, service):
    tag = service["image"].rpartition(":")[2]
    assert re.search(r"\d+\.\d+", tag) and "latest" not in service["image"]
    health = service["healthcheck"]
    assert (
        health["test"][0] == "CMD"
        and "curl" not in health["test"]
        and health["retries"]
        and health["start_period"]
    )
    assert service["restart"] == "on-failure:3" and set(service["logging"]["options"]) == {
        "max-size",
        "max-file",
    }
    assert service["volumes"] == (
        ["/opt/ollama:/root/.ollama"] if name == "ollama" else ["/opt/hf:/root/.cache/huggingface"]
    )
    assert (
        service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        and "privileged" not in service
    )


def test_the_python_of_a_health_check_compiles():
    for name in PROFILES.values():
        program = services()[name]["healthcheck"]["test"]
        assert program[1:3] == ["python3", "-c"]
        compile(program[3], name, "exec")


def test_ollama_is_one_with_the_known_hole_closed():
    version = services()["ollama"]["image"].partition(":")[2]
    assert tuple(map(int, version.split("."))) >= (0, 17, 1)


@pytest.mark.parametrize("profile, weights", [("fp8", 34.3e9), ("bf16", 65.6e9)])
def test_the_memory_of_all_that_runs_together_is_below_the_whole(profile, weights):
    running = started(profile)
    vllm, ollama = running[PROFILES[profile]], running["ollama"]
    share = float(flag(vllm, "gpu-memory-utilization"))
    assert re.fullmatch(r"\d+g", ollama["mem_limit"])
    assert share + int(ollama["mem_limit"][:-1]) * 2**30 / BYTES < 1
    assert weights + int(flag(vllm, "kv-cache-memory-bytes")) < share * BYTES, (
        "weights and cache fit into what must be free at the start"
    )


@pytest.mark.parametrize("name", PROFILES.values())
@pytest.mark.parametrize("version", VERSIONS)
def test_every_flag_is_one_that_vllm_has(name, version):
    assert problems(services()[name]["command"], version) == []


@pytest.mark.parametrize("name", PROFILES.values())
def test_the_cache_holds_a_whole_context(name):
    service = services()[name]
    assert int(flag(service, "max-model-len")) * 256 * 1024 <= int(
        flag(service, "kv-cache-memory-bytes")
    )  # 256 KiB a token


def test_the_table_of_flags_finds_what_is_wrong():
    serve = ["vllm", "serve", "m"]
    assert (
        problems([*serve, "--port", "8000", "--trust-remote-code", "--allowed-origins=[]"], (0, 11))
        == []
    )
    for words in (
        ["--prot=1"],
        ["--port=0"],
        ["--port"],
        ["--port=x"],
        ["--port=1", "--port=2"],
        ["--trust-remote-code=1"],
        ["--block-size=3"],
        ["--gpu-memory-utilization=1.1"],
        ["--allowed-origins={}"],
        ["--allowed-origins=*"],
        ["--dtype=fp8"],
        ["stray"],
    ):
        assert len(problems([*serve, *words], (0, 11))) == 1, words
    for gigabytes in ("0", "4", "16"):
        words = [*serve, f"--swap-space={gigabytes}"]
        assert problems(words, (0, 17)) == [] and len(problems(words, (0, 18))) == 1
    for share in ("0", "-0.1", "nan"):
        assert len(problems([*serve, f"--gpu-memory-utilization={share}"], (0, 11))) == 1
    assert problems(["vllm", "--port=1"], (0, 11)) and problems(
        ["vllm", "serve", "--port=1"], (0, 11)
    )


# --------------------------------------------------------------------------------------------------
# .env.example and the pages


def test_env_example_names_every_variable_with_its_default():
    said = dict(
        re.findall(
            r"^#? ?([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text(encoding="utf-8"), re.M
        )
    )
    assert said.pop("COMPOSE_PROFILES") == "fp8"
    assert said == dict(VARIABLE.findall((ROOT / "compose.yaml").read_text(encoding="utf-8")))


def test_secrets_are_not_committed():
    assert "\n.env\n" in (ROOT / ".gitignore").read_text(encoding="utf-8")
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert "\nHF_TOKEN=\n" in example and "\nVLLM_API_KEY=\n" in example


def vllm_commands(page):
    """[(version, words)] of the `vllm serve` commands in a page's code blocks.

    ```bash vllm-0.11 says which vLLM a block is for.
    """
    found = []
    for info, block in re.findall(
        r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"), re.M
    ):
        version = re.search(r"vllm-(\d+)\.(\d+)", info)
        for line in block.replace("\\\n", " ").splitlines():
            if "vllm serve " in line:
                words = shlex.split(line)
                found.append(
                    (version and (int(version[1]), int(version[2])), words[words.index("vllm") :])
                )
    return found


def test_the_words_that_the_page_hands_on_and_the_upgrade_are_flags_of_their_version():
    def serve(*words, **variables):
        done = subprocess.run(
            ["bash", "serve_r1.sh", "--dry-run", *words],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "HOME": "/home/me", **variables},
            capture_output=True,
            text=True,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("docker run"))
        return shlex.split(line)[shlex.split(line).index("vllm") :]

    page = (ROOT / "docs" / "models" / "deepseek-r1.md").read_text(encoding="utf-8")
    handed_on = re.findall(r"serve_r1\.sh start -- ([^`\n]+)", page)
    assert handed_on
    for words in handed_on:
        assert problems(serve("start", "--", *words.split()), (0, 11)) == []
    assert (
        "BLOCK_SIZE= bash serve_r1.sh" in page
        and problems(serve(BLOCK_SIZE=""), (0, 19)) == []
        and problems(serve(), (0, 19)) != []
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_vllm_command_in_the_pages_has_only_flags_of_its_version(page):
    commands = vllm_commands(page)
    assert commands
    for version, words in commands:
        assert version, f"which vLLM is this for? {words}"
        assert problems(words, version) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_service_and_setting_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    known = set(
        re.findall(r"^([A-Z_]+)=", (ROOT / "serve_r1.sh").read_text(encoding="utf-8"), re.M)
    )
    known |= set(
        re.findall(r"^#? ?([A-Z0-9_]+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.M)
    )
    for line in re.findall(r"^(?:.*bash serve_r1\.sh.*|[A-Z0-9_]+=\S*)$", text, re.M):
        assert set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", line)) <= known, line
    verbs = r"docker compose (?:--profile \w+ )*(?:up -d|logs -f|stop|exec|restart) "
    for name in re.findall(verbs + r"([a-z][\w-]*)", text):
        assert name in services(), name
    for name in re.findall(r"docker exec ([a-z][\w-]*)", text):
        assert name in [service["container_name"] for service in services().values()], name


def test_the_dry_run_in_the_page_is_the_one_that_is_printed_today():
    page = (ROOT / "docs" / "models" / "deepseek-r1.md").read_text(encoding="utf-8")
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/home/me",
        "GPU_GROUPS": "video 109",
    }
    for verb in ("start", "status", "logs", "throughput", "test", "stop"):
        done = subprocess.run(
            ["bash", "serve_r1.sh", "--dry-run", verb],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        for line in done.stdout.splitlines():
            words = shlex.split(line)
            assert words in [
                shlex.split(shown)
                for shown in page.replace("\\\n", " ").splitlines()
                if shown.startswith(words[0])
            ], line


def test_json_in_the_pages_is_json():
    for page in PAGES:
        for text in re.findall(
            r"--(?:data(?:-binary)?|rope-scaling|hf-overrides) '([^']*)'|-d '([^']*)'",
            page.read_text(encoding="utf-8"),
        ):
            json.loads("".join(text))


# --------------------------------------------------------------------------------------------------
# documented values

DOCUMENTED = {  # the flags of the two documented commands; a switch has no value
    "Qwen/Qwen3-32B-FP8": {
        "--max-model-len": "32000",
        "--gpu-memory-utilization": "0.90",
        "--max-num-batched-tokens": "16384",
        "--max-num-seqs": "64",
        "--enable-prefix-caching": None,
        "--trust-remote-code": None,
    },
    "Qwen/Qwen3-32B": {
        "--max-model-len": "24000",
        "--gpu-memory-utilization": "0.85",
        "--max-num-batched-tokens": "16384",
        "--max-num-seqs": "48",
        "--enable-prefix-caching": None,
        "--dtype": "bfloat16",
        "--trust-remote-code": None,
    },
}
PARAMETERS = {  # documented: the default, what is recommended
    "--gpu-memory-utilization": ("0.90", "0.85-0.90"),
    "--max-model-len": (None, "32000"),
    "--max-num-batched-tokens": ("2048", "8192-16384"),
    "--max-num-seqs": ("256", "32-64"),
    "--block-size": ("16", "16"),
    "--swap-space": ("4", "0"),
    "--enable-chunked-prefill": ("false", "true"),
    "--enable-prefix-caching": ("false", "true"),
    "--quantization": ("none", "fp8"),
}
QWEN_PAGE = ROOT / "docs" / "models" / "qwen3-32b.md"
R1_PAGE = ROOT / "docs" / "models" / "deepseek-r1.md"


def section(page, title):
    """The lines of a page under a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def flags_of(words):
    """{flag: its value, None for a switch} of a command."""
    found = {}
    for word, following in zip(words, [*words[1:], "--"]):
        if word.startswith("--"):
            found[word] = None if following.startswith("--") else following
    return found


def test_the_page_quotes_the_two_documented_commands():
    quoted = {
        words[2]: flags_of(words[3:])
        for version, words in vllm_commands(QWEN_PAGE)
        if version == (0, 17)
    }
    assert quoted == DOCUMENTED


def test_what_compose_and_env_call_documented_is_documented():
    compose = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    for prefix, flags in zip(("FP8", "BF16"), DOCUMENTED.values()):
        said = re.search(
            rf"Qwen3-32B.*{prefix}\W.*: (\d+) sequences, (\d+) batched tokens, ([\d.]+)", example)
        wanted = ("--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization")
        assert said.groups() == tuple(flags[name] for name in wanted)

        # the comment stands behind the flag, or on the line before
        for name in wanted:
            place = re.search(rf"(.*\n)(.*{name}=\$\{{{prefix}_.*)", compose)
            number = re.search(r"documented: ([\d.]+)", place[2]) or re.search(
                r"documented: ([\d.]+)", place[1])
            assert number[1] == flags[name], name


def test_the_page_has_every_documented_parameter_with_its_default_and_its_recommendation():
    rows = re.findall(r"^\| `(--[\w-]+)` (.*) \|$", section(QWEN_PAGE, "The parameters"), re.M)
    table = {name: cells.strip("| ").split(" | ") for name, cells in rows}
    assert PARAMETERS.keys() <= table.keys()
    for name, (default, recommended) in PARAMETERS.items():
        purpose, said_default, said_recommended, here = table[name]
        assert purpose and here
        assert said_default.startswith(default or "the model's") and (
            said_recommended.startswith(recommended))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_table_of_flags_takes_the_documented_values(name):
    for text in PARAMETERS[name]:
        if text in (None, "none", "false"):
            continue
        values = [None] if text == "true" else text.split("-")
        for value in values:
            words = [name] if value is None else [name, value]
            assert problems(["vllm", "serve", "m", *words], (0, 11)) == []


@pytest.mark.parametrize("word", [
    "6,144 CUDA",
    "10 Cortex-X925",
    "16 channels",
    "1,000 TOPS",
    "200 billion",
    "405 billion",
    "200 Gbit/s",
    "240 W",
    "0 to 35 C",
    "RoPE",
    "SwiGLU",
    "RMSNorm",
])
def test_the_page_describes_the_machine_and_the_model(word):
    assert word in section(QWEN_PAGE, "The machine and the model")


@pytest.mark.parametrize("seen, remedy", [
    ("out of memory", "--gpu-memory-utilization"),
    ("low throughput", "--max-num-batched-tokens"),
    ("high latency", "fewer sequences"),
])
def test_the_documented_troubles_have_a_row(seen, remedy):
    rows = section(QWEN_PAGE, "When something is wrong").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| {seen}")]
    assert remedy in row


def test_the_documented_order_of_tuning_has_five_steps():
    assert re.findall(r"^(\d)\. ", section(QWEN_PAGE, "Tuning"), re.M) == list("12345")


def test_r1_is_asked_as_documented_and_its_rate_stands_beside_the_bound():
    from nanochat.hardware import DEVICES
    from nanochat.roofline import MODELS, decode_rate

    asking = section(R1_PAGE, "Asking it")
    for words in ("curl http://localhost:8000/v1/models", '"content": "Hello!"', "python3 chat.py"):
        assert words in asking
    bound, _ = decode_rate(MODELS["deepseek-r1"], DEVICES["mi350x"], "fp8", 1, 1024, 8)
    limits = section(R1_PAGE, "Sizes and limits")
    assert "**~70 tokens/s**" in limits and f"{70 / bound:.0%}".replace("%", " %") in limits
    assert f"the bound of {bound:,.0f}" in limits


def test_the_documented_one_liner_prints_the_answer():
    (program,) = re.findall(r'\| python3 -c "(.*)"$', section(R1_PAGE, "Asking it"), re.M)
    reply = {"choices": [{"message": {"role": "assistant", "content": "Hello there."}}]}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(reply),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "Hello there.\n")
