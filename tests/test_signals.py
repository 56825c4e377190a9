"""What a signal does to a program that has nothing but `leanbert.signals`: these processes take a tenth of a second."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

START = """
import os, signal, subprocess, sys, time
from leanbert import signals
signals.install()
def ready():
    print("ready", flush=True)
def wait():  # in pieces: Python does not see a signal that arrives just before it begins to sleep until it wakes up
    for _ in range(600): time.sleep(0.1)
"""


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", START + textwrap.dedent(program), *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def interrupt(program, *arguments, number=signal.SIGTERM, group=False):
    """Start the program, send it (or all its processes, as a terminal does) a signal, return code and errors."""
    process = start(program, *arguments)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    (os.killpg if group else os.kill)(process.pid, number)
    errors = process.communicate(timeout=30)[1]
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "waiting",
    [
        "ready(); wait()",
        "ready()\nwhile True: pass",
        "ready(); sys.stdin = os.fdopen(os.pipe()[0]); sys.stdin.read()",
        "class Slow:\n    def __del__(self): ready(); wait()\nSlow()",
        "import atexit; atexit.register(lambda: (ready(), wait()))",
    ],
)
def test_a_message_and_the_promised_code_wherever_it_arrives(waiting, number):
    code, errors = interrupt(waiting, number=number)
    assert (code, errors) == (128 + number, f"Stopped by {number.name}.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_has_ended_well_stays_so(number):
    """Python has given the signals back to the system when it clears its modules."""
    program = """
    class Late:
        def __init__(self):
            self.write, self.sleep = os.write, time.sleep
        def __del__(self):
            self.write(1, b"ready\\n")
            self.sleep(0.5)
    late = Late()
    """
    assert interrupt(program, number=number) == (0, "")


def test_the_message_says_how_to_go_on():
    assert interrupt('signals.hint(lambda: "To go on:\\n  x"); ready(); wait()')[1] == (
        "Stopped by SIGTERM. To go on:\n  x\n"
    )


def test_nothing_half_written_stays(tmp_path):
    program = """
    from pathlib import Path
    from leanbert.files import replaced_folder, scratch_folder, temporary
    with temporary(Path(sys.argv[1], "file")) as path, replaced_folder(Path(sys.argv[1], "folder")) as folder:
        with scratch_folder() as scratch:
            Path(sys.argv[1], "scratch").write_text(str(scratch))
            path.write_text("half")
            (folder / "half").write_text("half")
            ready()
            wait()
    """
    assert interrupt(program, tmp_path)[0] == 143
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not os.path.exists((tmp_path / "scratch").read_text())


@pytest.mark.parametrize("group", [False, True])
def test_its_processes_end_with_it_and_say_nothing(tmp_path, group):
    """A rank or a plan, which are this program again, and a forked worker."""
    program = """
    import psutil
    again = "import os, sys, time; from leanbert import signals; signals.install();" \\
        "open(os.path.join(sys.argv[1], 'again'), 'w').close(); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-c", again, sys.argv[1]])
    worker = os.fork()
    if worker == 0:
        wait()
    while not os.path.exists(os.path.join(sys.argv[1], "again")):
        time.sleep(0.01)
    print(rank.pid, worker, file=open(os.path.join(sys.argv[1], "pids"), "w"), flush=True)
    ready()
    wait()
    """
    code, errors = interrupt(program, tmp_path, number=signal.SIGINT, group=group)
    assert (code, errors) == (130, "Stopped by SIGINT.\n")
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        deadline = time.monotonic() + 10
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_who_wants_to_end_in_order_gets_the_first_signal_and_one_a_second_later_ends_at_once():
    program = """
    received = []
    signals.defer_to(received.append)
    os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT]
    os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` passes on what it got, as did all that it has started
    assert received == [signal.SIGINT]
    time.sleep(signals.ECHO_SECONDS)
    ready()
    wait()
    """
    assert interrupt(program) == (143, "Stopped by SIGTERM.\n")


def test_a_line_is_not_cut_in_half():
    program = """
    with signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        ready()
    wait()
    """
    process = start(program)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (143, "ready\n", "Stopped by SIGTERM.\n")


def test_a_main_thread_in_foreign_code_is_not_waited_for():
    program = """
    import ctypes
    signals.PATIENCE_SECONDS = 0.1
    signals.watch()
    deaf = ctypes.CDLL(None)
    ready()
    deaf.pthread_mutex_lock(mutex := ctypes.create_string_buffer(64))
    deaf.pthread_mutex_lock(mutex)  # waits for ever, and no signal wakes it
    """
    assert interrupt(program)[0] == 143


def test_who_deferred_is_not_ended_by_the_watching_thread():
    program = """
    signals.PATIENCE_SECONDS = 0.1
    signals.watch()
    received = []
    signals.defer_to(received.append)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    ready()
    sys.exit(7)
    """
    process = start(program)
    assert process.wait(30) == 7


@pytest.mark.parametrize(("leader", "who"), [("parent", "rank 0"), ("itself", "torchrun, or what else started it,")])
def test_a_rank_does_not_outlive_what_started_it(leader, who):
    """Though its main thread waits in foreign code, as for a rank that is gone."""
    rank = START + textwrap.dedent("""
        signals.ORPHAN_SECONDS = 0.1
        signals.watch()
        wait()
    """)
    program = f"""
    environment = {{**os.environ, "LOCAL_RANK": "3"}}
    if {leader == "itself"}:
        environment.pop(signals.LEADER)
    subprocess.Popen([sys.executable, "-c", {rank!r}], env=environment)
    time.sleep(1)
    ready()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    process = start(program)
    output, errors = process.communicate(timeout=30)  # both streams close when the rank has ended, too
    assert (process.returncode, output) == (-9, "ready\n")
    assert errors == f"error: rank 3: {who} has ended. A training goes on with --ckpt_path last.\n"


@pytest.mark.parametrize(("rank", "says"), [("0", "Stopped by SIGTERM.\n"), ("1", "")])
def test_of_ranks_that_are_all_told_to_end_the_first_says_so(rank, says):
    program = f"os.environ['RANK'] = '{rank}'\nready(); wait()"
    assert interrupt(program) == (143, says)


def test_what_was_taken_is_given_back():
    program = """
    os.environ.pop(signals.LEADER)
    before = signals.handlers()
    restore = signals.install()
    assert signals.LEADER in os.environ
    restore()
    assert signals.handlers() == before and signals.LEADER not in os.environ
    """
    assert start(program).wait(30) == 0


def test_nothing_that_takes_time_is_imported_before_signals_are_answered():
    program = "import sys; from leanbert.cli import main; print(*[n for n in sys.modules if n.startswith('leanbert')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {
        "leanbert", "leanbert.errors", "leanbert.cli", "leanbert.ranks", "leanbert.signals"
    }  # fmt: skip


def test_a_command_that_answers_signals_is_told_and_waited_for(tmp_path):
    """What a training does: it saves before it ends; only then the program ends, as it was told."""
    child = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: "
        f"(time.sleep(0.3), open({str(tmp_path / 'saved')!r}, 'w').close(), sys.exit(143))); "
        f"open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(60)"
    )
    parent = (
        f"import sys; from leanbert import signals; signals.install(); signals.run([sys.executable, '-c', {child!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=30)
    assert (tmp_path / "saved").exists()
    assert process.returncode == 143
    assert "Stopped by SIGTERM" in words
