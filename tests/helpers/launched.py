"""What tests start in several processes instead of `finetune`: `python -m launched launch CASE`, which starts
`python -m launched work CASE`. A worker ends as a verb of finetune does."""

import os
import signal
import sys
import time

import typer

import finetune.distributed.launcher
from finetune.console import log
from finetune.distributed.launcher import end_process, is_main_process, launch
from finetune.exit_codes import finish, guarded
from modeling.errors import Interrupted, UserError

app = typer.Typer(pretty_exceptions_show_locals=False)
RANK = int(os.environ.get("RANK", 0))


@app.command("launch")
def start(case: str, processes: int = 2, restarts: int = 0, parallel: str = "ddp") -> None:
    def begin():
        arguments = ["work", case]
        raise typer.Exit(
            launch(arguments, processes=processes, restarts=restarts, parallel=parallel, module="launched")
        )

    guarded(begin)


@app.command("work")
def work(case: str) -> None:
    result = guarded(CASES[case])
    if "torch" in sys.modules:
        from torch import distributed

        assert not distributed.is_initialized()  # else one process in ten aborts at exit
    finish(result, as_json=is_main_process())
    end_process()


def group():
    """What each process knows of the others, by way of them."""
    from finetune.distributed import collectives

    names = ("OMP_NUM_THREADS", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_MIXED_PRECISION")
    said = {
        "rank": collectives.rank(),
        "of": collectives.world_size(),
        "pid": os.getpid(),
        "backend": collectives.state().backend,
    }
    said |= {name: os.environ[name] for name in names if name in os.environ}
    log(f"rank {RANK} speaks")
    return {"processes": collectives.gather([said])}


def all_mistaken():
    raise UserError("model.base: nothing is there")


def second_mistaken():
    if RANK == 1:
        time.sleep(0.5)
        raise UserError("data: the second process alone knows")
    collective()


def second_crashes():
    if RANK == 1:
        time.sleep(0.5)
        raise KeyError("unforeseen")
    collective()


def second_killed():
    collective()
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collective()


def first_exits():
    if RANK == 0:
        sys.exit(5)
    time.sleep(60)


def second_killed_and_first_asleep():
    """The first ends by nothing but torchrun's SIGTERM."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def killed_once():
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start == 0 and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collective()
    return {"start": start}


def crashes_twice():
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < 2:
        time.sleep(RANK)  # else the first may be ended before it has said that it was started again
        raise KeyError(f"start {start}")
    return {"start": start}


def starts_count():
    """A mistake; with the number of starts on stderr."""
    tell(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}")
    raise UserError("once is enough")


def saves_when_told():
    """As training does: the signal is noted, the state saved within a second, and the end told."""
    told = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: told.append(got))
    ready()
    while not told:
        time.sleep(0.05)
    for _ in range(10):
        time.sleep(0.1)
    tell(f"rank {RANK} saved after {len(told)} signal")
    raise Interrupted("stopped; saved at step 7", told[0])


def never_saves():
    signal.signal(signal.SIGTERM, lambda *_: None)
    asleep()


def peer_gone_without_failing():
    finetune.distributed.launcher.SECONDS_TO_REPORT = 1
    collective()
    if RANK == 1:
        os._exit(0)
    collective()


def asleep():
    ready()
    time.sleep(60)
    return {}


def ready():
    tell(f"ready {os.getpid()}")


def tell(line):
    """In one piece: two processes share the pipe."""
    os.write(sys.stderr.fileno(), f"{line}\n".encode())


def collective():
    from finetune.distributed import collectives

    collectives.barrier()


CASES = {
    case.__name__: case
    for case in (
        *(group, all_mistaken, second_mistaken, second_crashes, second_killed, first_exits, killed_once, crashes_twice),
        *(second_killed_and_first_asleep, starts_count, saves_when_told, asleep, never_saves),
        *(peer_gone_without_failing,),
    )
}

if __name__ == "__main__":
    app()
