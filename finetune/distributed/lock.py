"""One command at a time in a folder: a file lock that the kernel keeps, and that names the process which holds it."""

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.console import log
from modeling.errors import UserError

LOCK = ".lock"
"""File in a run folder, while a command works there."""


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Keep every other command out of a run folder; make it first, and remove it where it stays empty.

    Raises UserError: another command works there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder}: expected a folder to work in: {error.strerror} ({error.filename})") from error
    try:
        with locked(folder / LOCK, what=f"{folder}", instead="output=runs/NAME"):
            yield
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


@contextmanager
def locked(path: Path, *, what: str, instead: str) -> Iterator[None]:
    """Hold the lock file `path`, which exists as long as it is held.

    The lock is POSIX's, by `fcntl.lockf`: it ends with its process, however that ends, no forked worker has it, and it
    works between machines over NFS. A process that already holds it may take it again. what: the folder that is worked
    in; instead: the option that chooses another one. Raises UserError where another process holds it.
    """
    descriptor = _open_and_lock(path, what, instead)
    try:
        holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_and_lock(path: Path, what: str, instead: str) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise UserError(f"{what}: cannot be written: {error.strerror} ({path})") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _holder(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise UserError(
                    f"{what}: another command works here: {holder}\n"
                    f"  wait until it has ended, or stop it; to work beside it, choose another folder: {instead}"
                ) from error
            log(f"{path}: this disk has no locks ({error.strerror}); start no second command that writes here")
            return descriptor
        try:
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the process that held it has just deleted it


def _holder(content: bytes) -> str:
    try:
        known = json.loads(content)
        return f"process {known['pid']} on {known['host']}, since {known['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
