"""A sandbox for the python tool: a warm fork server in bubblewrap, one call at a time in each, killed from outside.

No network, no environment, no file of the host but the interpreter and its libraries (read-only), a scratch folder of
bounded size that is fresh for every call. Without bubblewrap the sandbox refuses to start, unless `unsafe` is set.

    python sandbox.py 'print(1 + 1)'
"""

import json
import os
import queue
import select
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SERVER = r'''
import ast, contextlib, json, os, resource, select, shutil, signal, sys, traceback
try:
    import numpy, sympy
except ImportError:
    numpy = sympy = None
MEMORY, SCRATCH, CHARS = (int(x) for x in sys.argv[1:4])

def child(code, out):
    os.dup2(out, 1); os.dup2(out, 2)
    os.close(0); os.open(os.devnull, os.O_RDONLY)
    os.closerange(3, 4096)
    for limit, value in ((resource.RLIMIT_AS, MEMORY << 20), (resource.RLIMIT_FSIZE, SCRATCH << 20),
                         (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256), (resource.RLIMIT_NPROC, 64)):
        resource.setrlimit(limit, (value, value))
    os.chdir("/tmp"); sys.path[0] = "/tmp"
    scope = {"__name__": "__main__"}
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), scope)
            if value is not None:
                print(repr(value))
        code = 0
    except SystemExit as stop:
        code = 0 if not stop.code else 1
    except BaseException:
        kind, value, trace = sys.exc_info()
        traceback.print_exception(kind, value, trace.tb_next if trace.tb_next else None)
        code = 1
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)

def clear():
    for name in os.listdir("/tmp"):
        path = os.path.join("/tmp", name)
        shutil.rmtree(path, True) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)

def send(**reply):
    os.write(1, (json.dumps(reply) + "\n").encode())

send(ready=True)
for line in sys.stdin:
    code = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        child(code, write)
    os.close(write)
    text, total = b"", 0
    ended = False
    while True:
        ready = select.select([read], [], [], 0 if ended else 0.005)[0]
        data = os.read(read, 65536) if ready else b""
        if ready and not data or ended and not ready:
            break
        total += len(data)
        text += data[: max(0, 4 * CHARS - len(text))]
        if total > 64 * CHARS:
            os.kill(pid, signal.SIGKILL)
            break
        ended = ended or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ProcessLookupError):  # nobody was left
        os.kill(-1, signal.SIGKILL)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    clear()
    send(text=text.decode("utf-8", "replace"), total=total, exit=os.waitstatus_to_exitcode(status))
'''


MOST_PROCESSES = 128  # of one call


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


class _Server:
    """One warm interpreter; it dies with its pid namespace."""

    def __init__(self, command: list[str]):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env={}, bufsize=0)
        self.buffer = b""

    def receive(self, seconds: float) -> dict | None:
        """The next reply, or None after `seconds`; EOFError if the server died."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or self.crowd() > MOST_PROCESSES:
                return None
            if not select.select([self.process.stdout], [], [], min(left, 0.05))[0]:
                continue
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def crowd(self) -> int:
        """Processes in the sandbox, read from outside: RLIMIT_NPROC does nothing for uid 0."""
        try:
            inside = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            return sum(name.isdigit() for name in os.listdir(f"/proc/{inside[0]}/root/proc")) if inside else 0
        except OSError:  # it is just starting or ending
            return 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Sandbox:
    """Runs code from any thread. `rung` is bubblewrap, or "unsafe" (no isolation) where that was asked for."""

    def __init__(self, *, seconds=30.0, output_chars=10_000, memory_mb=2048, scratch_mb=64, unsafe=False, rung=None):
        self.seconds, self.output_chars = seconds, output_chars
        self.rung = rung or ("bubblewrap" if shutil.which("bwrap") else "unsafe" if unsafe else None)
        if self.rung is None:
            raise SandboxUnavailable("no sandbox for the python tool: apt-get install bubblewrap (or set unsafe_python)")
        python = [sys.executable, "-I", "-c", SERVER, str(memory_mb), str(scratch_mb), str(output_chars)]
        self.command = (self._bubblewrap(scratch_mb) if self.rung == "bubblewrap" else []) + python
        self.idle: queue.LifoQueue = queue.LifoQueue()
        self.lock, self.all = threading.Lock(), set()
        self.room = threading.Semaphore(max(2, os.cpu_count() or 2))
        if self.rung == "bubblewrap":
            self._probe()
        print(f"python tool: {self.rung}", file=sys.stderr)

    def _bubblewrap(self, scratch_mb: int) -> list[str]:
        roots = {Path(p).resolve() for p in ("/usr", sys.prefix, sys.base_prefix)}
        command = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv",
                   "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev",
                   "--size", str(1 << 20), "--tmpfs", "/dev/shm", "--size", str(scratch_mb << 20), "--tmpfs", "/tmp"]
        for name in ("/lib", "/lib64", "/bin"):
            command += ["--ro-bind-try", name, name]
        for root in sorted(roots, key=lambda p: len(p.parts)):
            command += ["--ro-bind", str(root), str(root)]
        if Path(sys.prefix) not in roots:
            command += ["--ro-bind", sys.prefix, sys.prefix]
        return [*command, "--setenv", "OMP_NUM_THREADS", "1", "--chdir", "/tmp", "--"]

    def _probe(self) -> None:
        """The canary: it must print, must not reach the network and must not read a file outside."""
        outside = str(Path(__file__).resolve())
        code = (f"import os, socket\ns = socket.socket()\ns.settimeout(1)\n"
                f"print('alive', s.connect_ex(('1.1.1.1', 53)) != 0, not os.path.exists({outside!r}))")
        result = self.run(code, 60.0)
        if result.text.strip() != "alive True True":
            raise SandboxUnavailable(f"bubblewrap does not isolate on this machine ({result.status}: {result.text[-300:]})")

    def run(self, code: str, seconds: float | None = None) -> Result:
        """Runs `code` in a fresh namespace: what it printed, the value of the last expression, or the traceback."""
        seconds = seconds or self.seconds
        with self.room:
            began = time.monotonic()
            for _ in range(2):
                try:
                    server = self._take()
                    server.process.stdin.write((json.dumps(code) + "\n").encode())
                    reply = server.receive(seconds)
                    break
                except (EOFError, BrokenPipeError):
                    self._drop(server)
            else:
                return Result("The sandbox does not start.", "fault", time.monotonic() - began)
            spent = time.monotonic() - began
            if reply is None:
                self._drop(server)
                why = f"the code ran longer than {seconds:g} s" if spent >= seconds else "too many processes"
                return Result(f"Stopped: {why}.", "timeout" if spent >= seconds else "error", spent)
            self.idle.put(server)
        return self._result(reply, spent)

    def _result(self, reply: dict, spent: float) -> Result:
        text, cut = reply["text"][: self.output_chars], reply["total"] - self.output_chars
        if cut > 0:
            text += f"\n[output cut: {cut:,} more bytes]"
        if reply["exit"] < 0:
            text += f"\n[crashed (signal {-reply['exit']})]"
        return Result(text, "ok" if reply["exit"] == 0 else "error", spent)

    def _take(self) -> _Server:
        try:
            return self.idle.get_nowait()
        except queue.Empty:
            server = _Server(self.command)
            with self.lock:
                self.all.add(server)
            if server.receive(60.0) is None:
                raise EOFError from None
            return server

    def _drop(self, server: _Server) -> None:
        server.kill()
        with self.lock:
            self.all.discard(server)

    def close(self) -> None:
        for server in list(self.all):
            self._drop(server)


if __name__ == "__main__":
    ran = Sandbox().run(sys.argv[1])
    print(ran.text)
    sys.exit(ran.status != "ok")
