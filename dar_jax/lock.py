"""A lock file: who writes somewhere. A crash leaves the file behind, and the next run finds out that nobody holds it.

The holder rewrites its file every few seconds. On the machine of the holder the process table says whether it lives.
Elsewhere a file that nobody rewrites for a while is a dead holder's, so that no clocks of two machines are compared.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from dar_jax import files, hosts
from dar_jax.errors import UserError

BEAT_SECONDS = 5
STALE_SECONDS = 45  # a holder on another machine that sends no beat for so long is dead
VISIBLE_SECONDS = 40  # a file system such as NFS may show a new file so late
LEAVE_SECONDS = 20  # a process that has lost its lock has so long to end by an error of its own


@contextlib.contextmanager
def holding(path: str | os.PathLike, what: str, fix: str) -> Iterator["Lock"]:
    """Within the block this job alone holds the lock file `path`, whose directory is made if it is missing.

    All processes of a job call this together. Process 0 acts, and all check that they see its file.

    Args:
      path: the lock file.
      what: what it protects, the first words of an error, as 'workdir "runs/a"'.
      fix: the last words of an error, as "take another --workdir".

    Raises:
      UserError: a living process holds the lock, the file cannot be written, or not all processes see it. At the end
        of the block, if it raised because the file is gone.
    """
    lock = Lock(files.path(path), what, fix)
    if hosts.is_first():
        lock.acquire()
    try:
        lock.id = hosts.gather(lock.id, f"the lock of {what}")[0]
        seen = hosts.gather(lock.is_seen(), f"the look at {what}")
        if not all(seen):
            raise UserError(
                f"{what} is not the same directory on all hosts: process {seen.index(False)} does not see the lock of "
                "process 0 there. Name a directory that all hosts share."
            )
        yield lock
    except UserError:
        raise
    except Exception as error:
        if lost := lock.lost():
            raise UserError(lost) from error
        raise
    finally:
        lock.release()


class Lock:
    """The lock file of one holder; a thread keeps it fresh, and ends a process that has lost it."""

    def __init__(self, path: files.Path, what: str, fix: str):
        self.path, self.what, self.fix, self.id = path, what, fix, uuid.uuid4().hex
        self.since, self.made_directory = time.strftime("%Y-%m-%d %H:%M:%S"), False
        self.done, self.thread = threading.Event(), threading.Thread(target=self._keep, name="lock", daemon=True)

    def acquire(self) -> None:
        """Creates the file, if need be in place of a dead holder's."""
        try:
            self.made_directory = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(self.path.parent):
                while not files.create(self.path, self._content()):
                    held = _read(self.path)
                    if held is not None and _is_alive(self.path, held, self.what):
                        raise UserError(f"{self.what} is in use by {_name(held)}; {self.fix}.")
                    self._remove(held)
        except UserError:
            raise
        except Exception as error:
            if (reason := files.why(error)) is None:
                raise
            raise UserError(f"{self.what} cannot be written: {reason}; take another directory.") from error
        self.thread.start()

    def is_seen(self) -> bool:
        """Whether this process sees the file, if need be after a wait."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while self.lost() and time.monotonic() < deadline:
            time.sleep(0.5)
        return not self.lost()

    def lost(self) -> str | None:
        """Says what became of the lock, None while it is held. A disk that does not answer is no loss."""
        try:
            held = _read(self.path)
        except Exception as error:
            if files.why(error) is None:
                raise
            return None
        if held is None:
            return f"{self.what} was removed while this run was writing there."
        return None if _parse(held).get("id") == self.id else f"{self.what} was taken over by {_name(held)}."

    def check(self) -> None:
        """Raises UserError if the lock is lost: to be called before something is written that makes directories."""
        if lost := self.lost():
            raise UserError(lost)

    def release(self) -> None:
        """Removes the file, and the directory if it was made for it and has remained empty."""
        if self.thread.is_alive():
            self.done.set()
            self.thread.join()
            with contextlib.suppress(Exception):  # the next run finds out that nobody holds it
                if not self.lost():
                    self.path.unlink()
                if self.made_directory and not files.is_remote(self.path):
                    self.path.parent.rmdir()

    def _content(self) -> str:
        return json.dumps({"id": self.id, **_process(), "since": self.since, "beat": time.time()}) + "\n"

    def _keep(self) -> None:
        while not self.done.wait(BEAT_SECONDS):
            if lost := self.lost():
                if not self.done.wait(LEAVE_SECONDS):
                    hosts.fail(lost)
                return
            with contextlib.suppress(Exception), files.replacing(self.path, only_writer=True) as temporary:
                temporary.write_text(self._content())

    def _remove(self, held: str | None) -> None:
        """Removes a dead holder's file and no other: two processes may come upon it at the same time."""
        aside = self.path.with_name(f"{self.path.name}.{self.id}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _read(aside) == held:
                aside.unlink()
            else:  # of a process that was quicker
                aside.rename(self.path)


@contextlib.contextmanager
def _alone_in(directory: files.Path) -> Iterator[None]:
    """Within the block no other process of this machine, or of a file system with locks, is in such a block."""
    if files.is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: files.Path) -> str | None:
    try:
        return files.read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(held: str) -> dict[str, Any]:
    """The fields of a lock file; none of a damaged one, which counts as of a holder elsewhere."""
    try:
        return dict(json.loads(held))
    except (ValueError, TypeError):
        return {}


def _name(held: str) -> str:
    fields = {"pid": "?", "host": "an unknown host", "since": "?", **_parse(held)}
    return f"process {fields['pid']} on {fields['host']}, since {fields['since']}"


def _is_alive(path: files.Path, held: str, what: str) -> bool:
    """Whether the holder lives: by the process table of this machine, or by a beat."""
    fields, process = _parse(held), _process()
    if fields.get("machine") == process["machine"]:
        started = _started(fields["pid"]) if isinstance(fields.get("pid"), int) else None
        return started is not None and started == fields.get("started")
    print(f"waiting whether {_name(held)} still uses {what} ({STALE_SECONDS} s at most)", flush=True)
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        if (now := _read(path)) != held:
            return now is not None
    return False


def _process() -> dict[str, Any]:
    """This process: its host, the machine (this start of it, and the container) that numbers it, and its start."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    machine = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux
        machine += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return {"pid": os.getpid(), "host": machine[0], "machine": " ".join(machine), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine was started, because numbers are used again; None if there is none."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        os.kill(pid, 0)
        return ""
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
