"""What Linux says of processes: their memory in bytes, and how many bytes they have read.

VmRSS is the memory in all, VmHWM its highest so far, RssAnon the part that is not of files.
"""

import threading
from pathlib import Path


def memory(process: int | str = "self") -> dict[str, int]:
    """Key -> bytes; zeros for a process that has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {key: sizes.get(key, 0) for key in ("VmRSS", "VmHWM", "RssAnon")}


def reset_highest() -> None:
    """VmHWM of this process begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def bytes_read() -> int:
    """Return how many bytes this process, and its children that have ended, got from read calls, cached or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


class Watch:
    """The largest anonymous memory of this process and its children, seen five times a second.

    Mapped files are left out: they are the page cache's. Pages that processes share since a fork are divided among
    them.
    """

    def __enter__(self) -> "Watch":
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        import psutil

        while not self._stop.wait(0.2):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            self.peak = max(self.peak, sum(_share_of_memory(process.pid) for process in processes))


def _share_of_memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
