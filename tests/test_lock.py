"""The lock file: one holder, taken over from the dead at once, from those elsewhere after a while."""

import concurrent.futures
import json
import shutil
import subprocess
import sys
import threading
import time

import pytest

from dar_jax import files, hosts, lock
from dar_jax.errors import UserError

HOLDER = """
import sys, time
from dar_jax import lock

with lock.holding(sys.argv[1], "it", "wait"):
    print(1, flush=True)
    time.sleep(60)
"""


def hold(path):
    return lock.holding(path, 'workdir "w"', "take another")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "w" / "run.lock"


def left_by_the_dead(path, **fields):
    """A lock file as of a process that was killed, with other `fields`."""
    with hold(path):
        text = path.read_text()
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**json.loads(text), "started": "0", **fields}))


def test_one_holder_at_a_time(path):
    with hold(path):
        with pytest.raises(UserError, match=r'workdir "w" is in use by process \d+ on .+, since .+; take another\.'):
            hold(path).__enter__()
        (path.parent / "result").touch()
    assert [file.name for file in path.parent.iterdir()] == ["result"]


def test_nothing_is_left_of_a_holder_that_wrote_nothing(path):
    with pytest.raises(UserError, match="no such image"), hold(path):
        raise UserError("no such image")
    assert not path.parent.exists()


def test_a_killed_holder_is_replaced_at_once(path):
    """Also one whose parent has not asked how it ended, and whose number another process has now."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
        hold(path).__enter__()
    holder.kill()
    start = time.monotonic()
    while path.exists() and json.loads(path.read_text())["pid"] == holder.pid and time.monotonic() < start + 5:
        try:
            with hold(path):
                break
        except UserError:
            time.sleep(0.01)
    assert time.monotonic() - start < 5
    holder.communicate()
    left_by_the_dead(path)  # with the number of this process, which started later
    with hold(path):
        pass
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"id": 1}'])
def test_a_file_of_another_machine_or_a_damaged_one_is_waited_for(path, content, monkeypatch, capsys):
    monkeypatch.setattr(lock, "STALE_SECONDS", 1)
    left_by_the_dead(path, machine="elsewhere", host="node7", pid=77)
    if content is not None:
        path.write_text(content)
    start = time.monotonic()
    with hold(path):
        assert 1 <= time.monotonic() - start < 10
    assert ("process 77 on node7" if content is None else "an unknown host") in capsys.readouterr().out


def test_a_holder_on_another_machine_that_beats_is_alive(path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 20)
    left_by_the_dead(path, machine="elsewhere", host="node7", pid=77)
    beat = threading.Timer(0.5, lambda: path.write_text(path.read_text().replace('"beat": ', '"beat": 1')))
    beat.start()
    with pytest.raises(UserError, match="in use by process 77 on node7"):
        hold(path).__enter__()
    beat.join()


def test_of_many_that_find_a_dead_holder_one_gets_the_lock(path):
    for _ in range(20):
        left_by_the_dead(path)
        barrier = threading.Barrier(8)

        def attempt():
            barrier.wait()  # noqa: B023
            found = lock.Lock(path, "it", "wait")
            try:
                found.acquire()
                return found
            except UserError:
                return None

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            holders = [found for found in pool.map(lambda _: attempt(), range(8)) if found]
        assert len(holders) == 1
        assert holders[0].lost() is None
        holders[0].release()
        assert not list(path.parent.glob("*"))


def test_a_directory_that_is_removed_is_an_error_and_stays_so(path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with pytest.raises(UserError, match='workdir "w" was removed while this run was writing there'), hold(path) as held:
        held.check()
        shutil.rmtree(path.parent)
        with pytest.raises(UserError, match="was removed"):
            held.check()
        time.sleep(0.3)
        (path.parent / "metrics.jsonl").open("a")  # what a run does next
    assert not path.parent.exists()


def test_a_process_that_has_lost_its_lock_and_does_not_end_is_ended(path, monkeypatch):
    ended = []
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(hosts, "fail", ended.append)
    with hold(path):
        time.sleep(0.3)
        assert not ended
        left = json.loads(path.read_text())
        files.write_json(path, {**left, "id": "another", "pid": 77})  # at once, as another run does
        time.sleep(0.5)
    assert len(ended) == 1 and 'workdir "w" was taken over by process 77 on' in ended[0]
    assert json.loads(path.read_text())["id"] == "another"


@pytest.mark.parametrize("place", ["file/run.lock", "folder/run.lock"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "run.lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot be written: (Not a|Is a) directory|File exists; take another"):
        hold(tmp_path / place).__enter__()
