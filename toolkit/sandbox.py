"""A sandbox for the python tool: warm fork servers (jail.py), one call at a time in each, watched
and killed from outside.

No network, no environment, no file of the host but the interpreter and its libraries (read-only), a
scratch folder of bounded size that is fresh for every call. The ladder, from the top, is what this
machine allows and a probe confirms:

    bubblewrap             namespaces with a file system of their own, and seccomp
    landlock+namespaces    Landlock, own namespaces, and seccomp; a call is one process
    landlock               Landlock and seccomp alone, as in many containers; a call is one process
    unsafe                 a process with limits, only where `unsafe` is set

    python sandbox.py 'print(1 + 1)' [rung]
"""

import contextlib
import functools
import json
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

RUNGS = ("bubblewrap", "landlock+namespaces", "landlock")
MOST_PROCESSES = 128  # of one call
JAIL = Path(__file__).with_name("jail.py").read_text()


class ToolError(Exception):
    """The call cannot be answered and the model should read why."""


class ToolFault(Exception):
    """The infrastructure failed: not the model's fault, the attempt is left out of training."""


class SandboxUnavailable(RuntimeError):
    """No rung of the ladder works on this machine."""


@dataclass(frozen=True)
class Result:
    """What a run printed; status: ok | error | timeout | fault."""

    text: str
    status: str
    seconds: float


class Crowded(Exception):
    """A call has more processes or memory than it may."""


def libraries() -> list[str]:
    """Folders that the interpreter needs: the system's, its own and that of its virtual
    environment.
    """
    given = ["/usr", "/lib", "/lib64", "/bin", sys.prefix, sys.base_prefix, sys.exec_prefix]
    return sorted(
        {path for name in given for path in (name, os.path.realpath(name)) if os.path.isdir(path)},
        key=len,
    )


class _Server:
    """One warm interpreter (jail.py) and its scratch."""

    def __init__(self, rung: str, memory_mb: int, scratch_mb: int, chars: int):
        self.memory, self.buffer = memory_mb << 20, b""
        self.folder = "" if rung == "bubblewrap" else tempfile.mkdtemp(prefix="python-tool-")
        given = {
            "rung": rung,
            "memory_mb": memory_mb,
            "scratch_mb": scratch_mb,
            "chars": chars,
            "scratch": self.folder or "/tmp",
        }
        given["read"] = [
            *libraries(),
            "/dev/urandom",
            "/dev/zero",
            "/etc/localtime",
            "/etc/mime.types",
        ]
        command = [sys.executable, "-I", "-B", "-c", JAIL, json.dumps(given)]
        if rung == "bubblewrap":
            command = bubblewrap(scratch_mb) + command
        environment = (
            {"OMP_NUM_THREADS": "1", "TMPDIR": self.folder, "HOME": self.folder}
            if self.folder
            else {}
        )
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )
        self.idle_bytes = 0

    def receive(self, seconds: float) -> dict:
        """The next reply; TimeoutError after `seconds`, EOFError if the server died, Crowded if its
        call grew too large.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not select.select([self.process.stdout], [], [], min(left, 0.05))[0]:
                self.look()
                continue
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def look(self) -> None:
        """Raises Crowded. Seen from outside: limits of a process do not bound a family, nor
        RLIMIT_NPROC those of root.
        """
        sizes = family(self.process.pid)
        if len(sizes) > MOST_PROCESSES:
            raise Crowded("too many processes")
        if self.idle_bytes and sum(max(0, size - self.idle_bytes) for size in sizes) > self.memory:
            raise Crowded(f"its processes use more than {self.memory >> 20} MB of memory")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            if os.path.exists(self.folder):  # closed or very deep folders
                subprocess.run(
                    ["chmod", "-R", "u+rwX", self.folder], stderr=subprocess.DEVNULL, check=False
                )
                subprocess.run(["rm", "-rf", self.folder], stderr=subprocess.DEVNULL, check=False)


def family(pid: int) -> list[int]:
    """Bytes of memory of its own of a process and of each of its descendants, up to one more than
    MOST_PROCESSES.
    """
    sizes, left, page = [], [pid], os.sysconf("SC_PAGE_SIZE")
    while left and len(sizes) <= MOST_PROCESSES:
        here = left.pop()
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            resident, shared = Path(f"/proc/{here}/statm").read_text().split()[1:3]
            sizes.append((int(resident) - int(shared)) * page)
            for task in os.listdir(f"/proc/{here}/task"):
                left += map(int, Path(f"/proc/{here}/task/{task}/children").read_text().split())
    return sizes


def bubblewrap(scratch_mb: int) -> list[str]:
    """The command that gives what follows it a root of its own: libraries, /proc, a few devices,
    and a bounded /tmp.
    """
    command = [
        "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--cap-drop",
        "ALL",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--size",
        str(1 << 20),
        "--tmpfs",
        "/dev/shm",
        "--size",
        str(scratch_mb << 20),
        "--tmpfs",
        "/tmp",
    ]
    for path in libraries():
        if os.path.islink(path) and path.count("/") == 1:  # /lib -> usr/lib
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    return [
        *command,
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--setenv",
        "OMP_NUM_THREADS",
        "1",
        "--chdir",
        "/tmp",
        "--",
    ]


class Sandbox:
    """Runs code from any thread. `rung`: the one to use; by default the first of the ladder that
    works.
    """

    def __init__(
        self,
        *,
        seconds=30.0,
        output_chars=10_000,
        memory_mb=2048,
        scratch_mb=64,
        unsafe=False,
        rung="",
    ):
        self.seconds, self.output_chars = seconds, output_chars
        self.sizes = (memory_mb, scratch_mb, output_chars)
        self.lock, self.all, self.room = (
            threading.Lock(),
            set(),
            threading.Semaphore(max(2, os.cpu_count() or 2)),
        )
        # Servers die with the thread that started them (PR_SET_PDEATHSIG): they need one that stays
        self.starter = ThreadPoolExecutor(1, "python tool")
        reasons = []
        for self.rung in [rung] if rung else RUNGS:
            self.idle: queue.LifoQueue = queue.LifoQueue()
            try:
                self._probe()
                break
            except SandboxUnavailable as error:
                reasons.append(f"{self.rung}: {error}")
                self.close()
        else:
            if not unsafe:
                why = "; ".join(reasons)
                raise SandboxUnavailable(
                    "no sandbox for the python tool: apt-get install bubblewrap (or set "
                    f"unsafe_python). {why}"
                )
            self.rung = "unsafe"
        _tell(self.rung, "; ".join(reasons))

    def _probe(self) -> None:
        """The canary: it must print, must not reach a listener of ours, and must not read or change
        a file outside.
        """
        if self.rung == "unsafe":
            return
        if self.rung == "bubblewrap" and not shutil.which("bwrap"):
            raise SandboxUnavailable("it is not installed")
        tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        with tcp, udp, tempfile.NamedTemporaryFile("w") as outside:
            outside.write("secret")
            outside.flush()
            udp.bind(("127.0.0.1", 0))
            tcp.settimeout(0.01)
            udp.settimeout(0.01)
            result = self.run(
                CANARY % (tcp.getsockname()[1], udp.getsockname()[1], outside.name), 60.0
            )
            heard = _hears(tcp.accept) or _hears(lambda: udp.recv(9))
            if result.text != "alive\n" or heard or Path(outside.name).read_text() != "secret":
                raise SandboxUnavailable(
                    f"it does not isolate here ({result.status}: {result.text[-300:]})"
                )

    def run(self, code: str, seconds: float | None = None) -> Result:
        """Runs `code` in a fresh namespace: what it printed, the value of the last expression, or
        the traceback.
        """
        seconds = seconds or self.seconds
        with self.room:
            began = time.monotonic()
            try:
                server = self._take()
            except (EOFError, TimeoutError, OSError) as error:
                return Result(
                    f"The sandbox does not start: {type(error).__name__} {error}",
                    "fault",
                    time.monotonic() - began,
                )
            try:
                server.process.stdin.write(
                    (json.dumps({"code": code, "seconds": seconds}) + "\n").encode()
                )
                reply = server.receive(
                    seconds + 1.0
                )  # the server keeps the time; this is for one that the code stopped
            except (EOFError, BrokenPipeError):
                reply = {"stopped": "it broke the interpreter that it ran in"}
            except Crowded as error:
                reply = {"stopped": str(error)}
            except TimeoutError:
                reply = {"stopped": f"the code ran longer than {seconds:g} s"}
            spent = time.monotonic() - began
            if reply.get("clean"):
                self.idle.put(server)
            else:
                self._drop(server)
        return self._result(reply, spent)

    def _result(self, reply: dict, spent: float) -> Result:
        whole = reply.get("text", "")
        text = whole[: self.output_chars]
        cut = reply.get("total", 0) - len(text.encode())
        stopped, crash = reply["stopped"], reply.get("exit", 0)
        notes = [f"[output cut: {cut:,} more bytes]"] if cut > 0 and len(whole) > len(text) else []
        notes += [f"Stopped: {stopped}."] if stopped else []
        notes += [f"[crashed (signal {-crash})]"] if crash < 0 and not stopped else []
        if notes:
            text = "\n".join([text.removesuffix("\n")] * bool(text) + notes)
        status = "timeout" if "ran longer" in stopped else "error" if stopped or crash else "ok"
        return Result(text, status, spent)

    def _take(self) -> _Server:
        with contextlib.suppress(queue.Empty):
            while (server := self.idle.get_nowait()).process.poll() is not None:
                self._drop(server)
            return server
        server = self.starter.submit(_Server, self.rung, *self.sizes).result()
        with self.lock:
            self.all.add(server)
        try:
            server.receive(60.0)
        except (EOFError, TimeoutError, Crowded):
            self._drop(server)
            raise EOFError from None
        server.idle_bytes = max(family(server.process.pid), default=0)
        return server

    def _drop(self, server: _Server) -> None:
        server.kill()
        with self.lock:
            self.all.discard(server)

    def close(self) -> None:
        for server in list(self.all):
            self._drop(server)


CANARY = """
import os, socket
try:
    socket.create_connection(("127.0.0.1", %d), 1)
except OSError:
    pass
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", %d))
except OSError:
    pass
try:
    print(open(%r, "r+").write("changed"))
except OSError:
    print("alive")
"""


def _hears(listen) -> bool:
    try:
        listen()
    except TimeoutError:
        return False
    return True


@functools.cache
def _tell(rung: str, reasons: str) -> None:
    print(f"python tool: {rung}" + (f" ({reasons})" if reasons else ""), file=sys.stderr)


if __name__ == "__main__":
    ran = Sandbox(rung=sys.argv[2] if len(sys.argv) > 2 else "").run(sys.argv[1])
    print(ran.text)
    sys.exit(ran.status != "ok")
