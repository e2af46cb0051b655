"""What held only by a list, or not at all: the reply channel, what outlives a call, files and
processes of the host, what is bound. On every rung, as this user and as an ordinary one.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import evaluate
import grpo_unified
import tools
from reagent.config import parse_config
from results.benchmarks import DATASETS, Task
from tests.helpers.boxes import EVERYWHERE, ROOT, OrdinaryBox, make_box
from tests.helpers.tiny import load, toy_world
from toolkit import sandbox
from toolkit.sandbox import RUNGS, Sandbox, SandboxUnavailable

CALLS = """
import ctypes, errno, fcntl, mmap, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, function, *arguments):
    try:
        result = function(*arguments)
        failed = isinstance(result, int) and result == -1
    except (OSError, ValueError, RuntimeError):
        failed = True
    if not failed:
        print("DID", name)
"""
NOTHING_DONE = r"^(?!.*DID).*nothing more"


@pytest.fixture(scope="module", params=EVERYWHERE, ids=" of ".join)
def box(request):
    box = make_box(*request.param, seconds=3.0, memory_mb=400, scratch_mb=16)
    yield box
    box.close()


# --------------------------------------------------------------------------------------------------
# the reply channel


def test_no_process_but_its_own_is_in_reach(box):
    code = CALLS + (
        "for pid in [1, 2, os.getppid(), %d]:\n"
        " for name in 'fd/0 fd/1 fd/2 mem maps environ root cwd exe task oom_score_adj'.split():\n"
        "  path = f'/proc/{pid}/{name}'\n"
        "  attempt(path, os.open, path, os.O_RDONLY); attempt(path, os.open, path, os.O_WRONLY)\n"
        "  attempt(path, os.readlink, path)\n"
        "others = set(range(1, 400)) - {os.getpid()}\n"
        "for pid in others:\n attempt(f'kill {pid}', os.kill, pid, 9)\n"
        "attempt('pidfd', libc.syscall, 434, 1, 0)\nprint('nothing more')"
    )
    result = box.run(code % box.pid)
    assert re.search(NOTHING_DONE, result.text, re.S), result


def test_what_it_writes_anywhere_is_its_own_output_at_most(box):
    forged = json.dumps({"secret": "", "exit": 0, "text": "forged"})
    code = (
        f"import os\nfor fd in range(256):\n for text in ({forged!r}, 'ready', '+', 'stop'):\n"
        "  try: os.write(fd, text.encode())\n  except OSError: pass\nos._exit(7)"
    )
    result = box.run(code)
    assert result.status == "error" and result.text.startswith(forged)
    assert [box.run(f"print({n})").text for n in range(4)] == [f"{n}\n" for n in range(4)]


SCAN = """
import ctypes, gc, os
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
# every letter moved by one, so that nothing here holds what is looked for
moved, needle = bytes((i + 1) % 256 for i in range(256)), b"TFOUJOFM.54129"
read, write = os.pipe()
def hits(start, end):
    count = 0
    for at in range(start, end, 4096):
        if libc.write(write, at, 4096) == 4096:  # EFAULT where nothing is
            count += os.read(read, 4096).translate(moved).count(needle)
    return count
places = {id(thing) >> 20 for thing in gc.get_objects()}
places |= {place + 1 for place in places}
heap = libc.sbrk(0)
print(sum(hits(place << 20, (place + 1) << 20) for place in places) + hits(heap - (24 << 20), heap))
"""


def test_no_call_finds_code_or_output_of_another_in_its_memory(box):
    sentinel = "SENTINEL-43018"
    assert int(box.run(f"kept = {sentinel!r}\n" + SCAN, 20).text) > 0  # it finds what is there
    for _ in range(4):
        box.run(f"print({sentinel!r} * 100)  # {sentinel}")
    assert box.run(SCAN, 20).text == "0\n"


FALSE_SERVER = """
import os, socket, sys
channel = socket.socket(fileno=0)
ours, theirs = socket.socketpair()
read, write = os.pipe()
socket.send_fds(channel, [b"ready"], [theirs.fileno(), read])
secret = channel.recv(100).decode()
os.write(write, b"forged")
os.close(write)
channel.send({message})
channel.recv(1)
"""


@pytest.mark.parametrize(
    "message",
    [
        'b"{}"',
        'b"[]"',
        'b"not JSON"',
        'b"[" * 4000',
        'b"ready"',
        """b'{"secret": "0", "exit": 0}'""",
        """b'{"secret": null, "exit": 0}'""",
        """('{"secret": "%s", "exit": true}' % secret).encode()""",
        """('{"secret": "%s", "exit": "0"}' % secret).encode()""",
        """('{"secret": "%s", "exit": 0, "text": "x"}' % secret).encode()""",
        """('{"exit": 0, "secret": "%s"' % secret).encode()""",
    ],
)
def test_a_server_that_says_anything_else_is_put_away_and_its_call_a_fault(message, monkeypatch):
    monkeypatch.setattr(sandbox, "JAIL", FALSE_SERVER.format(message=message))
    monkeypatch.setattr(Sandbox, "_probe", _no_probe)
    box = Sandbox(rung="landlock")
    result = box.run("print(1)")
    assert result.status == "fault" and "forged" not in result.text, result
    assert not box.all and not box.idle
    box.close()


def _no_probe(self):
    """The false server cannot pass the canary."""


def test_a_true_report_is_believed(monkeypatch):
    true = """('{"secret": "%s", "exit": 3}' % secret).encode()"""
    monkeypatch.setattr(sandbox, "JAIL", FALSE_SERVER.format(message=true))
    monkeypatch.setattr(Sandbox, "_probe", _no_probe)
    box = Sandbox(rung="landlock")
    result = box.run("print(1)")
    assert (result.status, result.text) == ("error", "forged")
    box.close()


# --------------------------------------------------------------------------------------------------
# what outlives a call

STATE = (
    CALLS
    + """
import resource, signal, stat
for folder in ('.', '/tmp', '/dev/shm'):
    try: print(stat.filemode(os.stat(folder).st_mode), os.listdir(folder), os.listxattr(folder))
    except OSError: pass
print(os.umask(0), os.getpriority(0, 0), os.sched_getscheduler(0), sorted(os.sched_getaffinity(0)))
print([resource.getrlimit(n) for n in range(16) if n != 4])
print([signal.getsignal(n) for n in (1, 2, 15, 17)])
print(libc.semget(77, 0, 0), libc.shmget(78, 0, 0), libc.msgget(79, 0), os.environ.get('LEFT'))
for path in ('/proc/self/oom_score_adj', '/proc/self/autogroup', '/dev/mqueue'):
    try: print(os.path.isdir(path) and os.listdir(path) or open(path).read())
    except OSError: pass
if hasattr(libc, 'mq_open'): print(libc.mq_open(b'/left', os.O_RDONLY, 0, None))
try: s = socket.socket(socket.AF_UNIX); s.bind('\\0left'); print('free')
except OSError as error: print(error)
"""
)
HOSTILE = (
    CALLS
    + """
import resource, signal, subprocess, threading
attempt('modes', os.chmod, '.', 0o7000)
for folder in ('/tmp', '/dev/shm'): attempt('modes', os.chmod, folder, 0)
for n in range(50):
    attempt('file', lambda: open(f'left{n}', 'w').close())
attempt('folders', os.makedirs, 'a/' * 40 + 'b')
attempt('closed', os.mkdir, 'closed', 0)
attempt('xattr', os.setxattr, '.', 'user.left', b'x')
attempt('shm', lambda: open('/dev/shm/left', 'w').close())
if hasattr(libc, 'mq_open'): attempt('queue', libc.mq_open, b'/left', 0o102, 0o666, None)
attempt('semaphore', libc.semget, 77, 1, 0o1666)
attempt('shm', libc.shmget, 78, 4096, 0o1666)
attempt('messages', libc.msgget, 79, 0o1666)
for who in (0, os.getppid(), 1, 2):
    attempt('nice', os.setpriority, os.PRIO_PROCESS, who, 19)
    attempt('group', os.setpriority, os.PRIO_PGRP, who, 19)
    attempt('user', os.setpriority, os.PRIO_USER, 0, 19)
    attempt('affinity', os.sched_setaffinity, who, {0})
    attempt('class', os.sched_setscheduler, who, os.SCHED_IDLE, os.sched_param(0))
    attempt('io', libc.syscall, 251, 1, who, 3 << 13)
    attempt('oom', lambda: open(f'/proc/{who or "self"}/oom_score_adj', 'w').write('1000'))
    attempt('limits', libc.prlimit, who, 7, ctypes.byref((ctypes.c_ulong * 2)(3, 3)), None)
os.environ['LEFT'] = 'x'; os.umask(0o777); signal.signal(15, signal.SIG_IGN)
def listen(address):
    server = socket.socket(socket.AF_UNIX); server.bind(address); server.listen()
attempt('socket', listen, '\\0left'); attempt('socket', listen, 'left-socket')
attempt('port', lambda: socket.create_server(('127.0.0.1', 4567)))
resource.setrlimit(resource.RLIMIT_CPU, (9, 9))
try:
    for _ in range(5):
        if not os.fork():
            os.setsid(); time.sleep(60)
except OSError: pass
"""
)


def test_nothing_of_a_call_is_there_for_the_next(box):
    before = box.run(STATE)
    assert before.status == "ok", before
    for _ in range(4):  # every server has had it
        assert box.run(HOSTILE).status == "ok"
    assert {box.run(STATE).text for _ in range(4)} == {before.text}


@pytest.mark.parametrize("rung", RUNGS)
def test_no_server_is_replaced_for_what_a_call_leaves_behind(rung):
    box = make_box(rung, "this user", seconds=5.0)
    first = set(box.all)
    for _ in range(3):
        assert box.run(HOSTILE).status == "ok"
        assert box.run("print(2)").text == "2\n"
    assert box.all == first
    box.close()
    assert not any(os.path.exists(server.folder or "-") for server in first)


OWNER = """
import os, sys
sys.path.insert(0, {root!r})
from toolkit.sandbox import Sandbox, family
box = Sandbox(rung={rung!r})
box.run("open('left', 'w').write('x')")
print([pid for server in box.all for pid in family(server.process.pid)], flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("rung", RUNGS)
def test_no_process_outlives_its_owner(rung, end, tmp_path):
    make_box(rung, "this user").close()  # or skip
    program = OWNER.format(root=str(ROOT), rung=rung, end=end)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    pids, deadline = json.loads(done.stdout), time.monotonic() + 5
    while time.monotonic() < deadline and any(_runs(pid) for pid in pids):
        time.sleep(0.05)
    assert pids and not any(_runs(pid) for pid in pids)
    assert end or not os.listdir(tmp_path)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_close_leaves_no_thread_and_no_descriptor():
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for rung in RUNGS:
        box = make_box(rung, "this user", seconds=0.3)
        codes = ["print(1)", "while True: pass", "import os; os._exit(3)", "1/0"] * 2
        running = [threading.Thread(target=box.run, args=[code]) for code in codes]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        box.close()
        assert box.run("print(1)").status == "fault"  # and no server is started again
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)


# --------------------------------------------------------------------------------------------------
# files and processes of the host

LIBRARY = os.__file__  # a file of the host's that every call can read


@pytest.mark.parametrize(
    "name, code",
    [
        ("a write lease", "fcntl.fcntl(f, 1024, fcntl.F_WRLCK)"),
        ("a read lease", "fcntl.fcntl(f, 1024, fcntl.F_RDLCK)"),
        ("a notice", "fcntl.fcntl(f, 1026, 0x1f)"),
        ("inotify", "1 / (libc.inotify_init() + 1)"),
        ("advice", "os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)"),
    ],
)
def test_a_file_of_the_host_cannot_be_held(box, name, code):
    code = CALLS + f"f = os.open({LIBRARY!r}, 0)\n{code}\nprint('DID')"
    assert "DID" not in box.run(code).text


@pytest.mark.skipif(os.getuid() != 0, reason="who may write to the library is root")
def test_locks_on_the_hosts_files_hold_nobody_up(box):
    import fcntl

    code = CALLS + (
        f"f = os.open({LIBRARY!r}, 0)\nfcntl.flock(f, fcntl.LOCK_EX)\n"
        "fcntl.lockf(f, fcntl.LOCK_SH)\nfcntl.fcntl(f, 37, bytes(32))\ntime.sleep(1.5)"
    )
    thread = threading.Thread(target=box.run, args=[code])
    thread.start()
    with open(LIBRARY, "r+b") as file:
        for _ in range(20):
            time.sleep(0.05)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_UN)
    thread.join()


def test_a_lock_is_made_believe_so_that_what_locks_its_own_files_works(box):
    code = CALLS + (
        "import sqlite3\nwith open('own', 'w') as f:\n fcntl.flock(f, fcntl.LOCK_EX)\n"
        " fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "base = sqlite3.connect('own.db')\nbase.execute('create table t (x)')\n"
        "base.execute('insert into t values (7)'); base.commit()\n"
        "print(sqlite3.connect('own.db').execute('select * from t').fetchall())"
    )
    assert box.run(code).text == "[(7,)]\n"


def test_a_call_is_one_process_where_no_namespace_ends_its_others(box):
    code = CALLS + (
        "attempt('fork', lambda: os.fork() or os._exit(0))\n"
        "attempt('spawn', os.posix_spawn, '/bin/true', ['true'], {})\n"
        "attempt('raw', lambda: libc.syscall(57) or os._exit(0))\n"
        "import threading; thread = threading.Thread(target=print, args=['DID', 'thread'])\n"
        "thread.start(); thread.join()"
    )
    made = {f"DID {name}" for name in ("fork", "spawn", "raw") if box.rung == "bubblewrap"}
    assert set(box.run(code).text.splitlines()) == made | {"DID thread"}


def test_only_sockets_with_a_path_and_in_one_process_not_even_these(box):
    code = CALLS + (
        "for family in range(46):\n for kind in range(1, 11):\n"
        "  for name in ('socket', 'socketpair'):\n"
        "   try: getattr(socket, name)(family, kind); print(name, family)\n"
        "   except (OSError, ValueError): pass"
    )
    pair = {"socketpair 1"}
    more = {"socket 1"} if box.rung == "bubblewrap" else set()
    assert set(box.run(code).text.splitlines()) == pair | more


DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")


@pytest.fixture
def devices_put_back():
    """What a call could do to them if it could stays on this machine: everybody needs /dev/null."""
    found = [os.stat(path) for path in DEVICES]
    yield
    for path, was in zip(DEVICES, found):
        with contextlib.suppress(PermissionError):
            os.chmod(path, was.st_mode & 0o7777)
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_devices_of_the_host_are_written_to_and_stay_as_they_are(box, devices_put_back):
    before = [os.stat(path) for path in DEVICES]
    code = CALLS + (
        f"for path in {DEVICES}:\n attempt('times', os.utime, path, (7, 7)) if %r else 0\n"
        " attempt('mode', os.chmod, path, 0o602) if %r else 0\n"
        " attempt('owner', os.chown, path, -1, os.getgid())\n"
        "print(open('/dev/null', 'w').write('x'), len(os.urandom(9)), open('/dev/null').read())\n"
        "import subprocess; subprocess.run(['true'], stdout=subprocess.DEVNULL) if %r else 0\n"
        "print('nothing more')"
    )
    forks = box.rung == "bubblewrap"  # elsewhere modes and times are make-believe
    result = box.run(code % (forks, forks, forks))
    box.run(f"import os\nfor path in {DEVICES}: os.utime(path, (7, 7)); os.chmod(path, 0o602)")
    after = [os.stat(path) for path in DEVICES]
    assert re.search(NOTHING_DONE, result.text, re.S), result
    keys = ("st_mode", "st_mtime", "st_uid", "st_gid")
    assert [[getattr(s, k) for k in keys] for s in after] == [
        [getattr(s, k) for k in keys] for s in before
    ]


def test_no_crash_goes_to_a_program_of_the_host(box):
    """A limit of 0 does not keep a core from a pipe; that of 1 does, and stays."""
    code = CALLS + (
        "import resource\nfor value in ((0, 0), (0, 1)):\n"
        " attempt('core', resource.setrlimit, resource.RLIMIT_CORE, value)\n"
        " pair = (ctypes.c_ulong * 2)(*value)\n"
        " attempt('core', libc.prlimit, 0, 4, pair, None)\n"
        " attempt('core', libc.syscall, 160, 4, pair)\n"
        "resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 22))\nprint('nothing more')"
    )
    result = box.run(code)
    assert re.search(NOTHING_DONE, result.text, re.S), result


def test_what_a_call_holds_leaves_room_for_the_calls_beside_it(box):
    """The kernel counts descriptors on their way for the user: for all calls, and the trainer."""
    code = (
        "import socket, time\nkept = []\nfor _ in range(100):\n a, b = socket.socketpair()\n"
        " kept += [a, b]\n try: socket.send_fds(a, [b'x'], [a.fileno()] * 250)\n"
        " except OSError: pass\n"
    )
    thread = threading.Thread(target=box.run, args=[code + "time.sleep(2)"])
    thread.start()
    time.sleep(0.5)
    assert [box.run("print(1)").status for _ in range(4)] == ["ok"] * 4
    thread.join()


def test_a_lone_process_has_one_table_of_descriptors(box):
    """Its watcher would see that of its first thread alone."""
    code = CALLS + (
        "stack = ctypes.create_string_buffer(1 << 16)\n"
        "pause = ctypes.cast(libc.pause, ctypes.c_void_p)\n"
        "libc.clone.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int, ctypes.c_void_p]\n"
        "top = (ctypes.addressof(stack) + len(stack)) & ~15\n"
        "attempt('thread', libc.clone, pause, top, 0x10900, None)\n"
        "print('nothing more')\nos._exit(0)"
    )
    if box.rung != "bubblewrap":
        result = box.run(code)
        assert re.search(NOTHING_DONE, result.text, re.S), result


HARM = (
    CALLS
    + """
import signal
v = %d
for n in (0, 9, 15, 18, 29): attempt('kill', os.kill, v, n)
for n in (9, 29):
    attempt('killpg', os.killpg, v, n)
    attempt('tgkill', libc.syscall, 234, v, v, n)
    attempt('tkill', libc.syscall, 200, v, n)
    attempt('queue', libc.sigqueue, v, n, None)
attempt('nice', os.setpriority, 0, v, 19)
attempt('affinity', os.sched_setaffinity, v, {0})
attempt('class', os.sched_setscheduler, v, os.SCHED_IDLE, os.sched_param(0))
attempt('parameters', os.sched_setparam, v, os.sched_param(0))
attempt('attributes', libc.syscall, 314, v, ctypes.create_string_buffer(64), 0)
attempt('io', libc.syscall, 251, 1, v, 3 << 13)
attempt('limits', libc.prlimit, v, 7, ctypes.byref((ctypes.c_ulong * 2)(3, 3)), None)
attempt('oom', lambda: open(f'/proc/{v}/oom_score_adj', 'w').write('1000'))
attempt('memory', libc.process_vm_writev, v, None, 0, None, 0, 0)
attempt('trace', libc.ptrace, 16, v, 0, 0)
attempt('pages', libc.syscall, 256, v, 0, None, None)
clock = ctypes.c_long(~v << 3 | 2)  # of the processor time of another
attempt('clock', libc.syscall, 228, clock, ctypes.create_string_buffer(16))
attempt('timer', libc.syscall, 222, clock, None, ctypes.byref(ctypes.c_int()))
attempt('sleep', libc.syscall, 230, clock, 0, (ctypes.c_long * 2)(0, 1), None)
past = (ctypes.c_long * 2)(0, 1)  # a lock of v's: v gets the priority of who waits for it
futex = libc.syscall(202, ctypes.byref(ctypes.c_int(v)), 6, 0, past), ctypes.get_errno()
if futex != (-1, errno.ENOSYS): print('DID heir', futex)
a, b = socket.socketpair()
r, w = os.pipe()
for fd in (r, a.fileno()):
    for command, argument in ((8, v), (8, -v), (10, 9), (15, ctypes.create_string_buffer(8))):
        attempt('owner', lambda: fcntl.fcntl(fd, command, argument) and 0)
    for command in (0x8901, 0x8902):
        attempt('socket owner', fcntl.ioctl, fd, command, v.to_bytes(4, 'little'))
    for flags in (os.O_ASYNC | os.O_NONBLOCK,):
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
os.write(w, b'x'); b.send(b'x')
print('nothing more')
"""
)
OLD_LANDLOCK = (
    'version = checked(LIBC.syscall(444, None, 0, 1), "Landlock")',
    'version = min(3, checked(LIBC.syscall(444, None, 0, 1), "Landlock"))',
)


def unharmed(box, code: str):
    """Runs an attack on a process of the box's user; it must be as it was."""
    command = ["sleep", "60"]
    with subprocess.Popen(command, start_new_session=True, **box.user) as victim:
        try:
            before = state_of(victim.pid)
            result = box.run(code % victim.pid)
            time.sleep(0.1)
            assert victim.poll() is None and state_of(victim.pid) == before
        finally:
            victim.kill()
    assert re.search(NOTHING_DONE, result.text, re.S), result


def state_of(pid: int) -> list:
    limits, score = (
        Path(f"/proc/{pid}/{name}").read_text() for name in ("limits", "oom_score_adj")
    )
    scheduling = os.sched_getaffinity(pid), os.sched_getscheduler(pid)
    return [os.getpriority(0, pid), *scheduling, limits, score]


def test_a_process_of_the_same_user_is_not_touched(box):
    unharmed(box, HARM)


@pytest.mark.parametrize("who", ["this user", "an ordinary user"])
@pytest.mark.parametrize("rung", ["landlock+namespaces", "landlock"])
def test_nor_on_a_kernel_whose_landlock_knows_no_signals(rung, who, monkeypatch):
    old = sandbox.JAIL.replace(*OLD_LANDLOCK)
    assert old != sandbox.JAIL
    make_box(rung, who).close()  # or skip
    if who == "this user":
        monkeypatch.setattr(sandbox, "JAIL", old)
        box = make_box(rung, who, seconds=5.0)
    else:
        box = OrdinaryBox(jail=old, rung=rung, seconds=5.0)
    unharmed(box, HARM)
    box.close()


@pytest.mark.parametrize("kind", ["SOCK_DGRAM", "SOCK_STREAM", "SOCK_SEQPACKET"])
def test_sockets_of_the_host_hear_nothing(box, kind):
    import socket

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as abstract:
        os.chmod(folder, 0o755)
        abstract.bind("\0fences")
        abstract.listen()
        listener = socket.socket(socket.AF_UNIX, getattr(socket, kind))
        listener.bind(f"{folder}/socket")
        os.chmod(f"{folder}/socket", 0o777)
        if kind != "SOCK_DGRAM":
            listener.listen()
        code = CALLS + (
            f"for kind in (1, 2, 5):\n for address in ({folder + '/socket'!r}, '\\0fences'):\n"
            "  def each(make):\n"
            "   s = make()\n"
            "   attempt('connect', lambda: s.connect(address))\n"
            "   attempt('send', lambda: s.sendto(b'x', address))\n"
            "   attempt('message', lambda: s.sendmsg([b'x'], [], 0, address))\n"
            "  for make in (socket.socket, lambda *a: socket.socketpair(*a)[0]):\n"
            "   try: each(lambda: make(1, kind))\n   except OSError: pass\nprint('end')"
        )
        result = box.run(code)
        listener.settimeout(0.05)
        abstract.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.recv(9) if kind == "SOCK_DGRAM" else listener.accept()
        with pytest.raises(TimeoutError):
            abstract.accept()
        listener.close()
    assert result.text.endswith("end\n"), result


# --------------------------------------------------------------------------------------------------
# what is bound, and where no rung works


def test_a_checkout_that_is_an_environment_or_lies_below_usr_is_not_bound(monkeypatch, tmp_path):
    for place in ("", "lib", f"lib/python3.{sys.version_info[1]}", "lib/deep/er"):
        checkout = tmp_path / place / "checkout"
        checkout.mkdir(parents=True)
        (checkout / "gold").write_text("gold")
        (tmp_path / "lib/alias").unlink(missing_ok=True)
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib/alias").symlink_to(checkout / "gold")
        monkeypatch.setattr(sandbox, "CHECKOUT", checkout)
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
        found = sandbox.libraries()
        real = os.path.realpath(checkout)
        assert not any(f"{real}/".startswith(os.path.realpath(path) + "/") for path in found)
        assert not any(os.path.realpath(path).startswith(real) for path in found)
        assert any(path.startswith(str(tmp_path / "lib")) for path in found) or "deep" not in place


ROOTED = """
import sys
from toolkit.sandbox import Sandbox
box = Sandbox(rung=sys.argv[2])
print(box.run(sys.argv[1]).text)
box.close()
"""


@pytest.mark.parametrize("rung", RUNGS)
def test_an_environment_in_the_root_of_a_checkout_opens_nothing_of_it(rung, tmp_path):
    make_box(rung, "this user").close()  # or skip
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    (tmp_path / "toolkit").mkdir()
    for name in ("sandbox.py", "jail.py", "system_calls.txt"):
        (tmp_path / "toolkit" / name).write_text((ROOT / "toolkit" / name).read_text())
    secrets = [tmp_path / name for name in (".env", "data/gaia.jsonl", "lib/notes", "bin/run.sh")]
    for path in secrets:
        path.parent.mkdir(exist_ok=True)
        path.write_text("GOLD")
    code = "for path in %r:\n try: print(open(path).read())\n except OSError: print('closed')"
    paths = [*map(str, secrets), str(tmp_path / "toolkit/jail.py")]
    done = subprocess.run(
        [tmp_path / "bin/python", "-B", "-c", ROOTED, code % paths, rung],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["closed"] * 5, done


@pytest.mark.parametrize("rung", RUNGS)
def test_what_an_environment_brings_in_at_its_start_is_in_no_call(rung, tmp_path):
    """A line of a .pth file, as an editable install has, and sitecustomize run before any fence."""
    make_box(rung, "this user").close()  # or skip
    environment, checkout = tmp_path / "environment", tmp_path / "checkout"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (checkout / "toolkit").mkdir(parents=True)
    for name in ("sandbox.py", "jail.py", "system_calls.txt"):
        (checkout / "toolkit" / name).write_text((ROOT / "toolkit" / name).read_text())
    (checkout / "gold.py").write_text("answer = 'GOLD'")
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "editable.pth").write_text(f"{checkout}\nimport gold\n")
    (packages / "sitecustomize.py").write_text(f"import sys; sys.kept = open({__file__!r}).read()")
    (packages / "harmless.py").write_text("answer = 'there'")
    code = (
        "import sys, harmless\nprint('gold' in sys.modules, hasattr(sys, 'kept'), harmless.answer)"
    )
    done = subprocess.run(
        [environment / "bin/python", "-B", "-c", ROOTED, f"{code}\nexit()", rung],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False False there", done


@pytest.mark.parametrize("rung", RUNGS)
def test_the_canary_finds_the_projects_files_and_a_secret_beside_them(rung, monkeypatch):
    make_box(rung, "this user").close()  # or skip
    found = sandbox.libraries()
    monkeypatch.setattr(sandbox, "libraries", lambda: [*found, str(ROOT)])
    with pytest.raises(SandboxUnavailable, match="does not isolate here"):
        Sandbox(rung=rung)
    monkeypatch.setattr(sandbox, "libraries", lambda: [*found, str(ROOT / "toolkit")])
    with pytest.raises(SandboxUnavailable, match="does not isolate here"):
        Sandbox(rung=rung)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_call_that_cannot_be_confined_never_runs_and_the_reason_is_told(rung, monkeypatch):
    make_box(rung, "this user").close()  # or skip
    broken = sandbox.JAIL.replace(
        "        filters[1].put_on()", "        raise OSError('no filter')"
    )
    monkeypatch.setattr(sandbox, "JAIL", broken)
    began = time.monotonic()
    with pytest.raises(SandboxUnavailable, match="OSError: no filter"):
        Sandbox(rung=rung)
    assert time.monotonic() - began < 20


def test_without_a_rung_one_sentence_says_what_to_install_or_enable(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox, "JAIL", "raise SystemExit('unshare: Operation not permitted')")
    with pytest.raises(SandboxUnavailable) as told:
        Sandbox()
    text = str(told.value)
    assert "apt-get install bubblewrap" in text and "unsafe_python" in text and "\n" not in text
    assert "bubblewrap: it is not installed" in text and "Operation not permitted" in text
    assert re.search(r"sysctl -w (user|kernel)\.\w+=\d+", text)


def test_the_sentence_names_the_setting_that_is_wrong(monkeypatch):
    values = {
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n",
        "/proc/sys/user/max_user_namespaces": "0\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: values.get(str(path), "7\n"))
    told = sandbox.remedy([])
    assert "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0" in told
    assert "user.max_user_namespaces=15000" in told and "userns_clone" not in told


def test_a_run_without_a_rung_ends_in_that_sentence_or_is_unsafe_where_asked(monkeypatch):
    monkeypatch.setattr(sandbox, "RUNGS", ())
    with pytest.raises(SystemExit, match="apt-get install bubblewrap"):
        tools.Toolbox(["python"])
    toolbox = tools.Toolbox(["python"], unsafe_python=True)
    assert toolbox.sandbox.rung == "unsafe" and toolbox.sandbox.run("1 + 1").text == "2\n"
    toolbox.close()


def test_every_door_that_has_tools_takes_unsafe_python(monkeypatch, tmp_path):
    given, world = [], toy_world(tmp_path)

    def toolbox(names, **options):
        given.append(options["unsafe_python"])
        raise SystemExit("seen")

    at_work = load("data/at_work.py")
    for module in (grpo_unified, evaluate, at_work):
        monkeypatch.setattr(module, "Toolbox", toolbox)
    model, rows = f"--model={world / 'model'}", f"--data={world / 'rl.jsonl'}"
    for unsafe in (True, False):
        option = f"--unsafe_python={unsafe}"
        with pytest.raises(SystemExit, match="seen"):
            grpo_unified.main(parse_config(grpo_unified.Config, [model, rows, option]))
        with pytest.raises(SystemExit, match="seen"):
            cfg = parse_config(at_work.Common, [rows, option])
            with at_work.agent_at_work(cfg, str(world / "model")):
                pass
        with pytest.raises(SystemExit, match="seen"):
            task = Task("t", DATASETS["gaia_text"], [], 1, [])
            evaluate.make_toolboxes(parse_config(evaluate.Config, [option]), [task])
    assert given == [True] * 3 + [False] * 3
