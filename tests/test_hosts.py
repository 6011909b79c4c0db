"""Processes of a job meet, compare and end together. They run without jax, which integration/ adds."""

import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

# Joins process `index` of `count`, says so, and runs the test's own lines. An error ends it as a door does.
PROCESS = """
import os, sys, time
from dar_jax import hosts
from dar_jax.errors import UserError

hosts.REPORT_SECONDS, hosts.SILENCE_SECONDS, hosts.BEAT_SECONDS, hosts.FAREWELL_SECONDS = 1, 3, 0.5, 3
port, count, index, timeout = map(int, sys.argv[1:5])
try:
    hosts.join(f"localhost:{port}", count, index, timeout)
    print("joined", flush=True)
    exec(sys.argv[5])
    hosts.finish()
except UserError as error:
    hosts.fail(str(error))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(indices, lines="pass", count=None, timeout=20, port=None):
    """Starts these processes of a job on this machine."""
    port = port or free_port()
    numbers = [[port, count or len(indices), index, timeout] for index in indices]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([sys.executable, "-c", PROCESS, *map(str, n), lines], **pipes) for n in numbers]


def ends(processes):
    """Exit code, stdout and stderr of each."""
    outputs = [process.communicate(timeout=40) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_all_gather_the_values_of_all():
    lines = "print(hosts.gather(index * 10, 'a'), hosts.gather([index], 'b')); hosts.agree({'x': 1}, 'c')"
    for code, out, error in ends(start([2, 0, 1], lines)):
        assert (code, error) == (0, "") and out.endswith("joined\n[0, 10, 20] [[0], [1], [2]]\n")


def test_a_difference_is_the_same_line_in_all():
    found = ends(start([0, 1, 2], "hosts.agree({'a': 1, 'config.train.num_steps': 5 + (index == 2)}, 'start')"))
    assert [code for code, *_ in found] == [2, 2, 2]
    texts = {error.partition("the processes of this job disagree: ")[2] for *_, error in found}
    assert len(texts) == 1  # before it, some name the process that told them first
    (text,) = texts
    assert text.startswith("config.train.num_steps is 5 in process 0") and "6 in process 2 (pid" in text
    assert all(error.startswith("error: ") and error.count("\n") == 1 for *_, error in found)


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_ends_all_and_each_says_whose_it_is(culprit):
    lines = f"if index == {culprit}: raise UserError('image 7 is damaged')\ntime.sleep(30)"
    started = time.monotonic()
    found = ends(start([0, 1, 2], lines))
    assert time.monotonic() - started < 20
    for index, (code, _, error) in enumerate(found):
        assert code == 2 and error.count("\n") == 1
        if index == culprit:
            assert error == "error: image 7 is damaged\n"
        else:
            assert error.startswith(f"error: process {culprit} (pid ") and error.endswith("): image 7 is damaged\n")


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "has ended without a word"), (signal.SIGSTOP, "no answer for 3 s")]
)
def test_a_process_that_is_lost_ends_all(culprit, number, words):
    processes = start([0, 1, 2], "time.sleep(30)")
    for process in processes:
        assert "joined\n" in iter(process.stdout.readline, "")
    processes[culprit].send_signal(number)
    for code, _, error in ends([p for i, p in enumerate(processes) if i != culprit]):
        assert code == 2 and f"error: process {culprit} (pid " in error and words in error and error.count("\n") == 1
    processes[culprit].kill()
    processes[culprit].communicate()


def test_waiting_is_told_and_ends():
    """Process 0 knows who is missing, and the others learn it; without process 0 they say so."""
    for code, out, error in ends(start([0, 1], count=4, timeout=3)):
        assert code == 2 and "waiting for processes 2, 3 of 4 to join at localhost" in out
        assert "waited 3 s in vain for processes 2, 3 of 4 to join" in error and error.count("\n") == 1
    ((code, out, error),) = ends(start([1], count=2, timeout=3))
    assert code == 2 and "waiting for process 0, which does not answer at localhost" in out
    assert error.startswith("error: waited 3 s in vain for process 0, which does not answer at localhost")


def test_numbers_that_make_no_job():
    port = free_port()
    for code, _, error in ends(start([0, 1, 1], count=4, port=port)):
        assert code == 2 and "two processes have the number 1: process 1 (pid" in error
    port = free_port()
    for code, _, error in ends(start([0], count=2, port=port) + start([1], count=3, port=port)):
        assert code == 2 and "the processes disagree on their number: 2 in process 0" in error


def test_processes_at_different_places_are_an_error():
    for code, _, error in ends(start([0, 1], "hosts.gather(1, 'step 3' if index else 'step 4')")):
        assert code == 2 and "process 1" in error and "is at step 3, but process 0" in error and "at step 4" in error


@pytest.mark.parametrize(("askers", "when"), [((0,), 120), ((2,), 120), ((0, 1, 2), 100)])
def test_all_stop_before_the_same_step(askers, when):
    """Each takes steps from 100 on at its own pace, as it does when steps are queued."""
    lines = f"""
        import random
        for step in range(100, 10**6):
            if index in {askers} and step == {when}:
                hosts.ask_to_stop()
            if hosts.is_stopping(step):
                break
            time.sleep(random.random() * 0.004 * (index + 1))
        print('stopped before', step)
    """
    found = ends(start([0, 1, 2], textwrap.dedent(lines)))
    assert {(code, error) for code, _, error in found} == {(0, "")}
    (said,) = {out.splitlines()[-1] for _, out, _ in found}
    assert when <= int(said.removeprefix("stopped before ")) < when + 500
