"""Several processes, really started: who they are, how they end, and that it is told once; they are launched.py."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from launched import CASES
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.idefics import modeling_idefics
from typer.testing import CliRunner

from finetune.cli import app
from finetune.distributed import launcher as launch_module
from finetune.distributed.launcher import CONFIGS, launch
from modeling.cpu_cores import available_cores
from modeling.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}", "COLUMNS": "200"}
BY_HAND = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIGS / "ddp.yaml"))


def start(*arguments, start_new_session=False, **environment):
    """Start python on these, with its output kept."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
        start_new_session=start_new_session,
    )


def line(process, stream):
    """Its next line, within a minute; else it is ended, with all it started in its process group."""
    timer = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        return stream.readline()
    finally:
        timer.cancel()


def end(process):
    """(status, stdout, stderr) of what ends within two minutes."""
    try:
        stdout, stderr = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, stdout, stderr


def launched(case, *options, **environment):
    assert case in CASES
    return end(start("-m", "launched", "launch", case, *options, **environment))


def by_hand(case, *options):
    return end(start(*BY_HAND, "--num_processes", 2, *options, "-m", "launched", "work", case))


@pytest.mark.parametrize(
    ("parallel", "fsdp"), [("ddp", {}), ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})]
)
def test_launch_one_group(parallel, fsdp):
    """The first process alone prints."""
    status, stdout, stderr = launched("group", "--processes", 3, "--parallel", parallel)
    assert (status, stderr) == (0, "rank 0 speaks\n")
    processes = json.loads(stdout)["processes"]
    assert len({process.pop("pid") for process in processes}) == 3
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    threads = ENVIRONMENT.get("OMP_NUM_THREADS", str(max(1, available_cores() // 3)))
    same = {"of": 3, "OMP_NUM_THREADS": threads, "ACCELERATE_MIXED_PRECISION": "no", **fsdp}
    assert all(backend in process.pop("backend") for process in processes)
    assert processes == [{"rank": rank, **same} for rank in range(3)]


def test_accelerate_launch_by_hand():
    """It starts the same group."""
    status, stdout, stderr = by_hand("group")
    assert status == 0
    assert [(process["rank"], process["of"]) for process in json.loads(stdout)["processes"]] == [(0, 2), (1, 2)]
    assert stderr.count("speaks") == 1


@pytest.mark.parametrize(("processes", "threads"), [(1, 6), (4, 1), (100, 1)])
def test_launch_shares_cores(monkeypatch, processes, threads):
    """Unless the user sets the number of threads."""
    monkeypatch.setattr(launch_module, "available_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch_module._environment(processes)["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launch_module._environment(processes)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("all_mistaken", "model.base: nothing is there\n"),
        ("second_mistaken", "data: the second process alone knows\n"),
    ],
)
def test_mistake_is_reported_once(case, said):
    """By the process that met it first, alone."""
    assert launched(case) == (1, "", said)


@pytest.mark.parametrize("case", ["all_mistaken", "second_mistaken"])
def test_mistake_is_reported_once_by_hand(case):
    """Processes that were started by hand report a mistake once, too."""
    status, _, stderr = by_hand(case)
    assert status == 1
    said = re.findall(r"^(?:model\.base: nothing is there|data: the second process alone knows)$", stderr, re.M)
    assert len(said) == 1


def test_unexpected_error_is_shown_once():
    """The connections that the others lost are not shown."""
    status, stdout, stderr = launched("second_crashes")
    assert (status, stdout) == (1, "")
    assert stderr.count("Traceback (most recent call last)") == 1
    assert stderr.count("KeyError: 'unforeseen'") == 1
    assert "gloo" not in stderr
    assert "ChildFailedError" not in stderr


KEPT = "what is complete is kept, and the same command goes on from the last checkpoint\n"


@pytest.mark.parametrize(
    ("case", "status", "said"),
    [
        ("second_killed", 137, "process 1 of 2 was killed by SIGKILL, most likely because memory ran out; "),
        ("second_killed_and_first_asleep", 139, "process 1 of 2 was killed by SIGSEGV; "),
        ("first_exits", 5, "process 0 of 2 ended with status 5; "),
    ],
)
def test_dead_process_is_named(case, status, said):
    """It ends the others at once."""
    began = time.monotonic()
    assert launched(case) == (status, "", said + KEPT)
    assert time.monotonic() - began < 30  # the others sleep for a minute, or wait for it in a collective for ever


def test_lost_connection_is_shown():
    """Where nobody explains it."""
    status, stdout, stderr = launched("peer_gone_without_failing")
    assert (status, stdout) == (1, "")
    assert stderr.startswith("Traceback (most recent call last)")
    assert len(re.findall(r"RuntimeError: .*/gloo/.* by peer", stderr)) == 1
    assert stderr.endswith("process 0 of 2 ended with status 1; " + KEPT)


def test_restarts():
    """After a death all are started again, as often as allowed."""
    restarted = "a process died; all were started again ({} of at most {})"
    status, stdout, stderr = launched("killed_once", "--restarts", 1)
    assert (status, json.loads(stdout), stderr) == (0, {"start": 1}, restarted.format(1, 1) + "\n")
    status, stdout, stderr = launched("crashes_twice", "--restarts", 2)
    assert (status, json.loads(stdout)) == (0, {"start": 2})
    assert [stderr.count(f"KeyError: 'start {number}'") for number in range(3)] == [1, 1, 0]
    assert [stderr.count(restarted.format(number, 2)) for number in (1, 2)] == [1, 1]
    status, _, stderr = launched("crashes_twice", "--restarts", 1)
    assert status == 1
    assert [stderr.count(f"KeyError: 'start {number}'") for number in range(3)] == [1, 1, 0]


def test_restarts_do_not_repeat_a_mistake():
    """A mistake is not made again by starting again."""
    status, stdout, stderr = launched("starts_count", "--restarts", 3)
    assert (status, stdout) == (1, "")
    assert stderr.count("once is enough") == 1
    assert set(re.findall(r"start \d", stderr)) == {"start 0"}


def begun(case, *options, **environment):
    """A launcher, in a process group of its own as in a terminal, whose two processes have begun; and their ids."""
    process = start("-m", "launched", "launch", case, *options, start_new_session=True, **environment)
    pids = []
    while len(pids) < 2:
        said = line(process, process.stderr)
        assert said.startswith("ready "), said
        pids.append(int(said.split()[1]))
    return process, pids


def still_running(pids):
    """Those that have not ended ten seconds from now."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("told", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_launcher_stopped_by_signal(told, status):
    """Ctrl-C interrupts the terminal's foreground group: the launcher, which passes it on. They hear of it once."""
    process, pids = begun("saves_when_told", "--restarts", 2)
    os.killpg(process.pid, told)
    ended, stdout, stderr = end(process)
    assert (ended, stdout) == (status, "")
    saved = [f"rank {rank} saved after 1 signal" for rank in range(2)]
    assert sorted(stderr.splitlines()) == [*saved, "stopped; saved at step 7"]
    assert not still_running(pids)


@pytest.mark.parametrize(
    ("told", "status", "said"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM; " + KEPT),
        (signal.SIGINT, 130, "interrupted; the same command goes on from the last checkpoint\n"),
    ],
)
def test_launcher_stopped_before_training(told, status, said):
    """There is nothing to save."""
    process, pids = begun("asleep")
    process.send_signal(told)
    assert end(process) == (status, "", said)
    assert not still_running(pids)


def test_launcher_gives_time_to_save(monkeypatch):
    """Ten minutes, or what the user sets."""
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert launch_module._environment(2)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"
    process, pids = begun("never_saves", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    process.send_signal(signal.SIGTERM)
    assert end(process) == (143, "", "stopped by SIGTERM; " + KEPT)
    assert not still_running(pids)


def test_launcher_killed():
    """It leaves nothing running."""
    process, pids = begun("saves_when_told")
    process.kill()
    _, _, stderr = end(process)
    assert stderr.count("saved after 1 signal") == 2
    assert not still_running(pids)


def test_launch_refused(monkeypatch):
    """What cannot be started is refused before."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserError, match=r"--processes 3: each needs a GPU of its own, and this machine has 2; exp"):
            launch(["group"], processes=3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--processes 2: this is already one of 4 processes that a launcher started"):
        launch(["group"], processes=2)


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {init: tiny}\ndata: {sources: [{format: easy_vqa}]}\ntraining: {steps: 1}\n")
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("verb", ["run", "train", "evaluate"])
def test_verb_is_launched(recipe_file, monkeypatch, verb):
    """With the recipe's configuration; it ends with the launcher's status."""
    asked = []
    monkeypatch.setattr(launch_module, "launch", lambda arguments, **options: asked.append((arguments, options)) or 7)
    outcome = invoke(verb, recipe_file, "training.parallel=fsdp2", "--processes", 2, "--restarts", 3, "--json")
    assert (outcome.exit_code, outcome.output) == (7, "")
    arguments = [verb, str(recipe_file), "training.parallel=fsdp2", "--json"]
    assert asked == [(arguments, {"processes": 2, "parallel": "fsdp2", "restarts": 3})]


def test_verb_is_not_launched_with_errors(recipe_file, monkeypatch):
    """A recipe's errors and options that do not fit start nothing."""
    monkeypatch.setattr(launch_module, "launch", None)  # a call would fail
    outcome = invoke("run", recipe_file, "training.lerning_rate=1", "--processes", 2)
    assert outcome.exit_code == 1
    assert "did you mean learning_rate?" in outcome.output
    outcome = invoke("train", recipe_file, "--restarts", 2)
    assert outcome.exit_code == 1
    assert "--restarts 2: one process has no launcher to restart it" in " ".join(outcome.output.split())
    assert invoke("merge", recipe_file, "--processes", 2).exit_code == 2


def parsed(*options):
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([str(option) for option in options]))
    return arguments


def test_fsdp2_shards_decoder_and_cross_attention(monkeypatch, caplog):
    arguments = parsed("--config_file", CONFIGS / "fsdp2.yaml", "--num_processes", 8, "-m", "finetune", "run", "a.yaml")
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugin = FullyShardedDataParallelPlugin()
    assert not caplog.records
    assert (environment["ACCELERATE_USE_FSDP"], environment["ACCELERATE_MIXED_PRECISION"]) == ("true", "no")
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    classes = plugin.transformer_cls_names_to_wrap
    assert classes == ["IdeficsDecoderLayer", "IdeficsGatedCrossAttentionLayer"]
    assert all(hasattr(modeling_idefics, name) for name in classes)


def test_single_configuration():
    """One process needs no torchrun."""
    arguments = parsed("--config_file", CONFIGS / "single.yaml", "-m", "finetune", "run", "a.yaml")
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.num_processes) == (False, False, 1)


FAKES = {
    "scontrol": 'if [ "$1 $2" = "show hostnames" ]; then printf "localhost\\nsecond\\n"; else echo "$@" >>said; fi',
    "scancel": 'echo "$@" >>said; kill -TERM $(cat task.*)',
    # a task for each of two machines, as srun makes them: the process it starts is the one that gets signals
    "srun": """
shift
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    bash -c 'echo $$ >"task.$SLURM_NODEID"; exec "$@"' _ "$@" &
    tasks="${tasks:-} $!"
    # the first listens before the second asks; on one machine, accelerate takes the second's port for taken
    [ "$SLURM_NODEID" = 1 ] || sleep 2
done
for task in $tasks; do wait "$task" || failed=1; done
exit "${failed:-0}" """,
}


@pytest.fixture
def slurm(tmp_path):
    """slurm() starts scripts/train.slurm on two machines that are this one, with stand-ins for Slurm's commands."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    here = Path(sys.executable).parent
    (folder / "activate").write_text(f'export PATH="{folder}:{here}:$PATH"\n')
    variables = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_NNODES": 2, "SLURM_GPUS_ON_NODE": 2, "SLURM_JOB_ID": os.getpid()}
    variables |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": 8, "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    script = ["bash", str(ROOT / "scripts" / "train.slurm"), "a recipe.yaml", "training.steps=3"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return lambda **more: subprocess.Popen(script, env={**environment, **more}, start_new_session=True, **streams)


def test_slurm_command(slurm, tmp_path):
    """The script is bash, and accelerate's parser takes its command."""
    script = (ROOT / "scripts" / "train.slurm").read_text()
    subprocess.run(["bash", "-n", ROOT / "scripts" / "train.slurm"], check=True)
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue"} <= {line.split("  ")[0] for line in script.splitlines()}
    said = tmp_path / ".venv" / "bin" / "accelerate"
    said.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"asked.$SLURM_NODEID"\n')
    said.chmod(0o755)
    assert end(slurm(OMP_NUM_THREADS=""))[0] == 0
    for machine in range(2):
        verb, *options = (tmp_path / f"asked.{machine}").read_text().splitlines()
        assert verb == "launch"
        assert options[options.index("--config_file") + 1] == str(CONFIGS / "ddp.yaml")
        arguments = parsed(*options)
        prepare_multi_gpu_env(arguments)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "2", machine)
        assert (arguments.rdzv_backend, arguments.max_restarts, arguments.module) == ("c10d", 3, True)
        assert arguments.rdzv_endpoint == f"localhost:{20000 + os.getpid() % 20000}"
        assert [arguments.training_script, *arguments.training_script_args] == [
            *("finetune", "run", "a recipe.yaml", "training.steps=3")
        ]


STAND_IN = """
import os, signal, sys, time
import torch.distributed as dist
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
dist.init_process_group("gloo")
ranks = [None] * dist.get_world_size()
dist.all_gather_object(ranks, (dist.get_rank(), int(os.environ["GROUP_RANK"]), sys.argv[1:]))
if dist.get_rank() == 0:
    print(sorted(ranks), flush=True)
while not told:
    time.sleep(0.1)
time.sleep(1)
os.write(1, b"saved\\n")  # at once: two processes share it
sys.exit(143)
"""


def test_slurm_group_of_two_machines(slurm, tmp_path):
    """It saves before the time limit, and queues again."""
    (tmp_path / "finetune" / "distributed").mkdir(parents=True)
    (tmp_path / "finetune" / "__init__.py").touch()
    (tmp_path / "finetune" / "distributed" / "launcher.py").write_text(f"print({str(CONFIGS / 'ddp.yaml')!r})")
    (tmp_path / "finetune" / "__main__.py").write_text(STAND_IN)
    job = slurm(SLURM_GPUS_ON_NODE="1")
    arguments = ["run", "a recipe.yaml", "training.steps=3"]
    assert line(job, job.stdout) == f"{[(rank, rank, arguments) for rank in range(2)]}\n"
    job.send_signal(signal.SIGUSR1)
    status, stdout, stderr = end(job)
    assert (status, stdout) == (1, "saved\nsaved\n"), stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert said == [f"--signal=TERM {os.getpid()}", f"requeue {os.getpid()}"]
