"""The live page's numbers: made-up runs that begin, grow, resume and end; who may ask for them; and
one real run. test_live_page.py has the page itself."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import requests

from conftest import ROOT
from live_runs import MadeRun, opening, samples, serve, steps, validation
from nanochat import live, report
from nanochat.common import UserError
from nanochat.folders import lock_folder
from nanochat.http_guard import listen
from nanochat.live import POINTS, Follower, Log, Step, thinned
from nanochat.metrics import open_log
from stage_runs import TINY, losses_of

EVIL = "<script>document.title='owned'</script>"


def tiles(state):
    return dict(state["tiles"])


def curve(state, name):
    [found] = [one for one in state["curves"] if one["name"] == name]
    return [tuple(point) for point in found["points"]]


@pytest.fixture
def run(base_dir):
    """A run that trains: its folder is locked, as long as the test takes."""
    run = MadeRun(base_dir).write(opening(), *steps(1, 10))
    with lock_folder(run.folder, 0):
        yield run


# ------------------------------------------------------------------------------------------------
# before, while and after a run trains

def test_without_a_run_the_page_waits_and_says_for_what(base_dir):
    state = Follower().state()
    assert state["state"] == "waiting" and str(base_dir) in state["words"]
    assert "scripts.base_train" in state["words"] and state["here"] == []
    assert list(base_dir.iterdir()) == []


def test_a_run_that_is_named_and_has_not_begun_is_waited_for(base_dir):
    follower = Follower("d4-2")
    MadeRun(base_dir, "d4").write(opening(), *steps(1, 2))
    state = follower.state()
    assert state["state"] == "waiting" and "d4-2" in state["words"]
    assert state["here"] == ["base_checkpoints/d4"]
    MadeRun(base_dir, "d4-2").write(opening(), *steps(1, 2))
    assert follower.state()["tag"] == "d4-2"


def test_a_run_that_prepares_its_first_step_has_begun(base_dir):
    run = MadeRun(base_dir)
    with lock_folder(run.folder, 0):
        state = Follower().state()
        assert state["state"] == "starting" and "tiles" not in state
        assert "base_train of d4 has begun" in state["words"]
        run.write(opening())
        assert Follower().state()["state"] == "starting"
        run.write(*steps(1, 1))
        assert Follower().state()["state"] == "training"


def test_where_a_run_stands(run):
    run.write(validation(10, 2.5), samples(10, "Once", "upon a time"))
    state = Follower().state()
    assert state["words"] == "base_train of d4 is training."
    assert state["progress"] == 0.25
    shown = tiles(state)
    assert shown["step"] == "10 of 40"
    assert shown["time left"] == "1 min 0 s"
    assert shown["time trained"] == "20 s"
    assert shown["tokens/s"] == "50" and shown["tokens"] == "1 k"
    assert shown["bits per byte"] == "2.500"
    assert curve(state, "Loss") == [(step, 5 - step / 100) for step in range(1, 11)]
    assert curve(state, "Bits per byte") == [(10, 2.5)]
    assert state["samples"] == [{"prompt": "Once", "texts": [(10, "upon a time")]}]


@pytest.mark.parametrize("horizon, step, left", [
    ({"minutes": 1.0}, "10", "40 s"),
    ({"minutes": 60.0, "max_steps": 15}, "10 of 15", "10 s"),
    ({"minutes": 1.0, "max_steps": 3000}, "10", "40 s"),
    ({"num_iterations": 10}, "10 of 10", "0 s"),
])
def test_the_time_left_is_that_of_the_budget(base_dir, horizon, step, left):
    MadeRun(base_dir).write(opening(**horizon), *steps(1, 10))
    shown = tiles(Follower().state())
    assert (shown["step"], shown["time left"]) == (step, left)


def test_the_time_left_follows_the_speed_of_the_last_steps(base_dir):
    lines = steps(1, 30)
    for line in lines[10:]:
        line["seconds"] = 20 + 0.5 * (line["step"] - 10)
    MadeRun(base_dir).write(opening(), *lines)
    shown = tiles(Follower().state())
    assert shown["time left"] == "5 s" and shown["tokens/s"] == "200"


def test_a_log_that_does_not_say_where_it_ends_has_no_time_left(base_dir):
    MadeRun(base_dir).write(*steps(1, 10))
    state = Follower().state()
    assert tiles(state)["time left"] == "unknown" and state["progress"] is None
    assert state["words"].startswith("base_train of d4")


def test_a_line_that_is_half_written_waits_for_its_other_half(run):
    follower = Follower()
    whole = json.dumps(steps(11, 11)[0])
    run.write(whole[:20])
    assert tiles(follower.state())["step"] == "10 of 40"
    run.write(whole[20:])
    assert tiles(follower.state())["step"] == "10 of 40"
    run.write("\n", *steps(12, 12))
    assert tiles(follower.state())["step"] == "12 of 40"
    assert len(curve(follower.state(), "Loss")) == 12


def test_of_a_log_that_grows_only_what_is_new_is_read(run):
    log = Log(run.folder)
    log.read()
    text = run.log.read_bytes()
    # what was read is overwritten in place: it is not looked at again
    with open(run.log, "r+b") as file:
        file.write(b"x" * (len(text) - 1))
    run.write(*steps(11, 12))
    log.read()
    assert [step.step for step in log.steps] == list(range(1, 13))


@pytest.mark.parametrize("line", [
    '{"step": 11, "lo\n', "[]\n", "null\n", '"step"\n', '{"step": null}\n', '{"loss": 1}\n',
    '{"step": 11, "loss": NaN}\n', '{"step": 11, "val_bpb": NaN}\n', "\n", "\0\0\0\n",
    '{"step": true, "loss": 1}\n',
])
def test_a_line_that_is_no_record_breaks_nothing(run, line):
    state = Follower().state()
    run.write(line)
    again = Follower().state()
    json.dumps(again, allow_nan=False)
    assert curve(again, "Loss") == curve(state, "Loss")
    run.write(*steps(11, 12))
    assert tiles(Follower().state())["step"] == "12 of 40"


def test_steps_that_are_taken_once_more_after_a_roll_back_count_once(run):
    follower = Follower()
    follower.state()
    skipped = {"step": 10, "skipped": "loss is nan", "verdict": "roll back"}
    run.write(skipped, *steps(6, 8, loss=1.0))
    state = follower.state()
    losses = curve(state, "Loss")
    assert [step for step, _ in losses] == list(range(1, 9))
    assert losses[4:6] == [(5, 4.95), (6, 1.0)]
    assert state["notes"] == [(11, "loss is nan: roll back")]
    assert state == Follower().state()


def test_a_batch_that_is_left_out_and_a_stage_that_begins_are_told(run):
    run.write(
        {"step": 10, "skipped": "loss is nan", "verdict": "skip"},
        {"step": 10, "curriculum_stage": 2, "length": 64, "window": None},
    )
    assert Follower().state()["notes"] == [
        (11, "stage 2 begins, of 64 tokens"), (11, "loss is nan: skip")]


def test_a_run_that_resumes_is_followed_from_its_step(run):
    follower = Follower()
    assert "resumed" not in follower.state()["words"]
    open_log(run.folder, 6).close()
    state = follower.state()
    assert [step for step, _ in curve(state, "Loss")] == list(range(1, 7))
    run.write(opening(step=6, num_iterations=20), *steps(7, 8, loss=1.0))
    state = follower.state()
    assert state["words"] == "base_train of d4 is training, resumed at step 6."
    assert tiles(state)["step"] == "8 of 20" and curve(state, "Loss")[-1] == (8, 1.0)
    assert state == Follower().state()


def test_a_run_that_ends_is_told_from_one_that_stops(base_dir):
    run = MadeRun(base_dir).write(opening(), *steps(1, 10))
    follower = Follower()
    with lock_folder(run.folder, 0):
        run.save(5, finished=False).age()
        assert follower.state()["state"] == "training"
    state = follower.state()
    assert state["state"] == "stopped" and "time left" not in tiles(state)
    assert "ended at step 10" in state["words"] and "--resume" in state["words"]
    run.save(10, finished=True)
    state = follower.state()
    assert state["words"] == "base_train of d4 has finished, after 10 steps."
    assert state["state"] == "finished" and state["progress"] == 1


def test_a_run_that_takes_no_more_steps_is_being_evaluated(run):
    run.write(*steps(11, 40))
    state = Follower().state()
    assert state["state"] == "training" and state["progress"] == 1
    assert "has taken its last step and is being evaluated" in state["words"]


def test_a_run_by_minutes_ends_when_another_step_would_not_fit(base_dir):
    run = MadeRun(base_dir).write(opening(minutes=0.35, max_steps=900), *steps(1, 9))
    assert Follower().state()["words"] == "base_train of d4 is training."
    run.write(*steps(10, 10))    # 20 of 21 seconds, with steps of two
    assert "is being evaluated" in Follower().state()["words"]


@pytest.mark.parametrize("verdict", ["stop", "roll back"])  # there may be nothing to roll back to
def test_a_run_that_has_diverged_says_so(base_dir, verdict):
    run = MadeRun(base_dir).write(opening(), *steps(1, 10))
    run.write({"step": 10, "skipped": "loss is nan", "verdict": verdict}).age()
    state = Follower().state()
    assert state["state"] == "diverged" and "emergency_training.sh" in state["words"]


def test_a_run_that_went_on_after_a_roll_back_has_not_diverged(base_dir):
    skipped = {"step": 10, "skipped": "loss is nan", "verdict": "roll back"}
    MadeRun(base_dir).write(opening(), *steps(1, 10), skipped, *steps(6, 8)).age()
    assert Follower().state()["state"] == "stopped"


def test_a_log_that_grows_is_of_a_run_that_trains_where_no_lock_says_so(base_dir):
    run = MadeRun(base_dir).write(opening(), *steps(1, 10)).age(1)
    assert Follower().state()["state"] == "training"
    run.age()
    assert Follower().state()["state"] == "stopped"


def test_following_a_run_writes_nothing(run, base_dir):
    (base_dir / "metrics.jsonl").write_text('{"stage": "tok_train"}\n', encoding="utf-8")

    def files():
        paths = sorted(base_dir.rglob("*"))
        return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths]

    before = files()
    follower = Follower()
    for _ in range(2):
        follower.state()
    assert files() == before


# ------------------------------------------------------------------------------------------------
# which run, and what came before it

def test_what_trains_now_comes_before_what_has_written_last(base_dir):
    trains = MadeRun(base_dir, "d4").write(opening(), *steps(1, 3))
    MadeRun(base_dir, "d5").write(opening(), *steps(1, 3))
    trains.age()
    assert Follower().state()["tag"] == "d5"
    with lock_folder(trains.folder, 0):
        assert Follower().state()["tag"] == "d4"


def test_of_two_runs_that_train_the_one_that_began_last_is_followed(base_dir):
    first, second = [MadeRun(base_dir, tag).write(opening(), *steps(1, 3)) for tag in ("a", "b")]
    with lock_folder(first.folder, 0), lock_folder(second.folder, 0):
        os.utime(first.folder / ".lock", (1e9, 1e9))
        first.write(*steps(4, 5))
        state = Follower().state()
        assert state["tag"] == "b" and state["others"] == ["base_checkpoints/a"]
        state = Follower("a").state()
        assert state["tag"] == "a" and state["others"] == []


def test_a_tag_means_all_its_stages_and_a_folder_itself(base_dir, monkeypatch):
    base = MadeRun(base_dir, "d4").write(opening(), *steps(1, 3)).age()
    MadeRun(base_dir, "d4", "mid").write(opening("mid_train"), *steps(1, 5))
    MadeRun(base_dir, "d5").write(opening(), *steps(1, 9))
    assert "mid_train of d4" in Follower("d4").state()["words"]
    assert "base_train of d4" in Follower(str(base.folder)).state()["words"]
    monkeypatch.chdir(base.folder.parent)
    assert "base_train of d4" in Follower("d4").state()["words"]
    monkeypatch.chdir(base_dir)
    assert "base_train of d5" in Follower("base_checkpoints/d5").state()["words"]


def write_records(base, *records):
    lines = [json.dumps({"seconds": 65, "run": None, **record}) + "\n" for record in records]
    (base / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def test_what_has_finished_before_is_that_of_this_run(base_dir):
    base = MadeRun(base_dir, "d4").write(opening())
    mid = MadeRun(base_dir, "d4", "mid")
    mid.write(opening("mid_train", origin=[str(base.folder), 10]))
    sft = MadeRun(base_dir, "d4-2", "sft")
    sft.write(opening("chat_sft", origin=[str(mid.folder), 5]), *steps(1, 3))
    other = MadeRun(base_dir, "d5").write(opening()).age()
    base_record = {"stage": "base_train", "checkpoint": str(base.folder), "val_bpb": 1.25}
    write_records(
        base_dir,
        {"stage": "tok_train", "vocab_size": 512},
        {**base_record, "steps": 9, "tokens_per_second": 1234},
        {"stage": "tok_train", "run": "of another speedrun"},
        {"stage": "base_train", "checkpoint": str(other.folder)},
        {"stage": "mid_train", "checkpoint": str(mid.folder), "val_bpb": None, "steps": 5},
        {"stage": "report"},
        {"stage": "doctor"},
    )
    follower = Follower()
    assert follower.state()["finished"] == [
        ("tok_train", "", "1 min 5 s", "", "512 tokens in the vocabulary"),
        ("base_train", "9", "1 min 5 s", "1.23 k", "1.2500 bits per byte"),
        ("mid_train", "5", "1 min 5 s", "", ""),
    ]
    with open(base_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        evaluation = {"stage": "chat_eval", "seconds": 1, "checkpoint": str(sft.folder)}
        file.write(json.dumps({**evaluation, "accuracy": {"spelling": 0.5}}) + "\n")
    last = follower.state()["finished"][-1]
    assert last == ("chat_eval", "", "1 s", "", "spelling 50.0 %")


def test_a_base_directory_that_has_moved_keeps_its_runs_together(base_dir):
    MadeRun(base_dir, "d4").write(opening())
    mid = MadeRun(base_dir, "d4", "mid")
    mid.write(opening("mid_train", origin=["/gone/base_checkpoints/d4", 10]), *steps(1, 3))
    write_records(base_dir, {"stage": "base_train", "checkpoint": "/gone/base_checkpoints/d4"})
    for follower in (Follower(), Follower(str(mid.folder))):
        assert [row[0] for row in follower.state()["finished"]] == ["base_train"]


def test_a_stage_that_begins_takes_the_place_of_the_one_before(base_dir):
    base = MadeRun(base_dir, "d4").write(opening(), *steps(1, 40)).save(40, finished=True)
    follower = Follower()
    assert follower.state()["state"] == "finished"
    mid = MadeRun(base_dir, "d4", "mid")
    with lock_folder(mid.folder, 0):
        assert "mid_train of d4 has begun" in follower.state()["words"]
        mid.write(opening("mid_train", origin=[str(base.folder), 40]), *steps(1, 2))
        state = follower.state()
        assert state["words"] == "mid_train of d4 is training."
        assert len(curve(state, "Loss")) == 2


# ------------------------------------------------------------------------------------------------
# curves and samples

def test_a_long_run_is_thinned_to_means():
    many = [Step(i, i, i, float(i % 2)) for i in range(1, 100_001)]
    points = thinned(many)
    assert len(points) <= POINTS and points[-1][0] == 100_000
    assert all(loss == 0.5 for _, loss in points)
    assert thinned(many[:3]) == [(1, 1.0), (2, 0.0), (3, 1.0)]
    assert thinned([]) == []


def test_validations_of_other_documents_and_of_the_kept_model_are_not_on_the_curve(run):
    run.write(validation(4, 3.0), validation(8, 2.0), validation(10, 2.2), validation(10, 2.0))
    run.write(validation(10, 2.1, documents=300))
    assert curve(Follower().state(), "Bits per byte") == [(4, 3.0), (8, 2.0), (10, 2.2)]


def test_a_bound_is_called_one(run):
    run.write({"step": 5, "val_bpb_bound": 3.5, "documents": 30})
    assert curve(Follower().state(), "A bound on bits per byte") == [(5, 3.5)]


def test_of_reinforcement_learning_rewards_and_right_answers_are_shown(base_dir):
    run = MadeRun(base_dir, source="rl").write(opening("chat_rl"))
    run.write({"step": 0, "accuracy": 0.25, "pass_at_k": 0.5, "held_out_reward": 0.1})
    for line in steps(1, 4, loss=-0.1):
        run.write(line, {"step": line["step"], "reward": 0.5, "groups": 3})
    state = Follower().state()
    assert curve(state, "Reward") == [(step, 0.5) for step in range(1, 5)]
    assert curve(state, "Right answers") == [(0, 25.0)]


def test_the_newest_samples_of_a_prompt_come_first(run):
    for step in (2, 4, 6, 8):
        run.write(samples(step, "Once", f"text {step}"), samples(step, EVIL, "\ud83d"))
    once, evil = Follower().state()["samples"][::-1]
    assert once["texts"] == [(8, "text 8"), (6, "text 6"), (4, "text 4")]
    assert evil["prompt"] == EVIL


# ------------------------------------------------------------------------------------------------
# over HTTP

@pytest.fixture
def address(run):
    with serve() as address:
        yield address


def test_the_page_and_its_numbers_are_served(address, run):
    page = requests.get(address)
    policy = page.headers["Content-Security-Policy"]
    assert page.status_code == 200 and page.text.startswith("<!doctype html>")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    run.write(samples(10, "half", "\ud83d"))
    answer = requests.get(f"{address}/state")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"
    state = answer.json()
    assert state["state"] == "training" and state["samples"][0]["texts"] == [[10, "\ud83d"]]
    assert requests.head(f"{address}/state").text == ""


def test_the_page_loads_nothing_and_has_one_script_and_one_style():
    page = (ROOT / "nanochat" / "live.html").read_text(encoding="utf-8")
    assert re.findall(r"<(script|style)\b", page) == ["style", "script"]
    assert not re.findall(r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", page)
    assert not re.findall(r"\b(?:src|style|on\w+)=", page.replace("svg xmlns=", ""))
    addresses = set(re.findall(r"https?://[^\s'\"]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("headers", [
    {"Host": "evil.test"}, {"Host": "evil.test:8001"}, {"Host": "localhost.evil.test"},
    {"Host": ""}, {"Host": "127.0.0.1@evil.test"}, {"Origin": "http://evil.test"},
    {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
])
@pytest.mark.parametrize("path", ["/", "/state", "/elsewhere"])
def test_a_foreign_host_or_origin_is_refused(address, headers, path):
    answer = requests.get(address + path, headers=headers)
    assert answer.status_code == 403
    assert answer.text == f"this page is for this machine alone: open {address}\n"


@pytest.mark.parametrize("method, path, status", [
    ("POST", "/state", 405), ("PUT", "/", 405), ("DELETE", "/state", 405), ("OPTIONS", "/", 405),
    ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/../etc/passwd", 404),
    ("GET", "/state/", 404),
])
def test_there_is_nothing_but_two_pages_to_read(address, method, path, status):
    assert requests.request(method, address + path).status_code == status


def test_a_log_that_cannot_be_read_is_told(run, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", "log.jsonl")

    monkeypatch.setattr(Log, "read", refuse)
    with serve() as address:
        answer = requests.get(f"{address}/state")
    assert answer.status_code == 500 and "Permission denied" in answer.json()["error"]


# ------------------------------------------------------------------------------------------------
# the command

SETTINGS = {"host": "127.0.0.1", "port": 0}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_other_addresses_than_this_machines_own_are_refused(base_dir, host):
    with pytest.raises(UserError, match="leave --host out"):
        live.run([], {**SETTINGS, "host": host})


def test_a_port_in_use_is_one_line_naming_the_setting(base_dir):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*--port=N"):
            live.run([], {**SETTINGS, "port": port})


def test_a_name_that_can_be_none_is_refused(base_dir):
    with pytest.raises(UserError, match="model_tag='..'"):
        live.run([".."], SETTINGS)


def test_the_page_listens_to_this_machine_only():
    assert live.is_loopback(report.host) and report.serve is False


@contextlib.contextmanager
def command(stages):
    """The command as its user runs it, on a free port: yields (its process, the address)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat.report", "--serve", "--port=0"],
        cwd=ROOT,
        env={**os.environ, **stages.environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        line = process.stdout.readline()
        yield process, re.search(r"open (http://127\.0\.0\.1:\d+) ", line)[1]
    finally:
        process.kill()
        process.communicate()


def test_a_real_run_is_followed_until_it_has_finished(stages, text):
    words = ("scripts.base_train", f"--data={text}", *TINY, "--num_iterations=60",
             "--eval_every=20", "--model_tag=watched")
    with command(stages) as (page, address):
        assert "Nothing has trained in " in page.stdout.readline()
        assert requests.get(f"{address}/state").json()["state"] == "waiting"
        training = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env={**os.environ, **stages.environment},
            stdout=subprocess.DEVNULL,
        )
        seen = []
        deadline = time.monotonic() + 300
        while not seen or seen[-1]["state"] != "finished":
            assert time.monotonic() < deadline, seen[-1:]
            seen.append(requests.get(f"{address}/state").json())
            time.sleep(0.02)
        assert training.wait() == 0

        # 1. the states, in their order
        states = [state["state"] for state in seen]
        order = list(dict.fromkeys(states))
        assert set(order) <= {"waiting", "starting", "training", "finished"}
        assert states == sorted(states, key=order.index) and "training" in order
        assert order == sorted(order, key=("waiting", "starting", "training", "finished").index)

        # 2. what training has logged
        state = seen[-1]
        losses = losses_of(stages.folder("base", "watched"))
        assert curve(state, "Loss") == list(losses.items()) and len(losses) == 60
        assert [step for step, _ in curve(state, "Bits per byte")] == [20, 40, 60]
        assert tiles(state)["step"] == "60 of 60" and len(state["samples"][0]["texts"]) == 3
        on_the_way = [one for one in seen if one["state"] == "training" and one.get("progress")]
        assert any("time left" in tiles(one) for one in on_the_way)
        finished = [row[0] for row in state["finished"]]
        assert finished == ["tok_train", "base_train"]

        # 3. the end of the page
        page.send_signal(signal.SIGINT)
        out, err = page.communicate(timeout=60)
        assert (page.returncode, out, err) == (0, "", "")
