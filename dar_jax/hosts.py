"""The processes of one job: they meet, compare what they were given, and learn of each other's errors.

jax's coordination service waits in silence and ends a process with a C++ stack trace. So the processes meet here first.
Process 0 listens at the coordinator's address until all others have connected to it, and then leaves the address to
jax. The connections stay open as long as the job runs. A message is one line of JSON.

Process 0 passes every error on to all others. A process that ends without a word closes its connection, and one whose
host is lost falls silent. A process alone calls the same functions, which then do nothing.

One of them may ask all to stop. They must do so before the same step, so process 0 asks which step each has begun.
Until it has told the first step that none has begun, no process begins another. (jax's own way to agree,
`reached_preemption_sync_point`, sometimes gave two processes different steps, which then waited for each other.)
"""

import contextlib
import hashlib
import json
import os
import queue
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from dar_jax.errors import UserError

REPORT_SECONDS = 15  # between two lines that say what a process waits for
BEAT_SECONDS = 5
SILENCE_SECONDS = 45  # a process that sends no beat for so long is lost
FAREWELL_SECONDS = 10  # process 0 keeps jax's coordination alive so long, while the others end

_END = "the end"
_ending = threading.Lock()
_job: "_Job | None" = None
_wants_stop = False


def here() -> str:
    """This process, as lines to others name it: "pid 77 on node3"."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def join(address: str, count: int, index: int, timeout: float) -> None:
    """Meets the other processes of the job. Process `index` of `count` calls this once.

    Raises UserError if they do not all come within `timeout` seconds, or disagree on `count` or on who is who.
    """
    global _job
    if count > 1:
        links = _listen(address, count, timeout) if index == 0 else {0: _connect(address, count, index, timeout)}
        _job = _Job(count, index, links)
        threading.Thread(target=_job.watch, name="hosts", daemon=True).start()
        _job.names = gather(_job.names[index], "the start")


def is_joined() -> bool:
    """Whether this process belongs to a job of several."""
    return _job is not None


def is_first() -> bool:
    """Whether this is process 0, or alone."""
    return _job is None or _job.index == 0


def gather(value: Any, where: str) -> list:
    """The JSON values of all processes, in their order; all of them call this with the same `where`, as "the start"."""
    return [value] if _job is None else _job.gather(value, where)


def agree(facts: dict[str, Any], where: str) -> None:
    """Raises the same UserError in all processes unless their `facts`, JSON values by name, are equal."""
    text = json.dumps(facts, sort_keys=True, default=str)
    if len(set(gather(hashlib.sha256(text.encode()).hexdigest(), where))) == 1:
        return
    everyone = [json.loads(text) for text in gather(text, where)]
    for name in sorted({name for each in everyone for name in each}):
        values = [json.dumps(each.get(name)) for each in everyone]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            ours, theirs = (value if len(value) < 200 else f"{value[:200]}..." for value in (values[0], values[other]))
            raise UserError(
                f"the processes of this job disagree: {name} is {ours} in {_job.names[0]}, and {theirs} in "
                f"{_job.names[other]}. Make them equal on all hosts."
            )


def fail(message: str, *, code: int = 2, whose: str = "", say: bool = True) -> NoReturn:
    """Ends this process at once, from any thread, and with it the job: all others print a line and exit with 2.

    Args:
      message: what is wrong, in one line.
      code: exit code of this process.
      whose: the process that the message is of; default: this one.
      say: whether to print the line here.
    """
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread is ending this process
    with contextlib.suppress(OSError):
        if say:
            print(f"error: {whose}: {message}" if whose else f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if _job:
        _job.tell(message, whose)
    os._exit(code)


def finish() -> None:
    """Waits until the work of all processes is done. How one of them exits afterwards is no concern of the others."""
    gather(None, _END)


def ask_to_stop(*_: Any) -> None:
    """Asks all processes to stop, as the handler of a signal."""
    global _wants_stop
    _wants_stop = True


def forget_stop() -> None:
    """Takes back what `ask_to_stop` asked for, once all have stopped."""
    global _wants_stop
    _wants_stop = False


def is_stopping(step: int) -> bool:
    """Whether all stop before step `step`. Each process calls this before each step, from the same step on."""
    return _job.is_stopping(step, _wants_stop) if _job else _wants_stop


@contextlib.contextmanager
def reporting(what: str, timeout: float) -> Iterator[None]:
    """Says every 15 seconds what the block waits for, and ends this process after `timeout` seconds."""
    done, waiting = threading.Event(), _Waiting(lambda: what, timeout)

    def watch() -> None:
        while not done.wait(1):
            if waiting.poll():
                fail(f"waited {timeout:.0f} s in vain for {what}.")

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class _Waiting:
    """Prints a line every 15 seconds."""

    def __init__(self, what: Callable[[], str], timeout: float = float("inf")):
        self.what, self.timeout, self.grace = what, timeout, 0
        self.start = self.reported = time.monotonic()

    def poll(self) -> bool:
        """Prints the line if it is time for it. Returns whether the timeout has passed."""
        now = time.monotonic()
        if now - self.reported >= REPORT_SECONDS:
            self.reported = now
            of = f" of {self.timeout:.0f}" if self.timeout < float("inf") else ""
            print(f"waiting for {self.what()} ({now - self.start:.0f}{of} s)", flush=True)
        return now - self.start > self.timeout + self.grace


class _Link:
    """A connection that carries one line of JSON a message. Who reads finds out that it is lost; who sends does not."""

    def __init__(self, connection: socket.socket):
        self.socket, self.buffer, self.heard, self.lock = connection, b"", time.monotonic(), threading.Lock()
        self.name = "process 0"
        connection.settimeout(SILENCE_SECONDS)

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError), self.lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that came within a second; None if the other end has closed or speaks another language."""
        ready = select.poll()
        ready.register(self.socket, select.POLLIN)
        if not ready.poll(1000):
            return []
        try:
            data = self.socket.recv(1 << 16)
            self.heard = time.monotonic()
            *lines, self.buffer = (self.buffer + data).split(b"\n")
            return [dict(json.loads(line)) for line in lines] if data else None
        except (OSError, ValueError, TypeError):
            return None


def _listen(address: str, count: int, timeout: float) -> dict[int, _Link]:
    """The connections of process 0 to all others, by their numbers."""
    dual, port = socket.has_dualstack_ipv6(), int(address.rsplit(":", 1)[1])
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=count)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at the coordinator's port {port}: {error.strerror}; end the process that does, "
            "or take another port."
        ) from error
    links, me = {}, _name(0, here())

    def missing() -> str:
        absent = [i for i in range(1, count) if i not in links]
        text = ", ".join(map(str, absent[:10])) + (f" and {len(absent) - 10} more" if len(absent) > 10 else "")
        return f"process{'es' if len(absent) > 1 else ''} {text} of {count} to join at {address}"

    def refuse(message: str, *others: _Link) -> NoReturn:
        for link in (*links.values(), *others):
            link.send(error=message, whose=me)
        raise UserError(message)

    waiting = _Waiting(missing, timeout)
    reported = waiting.start
    with server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        while len(links) < count - 1:
            if waiting.poll():
                refuse(f"waited {timeout:.0f} s in vain for {missing()}. Look at their logs, or raise --join_seconds.")
            if waiting.reported > reported:
                reported = waiting.reported
                for link in links.values():
                    link.send(waits_for=missing())
            for key, _ in selector.select(timeout=1):
                if key.data is None:
                    connection, _ = server.accept()
                    selector.register(connection, selectors.EVENT_READ, _Link(connection))
                    continue
                messages = key.data.receive()
                if messages is None:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    links = {i: link for i, link in links.items() if link is not key.data}
                for hello in messages or ():
                    index, key.data.name = hello.get("index"), _name(hello.get("index"), str(hello.get("here")))
                    if hello.get("count") != count:
                        refuse(
                            f"the processes disagree on their number: {count} in {me}, {hello.get('count')} in "
                            f"{key.data.name}.",
                            key.data,
                        )
                    if index in links:
                        refuse(
                            f"two processes have the number {index}: {links[index].name} and {key.data.name}.", key.data
                        )
                    links[index] = key.data
    return links


def _connect(address: str, count: int, index: int, timeout: float) -> _Link:
    """The connection of another process to process 0, once all have joined."""
    host, port = address.rsplit(":", 1)
    what = f"process 0, which does not answer at {address}"
    waiting = _Waiting(lambda: what, timeout)
    while not waiting.poll():
        try:
            link = _Link(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
        except OSError:
            time.sleep(0.2)
            continue
        what, waiting.grace = f"all {count} processes to join at {address}", FAREWELL_SECONDS  # process 0 knows better
        link.send(index=index, count=count, here=here())
        while (messages := link.receive()) is not None and not waiting.poll():
            for message in messages:
                if "error" in message:
                    raise UserError(f"{message['whose']}: {message['error']}")
                if "beat" in message:  # all have joined
                    return link
                what = message["waits_for"]
        what = f"process 0: what answers at {address} is of another job"
        time.sleep(0.2)
    raise UserError(
        f"waited {timeout:.0f} s in vain for {what}. Look at its log, at JAX_COORDINATOR_ADDRESS and at firewalls, or "
        "raise --join_seconds."
    )


def _name(index: Any, where: str) -> str:
    return f"process {index} ({where})"


class _Job:
    """This process among `count`. Process 0 has a link to each of the others, and they have one to process 0."""

    def __init__(self, count: int, index: int, links: dict[int, _Link]):
        self.count, self.index, self.links, self.closed, self.inbox = count, index, links, False, queue.SimpleQueue()
        self.names = [links[i].name if i in links else _name(i, here()) for i in range(count)]  # until all are told
        self.begun, self.stop_at, self.has_asked = -1, None, False  # steps; -1: none yet
        self.begun_by_all: dict[int, int] = {}  # known to process 0 alone
        self.may_begin, self.is_deciding = threading.Condition(threading.RLock()), False

    def gather(self, value: Any, where: str) -> list:
        values = {self.index: value}

        def absent() -> str:
            others = [self.names[i] for i in range(self.count if self.index == 0 else 1) if i not in values]
            more = f" and {len(others) - 1} more" if others[1:] else ""
            return f"{others[0]}{more} to reach {where}"

        waiting = _Waiting(absent)
        if self.index:
            self.links[0].send(where=where, value=value)
        while len(values) < self.count:
            waiting.poll()
            with contextlib.suppress(queue.Empty):
                sender, message = self.inbox.get(timeout=1)
                if message["where"] != where:
                    fail(f"{self.names[sender]} is at {message['where']}, but {self.names[self.index]} at {where}.")
                values = dict(enumerate(message["values"])) if self.index else {**values, sender: message["value"]}
        ordered = [values[i] for i in range(self.count)]
        self.closed = where == _END
        if self.index == 0:
            for link in self.links.values():
                link.send(where=where, values=ordered)
        return ordered

    def is_stopping(self, step: int, wants_stop: bool) -> bool:
        if wants_stop and not self.has_asked:
            self.has_asked = True
            self._ask_where_all_are() if self.index == 0 else self.links[0].send(stop="asked for")
        with self.may_begin:
            self.may_begin.wait_for(lambda: not self.is_deciding)
            if self.stop_at is not None and step >= self.stop_at:
                return True
            self.begun = step
            return False

    def _hear_of_stop(self, sender: int, stop: str, step: int | None = None) -> None:
        """Takes a message of the agreement on where to stop."""
        if stop == "asked for":
            self._ask_where_all_are()
        elif stop == "which step has begun?":
            self.links[0].send(stop="begun", step=self._hold())
        elif stop == "begun":
            self._note_begun(sender, step)
        else:
            self._stop_at(step)

    def _ask_where_all_are(self) -> None:
        with self.may_begin:
            if self.is_deciding or self.stop_at is not None:
                return
            begun = self._hold()
        for link in self.links.values():
            link.send(stop="which step has begun?")
        self._note_begun(0, begun)

    def _hold(self) -> int:
        """The step that this process has begun, which begins no other until it knows where to stop."""
        with self.may_begin:
            self.is_deciding = True
            return self.begun

    def _note_begun(self, sender: int, step: int) -> None:
        self.begun_by_all[sender] = step
        if len(self.begun_by_all) == self.count:
            first = max(self.begun_by_all.values()) + 1
            for link in self.links.values():
                link.send(stop="at", step=first)
            self._stop_at(first)

    def _stop_at(self, step: int) -> None:
        with self.may_begin:
            self.stop_at, self.is_deciding = step, False
            self.may_begin.notify_all()

    def watch(self) -> None:
        """Reads all links until the end of the job, and ends this process when another one is lost."""
        beat = float("-inf")
        with selectors.DefaultSelector() as selector:
            for index, link in self.links.items():
                selector.register(link.socket, selectors.EVENT_READ, (index, link))
            while not self.closed:
                if time.monotonic() - beat > BEAT_SECONDS:
                    beat = time.monotonic()
                    for link in self.links.values():
                        link.send(beat=True)
                for key, _ in selector.select(timeout=1):
                    index, link = key.data
                    for message in self._receive(index, link):
                        if "error" in message:
                            fail(message["error"], whose=message["whose"])
                        elif "stop" in message:
                            self._hear_of_stop(index, **message)
                        elif "where" in message:
                            self.closed = self.index > 0 and message["where"] == _END
                            self.inbox.put((index, message))
                for index, link in self.links.items():
                    if time.monotonic() - link.heard > SILENCE_SECONDS:
                        fail(f"no answer for {SILENCE_SECONDS} s", whose=self.names[index])

    def _receive(self, index: int, link: _Link) -> list[dict]:
        messages = link.receive()
        if messages is None and not self.closed:
            fail("it has ended without a word: it was killed, or its host is lost", whose=self.names[index])
        return messages or []

    def tell(self, message: str, whose: str) -> None:
        """Sends an error to process 0, which sends it to all others and waits until they have ended."""
        for link in self.links.values():
            link.send(error=message, whose=whose or self.names[self.index])
        deadline = time.monotonic() + FAREWELL_SECONDS
        for link in self.links.values() if self.index == 0 else ():
            while time.monotonic() < deadline and link.receive() is not None:
                pass
