"""A sandbox for the python tool: warm fork servers (jail.py), one call at a time in each, watched
and killed from outside. No network, no environment, no file of the host but the interpreter and its
libraries (read-only), a scratch of bounded size that is fresh for every call. The ladder, from the
top, is what this machine allows and a probe confirms:

    bubblewrap             namespaces with a file system of their own, and seccomp
    landlock+namespaces    Landlock, own namespaces, and seccomp; a call is one process
    landlock               Landlock and seccomp alone, as in many containers; a call is one process
    unsafe                 a process with limits, only where `unsafe` is set
"""

import contextlib
import functools
import hmac
import json
import math
import operator
import os
import re
import secrets
import select
import shutil
import signal
import site
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

RUNGS = ("bubblewrap", "landlock+namespaces", "landlock")
MOST_PROCESSES, MOST_THREADS = 64, 256  # of one call
MOST_SOCKETS, MOST_MAPPINGS = 256, 65_530  # of one call: what the kernel keeps for them
MOST_FILES, DEEPEST = 2000, 50  # in a scratch without a file system of its own
OWN = "RssAnon:|VmSwap:|VmPTE:"  # memory of a process: what forks share counts in each
JAIL, CALLS = (Path(__file__).with_name(x).read_text() for x in ("jail.py", "system_calls.txt"))
say_once = functools.cache(print)
CHECKOUT = Path(__file__).resolve().parents[1]


class ToolError(Exception):
    """The call cannot be answered and the model should read why."""


class ToolFault(Exception):
    """The infrastructure failed: not the model's fault, the attempt is left out of training."""


class SandboxUnavailable(RuntimeError):
    """No rung of the ladder works on this machine."""


@dataclass(frozen=True)
class Observation:
    """What a call returned. status: ok | error (the model's doing) | timeout | fault (ours)."""

    text: str
    status: str
    seconds: float


# ----------------------------------------------------------------------------- what a call can read


def libraries() -> list[str]:
    """What the interpreter needs: itself, its libraries, the system's and its programs. Never the
    checkout or the folder that we run in, wherever they lie."""
    given = ["/usr/bin", "/bin", "/usr/share/zoneinfo", "/etc/alternatives", "/etc/ld.so.cache"]
    given += [f"{top}/lib{bits}" for top in ("", "/usr") for bits in ("", "32", "64", "x32")]
    given += ["/etc/localtime", "/etc/mime.types", sys.executable, f"{sys.prefix}/pyvenv.cfg"]
    given += [f"{sys.base_prefix}/lib", *site.getsitepackages()]
    given += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    named = {path for name in given for path in (name, os.path.realpath(name))}
    found: list[str] = []
    for path in sorted(filter(os.path.exists, named), key=len):
        if not any(_below(path, parent) for parent in found):
            found += without_checkout(path)
    return found


def without_checkout(path: str) -> list[str]:
    """The path, or where the checkout or the current folder lies below it, what is beside them."""
    private = [str(CHECKOUT)]
    with contextlib.suppress(OSError):  # it may be gone
        private.append(os.getcwd())
    if not any(_below(folder, os.path.realpath(path)) for folder in private):
        return [path]
    beside = []
    for entry in sorted(os.scandir(path), key=operator.attrgetter("path")):
        real = os.path.realpath(entry)
        if os.path.exists(real) and not any(_below(f"{real}/", folder) for folder in private):
            beside += without_checkout(entry.path)
    return beside


def _below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def bubblewrap(paths: list[str], below: dict[str, str]) -> list[str]:
    """The command that gives what follows a root of its own: these paths (those of `below` also by
    another name), three devices and no /proc; for the server the right to mount, for no call."""
    command = "bwrap --unshare-all --unshare-user --die-with-parent --new-session --as-pid-1"
    command += " --clearenv --uid 65534 --gid 65534 --cap-drop ALL --cap-add CAP_SYS_ADMIN"
    command += " --dir /proc --dir /tmp --dir /dev --symlink /tmp /dev/shm"
    for name in ("null", "random", "urandom"):
        command += f" --dev-bind /dev/{name} /dev/{name}"
    arguments = command.split()
    for path in paths:
        linked = os.path.islink(path) and path.count("/") == 1  # /lib -> usr/lib
        arguments += ["--symlink", os.readlink(path)] if linked else ["--ro-bind", path]
        arguments.append(path)
    for kept, path in below.items():
        arguments += ["--ro-bind", path, kept]
    return [*arguments, *"--remount-ro / --setenv OMP_NUM_THREADS 1 --chdir / --".split()]


# ---------------------------------------------- a server, and what is seen of its call from outside


def family(pid: int) -> list[int]:
    """The newest thread (one that has ended tells nothing) of a process and of each descendant, of
    one more than a call may have at most: bombs leave no time."""
    found, left = [], [pid]
    while left and len(found) <= MOST_PROCESSES:
        with contextlib.suppress(OSError):  # it has just ended
            threads = os.listdir(f"/proc/{(here := left.pop())}/task")
            found += map(int, threads[-1:])
            for task in threads[:MOST_THREADS]:
                left += map(int, Path(f"/proc/{here}/task/{task}/children").read_text().split())
    return found


def figure(pid: int, file: str, names: str) -> int:
    """The sum of what a file in /proc has by these names; 0 where the process has just ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        text = Path(f"/proc/{pid}/{file}").read_text()
        return sum(map(int, re.findall(rf"^(?:{names})\s+(\d+)", text, re.M)))
    return 0


def divided(pids: list[int], seconds: float) -> float:
    """Bytes of their own memory, what forks share counted once; inf if not to be read in time."""
    total, deadline = 0, time.monotonic() + seconds
    with contextlib.suppress(PermissionError):
        for pid in pids:
            total += figure(pid, "smaps_rollup", "Pss_Anon:|SwapPss:") << 10
            if time.monotonic() > deadline:
                return math.inf
        return total
    return math.inf


def mapped_more(pids: list[int], most: int) -> bool:
    """Whether processes have more mappings than `most`, in the kernel's memory and in no figure."""
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb", 0) as file:
            while most >= 0 and (block := file.read(1 << 16)):
                most -= block.count(b"\n")
    return most < 0


def overfull(folder: str, most_bytes: int) -> bool:
    """Whether a folder holds more files and folders, or bytes, than it may, or goes too deep."""
    count = used = 0
    with contextlib.suppress(OSError):  # what is gone meanwhile
        for path, folders, names, fd in os.fwalk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    used += os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512
            count += len(folders) + len(names)
            deep = path.count("/") - folder.count("/") > DEEPEST
            if deep or count > MOST_FILES or used > most_bytes:
                return True
    return False


def held(pid: int, folder: str, largest: int) -> int:
    """Bytes of deleted files that a process holds open, and at most in those that it has mapped."""
    used, mapped = 0, set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            part = line.split(None, 5)
            if len(part) == 6 and part[5].startswith(folder) and part[5].endswith("(deleted)"):
                mapped.add((part[3], part[4]))
        for fd in os.listdir(f"/proc/{pid}/fd"):
            found = os.stat(f"/proc/{pid}/fd/{fd}")
            if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                used += found.st_blocks * 512
    return used + len(mapped) * largest


class _Server:
    """One warm interpreter (jail.py), which keeps a process ready for the next call."""

    def __init__(self, rung: str, memory_mb: int, scratch_mb: int, chars: int):
        self.rung, self.memory, self.disk = rung, memory_mb << 20, scratch_mb << 20
        self.keep, self.code, self.usable = 4 * chars, None, True
        self.folder = "" if rung == "bubblewrap" else tempfile.mkdtemp(prefix="python-tool-")
        self.scratch = f"{self.folder}/scratch" if self.folder else "/tmp"
        paths = libraries()
        hidden = [path for path in paths if rung == "bubblewrap" and _below(path, self.scratch)]
        below = {f"/.below/{number}": path for number, path in enumerate(hidden)}
        given = dict(rung=rung, memory_mb=memory_mb, scratch_mb=scratch_mb, scratch=self.scratch)
        given |= dict(below=below, calls=CALLS, packages=site.getsitepackages())
        given["read"] = [*paths, "/dev/random", "/dev/urandom"]
        command = bubblewrap(paths, below) if rung == "bubblewrap" else []
        command += [sys.executable, "-I", "-S", "-B", "-c", JAIL, json.dumps(given)]
        options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        options["env"] = {"OMP_NUM_THREADS": "1", "TMPDIR": self.scratch, "HOME": self.scratch}
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(command, stdin=theirs, cwd="/", **options)

    def measure(self) -> None:
        """Notes the memory that it has when it is idle, which is nobody's call."""
        pids = family(self.process.pid)
        self.idle_bytes = max(figure(pid, "status", OWN) << 10 for pid in pids)
        shared = divided(pids, 10.0)
        self.idle_divided = shared if shared < math.inf else 0.0  # nor will a call's be read

    def ready(self, seconds: float) -> None:
        """Waits until a process, fenced in, waits for code; OSError if none does."""
        self.channel.settimeout(seconds)
        message, fds, *_ = socket.recv_fds(self.channel, 100, 2, socket.MSG_CMSG_CLOEXEC)
        if message != b"ready" or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise ConnectionError("it said what none says" if message else self.last_words())
        self.code, self.out = socket.socket(fileno=fds[0]), fds[1]
        os.set_blocking(self.out, False)

    def call(self, code: str, seconds: float) -> tuple[bytes, int, int, str]:
        """Runs code: (the beginning of what it prints, bytes printed, exit status, why it was
        stopped). OSError if the server did not say how the call ended."""
        text, secret = code.encode("utf-8", "surrogatepass"), secrets.token_hex(16)
        self.kept, self.total, self.seen, self.unread = bytearray(), 0, 0, 0
        self.channel.settimeout(10.0)
        self.code.settimeout(10.0)
        self.channel.send(secret.encode())
        self.code.sendall(len(text).to_bytes(8, sys.byteorder) + text)
        if stopped := self._watch(seconds):
            self.channel.send(b"stop")
        self.usable = _readable(self.channel, 1.0)
        status = self._report(secret) if self.usable or not stopped else 0
        while self.usable and self.total <= 16 * self.keep and self._read():
            pass
        self.let_go()
        return bytes(self.kept), self.total, status, stopped

    def _watch(self, seconds: float) -> str:
        """Reads what a call prints until its server speaks (""), or it must be stopped: why."""
        began = looked = time.monotonic()
        poller, said = select.poll(), self.channel.fileno()
        poller.register(said, select.POLLIN)
        poller.register(self.out, select.POLLIN)
        while said not in (ready := [fd for fd, _ in poller.poll(20)]):
            if ready and not self._read():
                poller.unregister(self.out)
            now = time.monotonic()
            if self.total > 16 * self.keep:
                return "it printed too much"
            if now - began > seconds:
                return f"the code ran longer than {seconds:g} s"
            if now - looked > 0.04:
                if why := self.overgrown():
                    return why
                looked = time.monotonic()
        return ""

    def _read(self) -> bool:
        """Takes what there is of the output; whether there can be more."""
        try:
            data = os.read(self.out, 1 << 16)
        except BlockingIOError:
            return False
        self.total += len(data)
        self.kept += data[: max(0, self.keep - len(self.kept))]
        return bool(data)

    def _report(self, secret: str) -> int:
        """The exit status of the call, from whom knows its secret."""
        self.channel.settimeout(0.0)
        if not (message := self.channel.recv(4096)):
            raise ConnectionError(self.last_words())
        with contextlib.suppress(ValueError, RecursionError):
            report = json.loads(message)
            if isinstance(report, dict) and report.keys() == {"secret", "exit"}:
                right = hmac.compare_digest(str(report["secret"]).encode(), secret.encode())
                if right and type(report["exit"]) is int:
                    return report["exit"]
        raise ConnectionError("it said what none says")

    def overgrown(self) -> str:
        """What a call has too much of, or "": limits of a process bind neither family nor root."""
        pids = family(self.process.pid)
        if len(pids) > MOST_PROCESSES:
            return "too many processes"
        if sum(figure(pid, "status", "Threads:") for pid in pids) > MOST_THREADS:
            return "too many threads"
        sizes = [figure(pid, "status", OWN) << 10 for pid in pids]
        grown = sum(max(0, size - self.idle_bytes) for size in sizes)
        used, settled, self.seen = 0.0, len(pids) <= self.seen, len(pids)
        # takes long, in a fork bomb too long: done when their number does not grow, and may fail
        if settled and sum(sizes) > self.memory:
            used = divided(pids, 0.25) - self.idle_divided
            self.unread = self.unread + 1 if used == math.inf else 0
        if grown > self.memory or self.memory < used < math.inf or self.unread > 3:
            return f"its processes use more than {self.memory >> 20} MB of memory"
        if settled and len(pids) > 4 and mapped_more(pids, MOST_MAPPINGS):
            return "too many mappings of memory"
        if self.rung == "bubblewrap" and len(pids) > 1:  # the first is bwrap, outside
            if figure(pids[1], "net/sockstat", "sockets: used") > MOST_SOCKETS:
                return "too many sockets"
        if self.rung in ("landlock", "unsafe"):  # no file system of its own
            hidden = sum(held(pid, self.scratch, self.disk // 4) for pid in pids)
            if hidden > self.disk or overfull(self.scratch, self.disk - hidden):
                return "too many or too large files"
        return ""

    def last_words(self) -> str:
        self.kill()
        lines = self.process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it ended"

    def let_go(self) -> None:
        """Closes the ends of the pipes of a call."""
        if self.code:
            self.code.close()
            os.close(self.out)
        self.code = None

    def kill(self) -> None:
        """Returns when no process of the server or its call is there."""
        if self.process.poll() is None:  # else its number may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.channel.settimeout(10.0)
        with contextlib.suppress(OSError):  # the end is open while one of them lives
            while self.channel.recv(4096):
                pass

    def put_away(self) -> None:
        self.kill()
        self.let_go()
        self.channel.close()
        self.process.stderr.close()
        if self.folder:
            remove = 'rm -rf "$0" || { chmod -R u+rwX "$0"; rm -rf "$0"; }'  # closed folders
            subprocess.run(["sh", "-c", remove, self.folder], stderr=subprocess.DEVNULL)


def _readable(source, seconds: float) -> bool:
    poller = select.poll()
    poller.register(source, select.POLLIN)
    return bool(poller.poll(1000 * seconds))


class Sandbox:
    """Runs code from any thread. `rung`: the one to use, or the first of the ladder that works."""

    def __init__(
        self, seconds=30, output_chars=10_000, memory_mb=2048, scratch_mb=64, unsafe=False, rung=""
    ):
        self.seconds, self.output_chars = seconds, output_chars
        self.sizes = (memory_mb, scratch_mb, output_chars)
        self.all, self.idle, self.closed = set(), deque(), False
        self.most = max(2, os.cpu_count() or 2)
        self.room = threading.Semaphore(self.most)
        # Servers die with the thread that started them (PR_SET_PDEATHSIG): they need one that stays
        self.starter = ThreadPoolExecutor(1, "python tool")
        self.cleaner = ThreadPoolExecutor(1, "python tool, cleaning")
        # also where close() was forgotten
        weakref.finalize(self, lambda servers: [each.put_away() for each in servers], self.all)
        reasons = []
        for self.rung in [rung] if rung else RUNGS:
            try:
                self._probe()
                break
            except SandboxUnavailable as error:
                reasons.append(f"{self.rung}: {error}")
                self.idle.clear()
                self._drop(*self.all)
        else:
            if not unsafe:
                self.close()
                raise SandboxUnavailable(remedy(reasons))
            self.rung = "unsafe"
        why = f" ({'; '.join(reasons)})" if reasons else ""
        say_once(f"python tool: {self.rung}{why}", file=sys.stderr)

    def _probe(self) -> None:
        """The canary must print, reach no listener of ours, and neither read nor change a file: one
        in the temporary folder, one beside the project's, and the project's."""
        if self.rung == "bubblewrap" and not shutil.which("bwrap"):
            raise SandboxUnavailable("it is not installed")
        needed, planted = set(libraries()), []  # needed: of an environment in the checkout
        own = sorted(str(path) for path in CHECKOUT.iterdir() if path.is_file())
        own = [path for path in own if path not in needed][:100] + [os.path.realpath(__file__)]
        with contextlib.ExitStack() as stack:
            tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            udp.bind(("127.0.0.1", 0))
            for folder in (tempfile.gettempdir(), str(CHECKOUT)):
                with contextlib.suppress(OSError):  # we may not write there
                    file = tempfile.NamedTemporaryFile("w", dir=folder, prefix=".canary-")
                    stack.enter_context(file).write("secret")
                    file.flush()
                    planted.append(file.name)
            ports = tcp.getsockname()[1], udp.getsockname()[1]
            result = self.run(CANARY % (*ports, planted + own), 60.0)
            heard = any(_readable(listener, 0.01) for listener in (tcp, udp))
            changed = any(Path(path).read_text() != "secret" for path in planted)
        if result.status == "fault":
            raise SandboxUnavailable(result.text.partition(": ")[2])
        if result.text != "alive\n" or heard or changed:
            told = f"{result.status}: {result.text[-300:]}"
            raise SandboxUnavailable(f"it does not isolate here ({told})")

    def run(self, code: str, seconds: float | None = None) -> Observation:
        """What `code` prints, run afresh, and the value of its last expression or a traceback."""
        seconds = seconds or self.seconds
        with self.room:
            server, began = None, time.monotonic()
            try:
                server = self._take()
                began = time.monotonic()
                reply = server.call(code, seconds)
            except OSError as error:
                if server:
                    self._drop(server)
                text = f"The sandbox {'failed' if server else 'does not start'}: {error}"
                return Observation(text, "fault", time.monotonic() - began)
            spent = time.monotonic() - began
            if server.usable:
                self.idle.append(server)
            else:
                self._drop(server)
        return self._result(*reply, spent)

    def _result(self, kept: bytes, total, exit_status, stopped: str, spent) -> Observation:
        whole = kept.decode("utf-8", "replace")
        text, notes = whole[: self.output_chars], []
        if total > len(text.encode()) and len(whole) > len(text):
            notes.append(f"[output cut: {total - len(text.encode()):,} more bytes]")
        if stopped:
            notes.append(f"Stopped: {stopped}.")
        elif exit_status < 0:
            notes.append(f"[crashed (signal {-exit_status})]")
        if notes:
            text = "\n".join([text.removesuffix("\n")] * bool(text) + notes)
        status = "error" if stopped or exit_status else "ok"
        return Observation(text, "timeout" if "ran longer" in stopped else status, spent)

    def _take(self) -> _Server:
        """A server that is ready: the one that has been idle for longest, or a new one."""
        with contextlib.suppress(IndexError):  # none is idle
            while server := self.idle.popleft():
                try:
                    server.ready(5.0)
                    return server
                except OSError:
                    self._drop(server)
        if self.closed:
            raise ConnectionError("it is closed")
        server = self.starter.submit(_Server, self.rung, *self.sizes).result()
        self.all.add(server)
        try:
            server.ready(60.0)
            server.measure()
        except BaseException:
            self._drop(server)
            raise
        return server

    def _drop(self, *servers: _Server) -> None:
        """Puts servers away, in their own time and not in that of a call."""
        self.all.difference_update(servers)
        for server in servers:
            self.cleaner.submit(server.put_away)

    def close(self) -> None:
        """Ends the calls in flight; returns when nothing of the sandbox is left."""
        self.closed = True
        for server in list(self.all):
            server.process.kill()  # whoever uses it puts it away
        for _ in range(self.most):
            self.room.acquire()
        self.idle.clear()
        self._drop(*self.all)
        self.cleaner.shutdown()
        self.starter.shutdown()
        self.room.release(self.most)


CANARY = """
import os, socket
def refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError:
        return True
def send(port):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", port))
refused(socket.create_connection, ("127.0.0.1", %d), 1)
refused(send, %d)
if all(refused(open, path, mode) for path in %r for mode in ("r", "r+")):
    print("alive")
"""


# what may forbid user namespaces: the value at which it does not
SWITCHES = "kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 "
SWITCHES = (SWITCHES + "user.max_user_namespaces=15000").split()


def remedy(reasons: list[str]) -> str:
    """What to install or enable where no rung works, in a sentence."""
    wrong = []
    for setting in SWITCHES:
        name, _, opened = setting.partition("=")
        with contextlib.suppress(OSError):
            value = Path("/proc/sys", name.replace(".", "/")).read_text().strip()
            wrong += [f"sysctl -w {setting}"] if value == str(int(opened == "0")) else []
    allow = " and ".join(wrong) or f"sysctl -w {SWITCHES[-1]}, in a container its profile"
    told = f"no sandbox for the python tool works here ({'; '.join(reasons)}): apt-get install"
    told += f" bubblewrap and allow user namespaces ({allow})"
    return f"{told}, or set unsafe_python to do without"
