"""Rows made by processes: the same rows, in order, each with the state after it; errors arrive where they belong."""

import os
import signal
import subprocess
import sys
from itertools import islice

import pytest
import torch
from streamed import equal

from finetune.data.collate import MadeRow
from finetune.data.conversation import RecordError
from finetune.data.row_workers import made_by_workers
from finetune.recipe.schema import Augment
from modeling.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_rows_of_workers(make_lanes, whole, workers):
    """From a row in the middle, where another process has left off; the trainer's random numbers are left alone."""
    begun, rows, before = make_lanes(), make_lanes(), torch.get_rng_state()
    for number in range(7):
        begun.at(number)
    rows.restore(begun.state(6))
    for number, made in enumerate(made_by_workers(rows, range(6, len(whole[0])), workers=workers, ahead=2), start=6):
        assert made.number == number
        assert equal(rows.take(made), whole[0][number])
    assert number == len(whole[0]) - 1
    assert rows.source_stats[0] == whole[1]
    assert torch.equal(torch.get_rng_state(), before)


class Faulty:
    """Rows of which some are errors; row 5 is the number of its process, row 9 ends it."""

    def make(self, number):
        if number == 2:
            raise RecordError("missing image", "a.png")
        if number == 4:
            raise UserError("data: nothing is left")
        if number == 6:
            raise RuntimeError("a mistake of ours")
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return MadeRow(number, {"input_ids": torch.full((1, 3), os.getpid() if number == 5 else number)})


@pytest.mark.slow
def test_workers_errors():
    """A row's own error takes its place, and the next row follows; workers ignore the signals that trainers catch."""
    rows = made_by_workers(Faulty(), range(10), workers=1, ahead=1)
    made = list(islice(rows, 6))
    assert [one.number if isinstance(one, MadeRow) else str(one) for one in made] == [
        *(0, 1, "missing image: a.png", 3, "data: nothing is left", 5)
    ]
    assert made[3].batch["input_ids"].tolist() == [[3, 3, 3]]
    worker = int(made[5].batch["input_ids"][0, 0])
    assert worker != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    with pytest.raises(RuntimeError, match=r"in DataLoader worker process 0(.|\n)*a mistake of ours"):
        next(rows)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error():
    rows = made_by_workers(Faulty(), range(7, 12), workers=1, ahead=1)
    with pytest.raises(UserError, match="a process that makes rows died, most likely out of memory"):
        list(rows)


@pytest.mark.slow
def test_prepared_rows_of_workers(make_rows):
    rows = make_rows(augment=Augment(flip=True, shift=3))
    made = made_by_workers(rows, range(len(rows)), workers=2, ahead=1)
    for number, one in enumerate(made):
        assert equal(one.batch, rows.at(number))
    assert number == len(rows) - 1 > 0


class Large:
    """Rows that are larger than what a pipe holds, each of the number of its process."""

    def make(self, number):
        return MadeRow(number, {"input_ids": torch.full((1, 2**18), os.getpid())})


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_while_it_sends_a_row_is_an_error(tmp_path, workers):
    """In a process of its own, as it would wait for ever for the other half of the row."""
    script = f"""if __name__ == "__main__":
    import os, signal, time
    from finetune.data.row_workers import made_by_workers
    from modeling.errors import UserError
    from test_row_workers import Large
    rows = made_by_workers(Large(), range(100), workers={workers}, ahead=4)
    worker = int(next(rows).batch["input_ids"][0, 0])
    time.sleep(0.5)
    os.kill(worker, signal.SIGKILL)
    try:
        list(rows)
    except UserError as error:
        print(error, flush=True)
"""
    (tmp_path / "trainer.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "trainer.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.stdout == b"a process that makes rows died, most likely out of memory; try fewer: data.workers=1\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"), [("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL), ("sys.exit(3)", 3)]
)
def test_workers_end_with_the_trainer(tmp_path, end, status):
    """Also one that waits for its row to be taken, and whether or not the trainer ends as it should."""
    script = f"""if __name__ == "__main__":
    import os, signal, sys
    from finetune.data.row_workers import made_by_workers
    from test_row_workers import Large
    rows = made_by_workers(Large(), range(100), workers=1, ahead=4)
    print(int(next(rows).batch["input_ids"][0, 0]), flush=True)
    {end}
"""
    (tmp_path / "trainer.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Its output ends when the last process that writes to it has ended.
    command = [sys.executable, str(tmp_path / "trainer.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == status
    assert int(done.stdout) > 0
