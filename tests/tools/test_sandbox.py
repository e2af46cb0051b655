"""The python tool's sandbox: what it answers, and what code in it cannot do, on every rung that
this machine has.

Numbers are those of the list of attacks on the tools: 1-43 are all here (79, a page that asks for
the environment to be posted, is 22 and 40).
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.boxes import EVERYWHERE, ROOT, make_box
from toolkit import sandbox
from toolkit.sandbox import Sandbox, SandboxUnavailable

pytestmark = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


@pytest.fixture(scope="module", params=EVERYWHERE, ids=" of ".join)
def box(request):
    os.environ["SECRET_API_KEY"] = "canary-7f3a"
    box = make_box(*request.param, seconds=6.0, memory_mb=500)
    yield box
    box.close()


@pytest.mark.parametrize(
    "code, status, told",
    [
        ("print(1+1)", "ok", "2"),
        ("6 * 7", "ok", "42"),
        ("x = 1", "ok", ""),
        ("1/0", "error", "ZeroDivisionError"),
        ("x =", "error", "SyntaxError"),
        ("import math; math.factorial(5)", "ok", "120"),
        ("import sys; sys.exit(3)", "error", ""),
        (
            "import asyncio\nasync def f():\n await asyncio.sleep(0.01)\n return 6 * 7\n"
            "asyncio.run(f())",
            "ok",
            "42",
        ),
    ],
)
def test_code_and_its_observation(box, code, status, told):
    result = box.run(code)
    assert result.status == status and re.search(told, result.text), result


def tries(*lines: str) -> str:
    """Code that makes each attempt by itself and tells which one succeeds; at the end it says
    so.
    """
    each = (
        f"try:\n    {line}\n    print('DID', {line!r})\nexcept (OSError, ValueError, RuntimeError) "
        "as e: pass\n"
        for line in lines
    )
    return (
        "import os, socket, ctypes\nlibc = ctypes.CDLL(None)\n"
        + "".join(each)
        + "print('nothing more')"
    )


def fails(*calls: str) -> str:
    """Code that makes system calls of the C library and prints their results."""
    return f"import ctypes, os\nlibc = ctypes.CDLL(None)\nprint([{', '.join(calls)}])"


REFUSED, NOTHING = r"^(?!.*DID).*nothing more", "longer than 0.5 s"
MUCH = "output cut.*Stopped: it printed too much"
HOME = os.path.expanduser("~")
# in a clone under /tmp the scratch holds empty folders of that name, which may be written
OUTSIDE = f"{HOME}/evil" if str(ROOT).startswith("/tmp/") else str(ROOT / "evil")
ATTACKS = {
    "1 endless loop": ("while True: pass", NOTHING),
    "2 endless sleep": ("import time; time.sleep(1e9)", NOTHING),
    "3 signals ignored": (
        "import signal as s, time\nfor n in (2, 15, 24): s.signal(n, s.SIG_IGN)\ntime.sleep(1e9)",
        NOTHING,
    ),
    "4 C code": ("10**10**7", NOTHING),
    "4 C code, a pattern": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", NOTHING),
    "6 threads": (
        "import threading, time\nfor _ in range(100_000):\n threading.Thread(target=time.sleep, "
        "args=(9,), daemon=True).start()",
        "can't start new thread|Stopped",
    ),
    "7 memory": ("x = []\nwhile True: x.append(bytearray(50_000_000))", "MemoryError"),
    "8 memory of a family": (
        "import os, time\nfor _ in range(20):\n if not os.fork():\n  x = bytearray(b'1') * "
        "100_000_000; time.sleep(9)\ntime.sleep(9)",
        "more than 500 MB of memory|not permitted",
    ),
    "9 a huge list": ("[0] * 10**12", "MemoryError"),
    "9 a huge text": ("'a' * 10**11", "MemoryError"),
    "10 endless print": ("while True: print('a' * 1000)", MUCH),
    "11 a line of 1 GB": (
        "import sys\nfor _ in range(1000): sys.stdout.write('a' * 10**6)",
        MUCH,
    ),
    "12 both streams": (
        "import sys\nwhile True:\n print('a' * 10**5)\n print('b' * 10**5, file=sys.stderr)",
        MUCH,
    ),
    "13 full disks": (
        tries(
            *(
                f"open({path + '/big'!r}, 'wb').write(bytes(200 << 20))"
                for path in (".", "/tmp", "/dev/shm", "/var/tmp")
            )
        ),
        REFUSED,
    ),
    "14 two million files": (
        "for i in range(2_000_000): open(f'f{i}', 'w').close()",
        "Stopped|No space",
    ),
    "15 a sparse file": (tries("open('big', 'w').truncate(10**12)"), REFUSED),
    "16 descriptors": ("x = [open('/dev/null') for _ in range(10_000)]", "Too many open files"),
    "17 recursion": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n def __getattr__(self, n): return "
        "getattr(self, n)\nA().x",
        r"signal 11|MemoryError|RecursionError",
    ),
    "18 a null pointer": ("import ctypes; ctypes.string_at(0)", r"crashed \(signal 11\)"),
    "20 the pipe held open": (
        "import os, time\nif not os.fork(): time.sleep(77)\nprint('ok')",
        "ok|not permitted",
    ),
    "22 the environment": ("import os; print(dict(os.environ), 'end')", "end"),
    "23 every environment": (
        "import glob\nfor p in glob.glob('/proc/*/environ'):\n try: print(open(p, 'rb').read())\n "
        "except OSError: pass\nprint('end')",
        "end",
    ),
    "24 memory of others": (
        fails(
            "libc.ptrace(16, os.getppid(), 0, 0)",
            "libc.ptrace(16, 1, 0, 0)",
            "libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0)",
        ),
        r"\[-1, -1, -1\]",
    ),
    "24 its file": (
        tries(
            "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)", "open('/proc/1/mem', 'rb').read(1)"
        ),
        REFUSED,
    ),
    "25 kill": (tries("os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.kill(1, 9)"), REFUSED),
    "26 secrets": (
        tries(
            *(f"open({path!r}).read()" for path in ("/etc/shadow", f"{HOME}/.netrc", __file__)),
            *(
                f"os.listdir({path!r})"
                for path in (f"{HOME}/.ssh", f"{HOME}/.cache", str(ROOT / "data"))
            ),
        ),
        REFUSED,
    ),
    "27 writing": (
        tries(
            *(
                f"open({path!r}, 'w')"
                for path in (f"{sys.prefix}/evil.pth", "/usr/evil", OUTSIDE, "/etc/evil")
            )
        ),
        REFUSED,
    ),
    "30 links": (
        tries(
            "os.symlink('/usr/bin/env', 'soft'), open('soft', 'a')",
            "os.link('/usr/bin/env', 'hard'), open('hard', 'a')",
        ),
        REFUSED,
    ),
    "31 privileges": (
        fails(
            "libc.unshare(0x10000000)",
            "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
            "libc.chroot(b'.')",
            "libc.setns(0, 0)",
            "libc.umount2(b'/tmp', 2)",
        ),
        r"\[-1, -1, -1, -1, -1\]",
    ),
    "32 limits": (tries("__import__('resource').setrlimit(9, (-1, -1))"), REFUSED),
    "33 the terminal": (
        tries("__import__('fcntl').ioctl(0, 0x5412, b'x')", "open('/dev/tty')"),
        REFUSED,
    ),
    "34 input": ("input()", "EOFError"),
    "35 descriptors of the parent": (
        "import os\nprint([n for n in range(3, 4096) if "
        "os.path.exists(f'/dev/fd/{n}')])\nos.fstat(3)",
        r"\[\].*Bad file descriptor",
    ),
    "36 rare system calls": (
        fails(*(f"libc.syscall({n}, 0, 0, 0, 0, 0)" for n in (250, 248, 321, 298, 425, 323))),
        r"\[-1, -1, -1, -1, -1, -1\]",
    ),
    "37 devices": (
        tries(*(f"open('/dev/{name}', 'rb')" for name in ("mem", "kmsg", "vda", "nvidia0"))),
        REFUSED,
    ),
    "38 sockets of the host": (
        tries(
            "socket.socket(1).connect('/var/run/docker.sock')",
            "socket.socket(1).connect('\\0canary')",
            "socket.socket(1).connect('/run/dbus/system_bus_socket')",
        ),
        REFUSED,
    ),
    "39 a forged reply": (
        """import os\nforged = b'{"text": "forged", "total": 6, "exit": 0, '
os.write(1, forged + b'"stopped": "", "clean": true}\\n')""",
        r'^\{"text": "forged"',
    ),
    "40 TCP": (
        tries(
            *(
                f"socket.create_connection({where!r}, 1)"
                for where in (("1.1.1.1", 53), ("169.254.169.254", 80), ("127.0.0.1", 22))
            )
        ),
        REFUSED,
    ),
    "41 UDP and names": (
        tries(
            "socket.socket(2, 2).sendto(b'x', ('1.1.1.1', 53))",
            "socket.getaddrinfo('example.com', 80)",
        ),
        REFUSED,
    ),
    "42 other sockets": (
        tries(
            "socket.socket(17, 3)",
            "socket.socket(16, 3)",
            "socket.socket(40, 1)",
            "socket.socket(2, 3, 1)",
        ),
        REFUSED,
    ),
    "43 a proxy": (
        "import os; os.environ['HTTP_PROXY'] = 'http://127.0.0.1:22'\n"
        + tries("__import__('urllib.request').request.urlopen('http://1.1.1.1')"),
        REFUSED,
    ),
    "43 pip": (
        "import subprocess, sys\nprint(subprocess.run([sys.executable, '-m', 'pip', 'download', "
        "'six', '--retries=0', '--timeout=1', '--disable-pip-version-check']).returncode)",
        r"(?<!\d)[1-9]\d*\s*$|not permitted",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_survived_and_the_next_call_works(box, name):
    code, told = ATTACKS[name]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0canary")
        listener.listen()
        began = time.monotonic()
        result = box.run(code, 0.5 if told == NOTHING else None)
    assert re.search(told, result.text, re.S), result
    assert "canary" not in result.text and len(result.text) < 11_000
    # 2 for a machine that does other things
    assert time.monotonic() - began < (1 if told == NOTHING else 6) + 1 + 2
    assert box.run("print(2)").text == "2\n"
    assert (
        not (ROOT / "evil").exists()
        and not os.path.exists(OUTSIDE)
        and not os.path.exists(f"{sys.prefix}/evil.pth")
    )


def test_28_29_every_call_has_a_fresh_namespace_and_scratch(box):
    box.run("import builtins; builtins.print = None; y = 5; open('random.py', 'w').write('evil')")
    # a clone under /tmp has its packages there
    here = f"[name for name in os.listdir('.') if name not in {ROOT.parts}]"
    assert (
        box.run(f"import random, os; print('y' in globals(), {here}, random.random() < 1)").text
        == "False [] True\n"
    )


def test_a_library_in_the_scratch_costs_no_new_server_and_hides_no_file(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        library = Path(folder) / "below/venv"
        library.mkdir(parents=True)
        (library / "module.py").write_text("x = 1")
        found = sandbox.libraries()
        monkeypatch.setattr(sandbox, "libraries", lambda: [*found, str(library)])
        box = Sandbox(rung="bubblewrap")
        servers = set(box.all)
        look = f"import os, glob; print(sorted(glob.glob({folder!r} + '/**', recursive=True)))"
        clean = box.run(look).text
        box.run(
            f"open({folder!r} + '/below/left', 'w').write('x'); os.makedirs({folder!r} + '/more')"
        )
        assert "left" in box.run(f"import os; open({folder!r} + '/below/left', 'w'); {look}").text
        assert box.run(look).text == clean and "module.py" in clean and servers == box.all != set()
        box.close()


def test_19_a_daemon_does_not_outlive_its_call(box):
    code = (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: "
        "os.execv('/bin/sleep', ['sleep', '77.125'])\n os._exit(0)\nprint('ok'); time.sleep(0.2)"
    )
    result = box.run(code)
    assert result.text == "ok\n" or "Operation not permitted" in result.text
    assert (box.rung == "bubblewrap") == (result.text == "ok\n")  # elsewhere it is one process
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            assert b"77.125" not in path.read_bytes()


def test_5_a_fork_bomb_is_stopped_from_outside_and_the_next_call_works(box):
    told = box.run("import os\nwhile True: os.fork()").text
    assert (
        told == "Stopped: too many processes."
        or box.rung != "bubblewrap"
        and "Operation not permitted" in told
    )
    assert box.run("print(2)").text == "2\n"
    assert (
        int(subprocess.run("ps -e | wc -l", shell=True, capture_output=True, text=True).stdout)
        < 500
    )


def test_21_many_callers_get_their_own_output(box):
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda i: box.run(f"print({i})").text, range(64)))
    assert texts == [f"{i}\n" for i in range(64)]


def test_without_any_rung_it_refuses(monkeypatch):
    monkeypatch.setattr("toolkit.sandbox.RUNGS", ())
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        Sandbox()


@pytest.mark.parametrize(
    ("kept", "total", "exit_status", "stopped", "text", "status"),
    [
        (b"abc", 3, 0, "", "abc", "ok"),
        (b"abcde", 5, 0, "", "abcde", "ok"),
        (b"abcdefgh", 20, 0, "", "abcde\n[output cut: 15 more bytes]", "ok"),
        ("ñandú".encode() * 3, 21, 0, "", "ñandú\n[output cut: 14 more bytes]", "ok"),
        (b"abc\n", 4, 1, "", "abc\n", "error"),
        (b"abc\n", 4, -11, "", "abc\n[crashed (signal 11)]", "error"),
        (b"", 0, 0, "too many files", "Stopped: too many files.", "error"),
        (b"abc", 3, -9, "the code ran longer than 1 s", "abc\n@", "timeout"),
        (b"abcdefgh", 9, -9, "the code ran longer than 1 s", "abcde\n[output cut: 4@", "timeout"),
    ],
)
def test_what_a_call_is_told_of_its_end(kept, total, exit_status, stopped, text, status):
    box = object.__new__(Sandbox)
    box.output_chars = 5
    seen = box._result(kept, total, exit_status, stopped, 0.25)
    text = text.replace("4@", "4 more bytes]\n@").replace("@", f"Stopped: {stopped}.")
    assert (seen.text, seen.status, seen.seconds) == (text, status, 0.25)
