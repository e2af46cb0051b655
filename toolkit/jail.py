"""What the python tool's code runs in: the fences that a process puts around itself, and the warm
server that forks calls. sandbox.py starts this file, inside bubblewrap where that is to be had.
Linux, x86_64 and aarch64; by ctypes and the standard library alone. Facts are from landlock(7),
seccomp(2), pid_namespaces(7) and the kernel's tables of system calls.

The server never sees code or output: they go between the caller and a call's own process, so that
no call finds another's in the memory that it inherits. Before its code arrives that process has
- a scratch of its own: a file system that is taken down after the call (where mounts are allowed);
- in bubblewrap a pid namespace of its own, which ends with the call, and no /proc. Elsewhere a call
  is one process (threads, but no fork): nothing outlives it, and it may signal itself only;
- only the system calls of system_calls.txt. None of them reaches the scheduling, IPC or owners of
  what is outside, and locks on files are make-believe: they would hold up the host's own files.
"""

import ast
import contextlib
import ctypes
import fcntl
import gc
import json
import linecache
import os
import platform
import resource
import select
import selectors
import signal
import site
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import types

GIVEN = json.loads(sys.argv[1])  # by sandbox.py
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
ARM = platform.machine() == "aarch64"
MOST_FILES = 5000  # in a scratch: empty ones take no quota, but the kernel's memory, and our time
MOST_THREADS, MOST_STARTED = 256, 4096  # of a call: at a time for a user but root, in all
CLONE_VM, CLONE_FILES, CLONE_THREAD, NEW_MOUNTS, NEW_IPC = 0x100, 0x400, 0x10000, 0x20000, 1 << 27
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MS_BIND, MS_READ_ONLY, MS_PRIVATE, MS_NOSUID_NODEV, MNT_DETACH = 0x1000, 0x1021, 0x44000, 6, 2


def checked(result: int, what: str) -> int:
    """A system call's result; OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


# ------------------------------------------------- seccomp: the system calls that the code may make


def numbers(verdict: str) -> dict[str, int]:
    """The numbers on this machine of the calls with a verdict in system_calls.txt."""
    rows = (row.split() for row in GIVEN["calls"].splitlines() if row[0] != "#")
    found = {name: both[ARM] for name, *both, what in rows if what == verdict}
    return {name: int(number) for name, number in found.items() if number != "-"}


ALLOWED, PRETENDED, RULED = map(numbers, ("allow", "pretend", "rule"))
FIRST_UNKNOWN = 463  # what kernels after Linux 6.12 added is not there
METADATA = list(RULED)[list(RULED).index("fchmod") :] + ["chmod", "utime", "utimes"]
EPERM, EAGAIN, ENOTTY, ENOSYS, EOPNOTSUPP = 1, 11, 25, 38, 95
DONE = 0  # the call does nothing and says that it succeeded
AF_UNIX, SOCK_STREAM, O_TRUNC_ONLY, MADV_COLD, MADV_PAGEOUT = 1, 1, 0o1003, 20, 21
OWN = 0x7FFFFFF1  # stands in a filter for the process that puts it on
# new namespaces, and CLONE_PARENT: a child of the server's that the server does not know
CLONE_NEVER = 0x7E020080 | 0x8000
SHARED_ANONYMOUS, HUGE_PAGES = 0x21, 0x40000  # of mmap: memory that no process is charged with
# F_SETLK and F_SETLKW in both forms | duplicates, flags, F_GETLK: no leases, owners, signals, sizes
LOCKS, FCNTL = [6, 7, 37, 38], [0, 1, 2, 3, 4, 5, 36, 1030, 1032]
IOCTL = [0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451]  # is it a terminal, FIONREAD, FIOCLEX, …
PRCTL = [3, 15, 16, 23, 38, 39, 0x53564D41]  # names, no_new_privs and what only asks
FUTEX = [6, 7, 8, 11, 12, 13]  # with an owner, who may be any process: it inherits the priority
CLOCKS, OF_OTHERS = "clock_gettime clock_getres clock_nanosleep timer_create".split(), 1 << 31
SOCKET_OPTIONS = [2, 9, 13, 16, 20, 21]  # not the sizes of buffers, which are nobody's memory


def instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value & 0xFFFFFFFF)


# BPF: words at offsets of struct seccomp_data
LOAD, AND, EQUAL, ABOVE, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, NOTIFY, ERROR, KILL = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
SECCOMP_NUMBER, NEW_LISTENER = (277, 8) if ARM else (317, 8)
NOTICE_RECEIVE, NOTICE_SEND, NOTICE_CONTINUE = 0xC0502100, 0xC0182101, 1


def rule(name: str, error=EPERM, argument=0, *, among=(), but=(), mask=0xFFFFFFFF) -> bytes:
    """Answers with `error`: always, or if (argument & mask) is `among` values, or not one `but`."""
    if name not in RULED:
        return b""
    body, values = instruction(RETURN, ERROR | error), among or but or []
    if values:
        tests = [instruction(LOAD, 16 + 8 * argument), instruction(AND, mask)]
        for left, value in zip(range(len(values), 0, -1), values):
            # a hit jumps behind the other tests: to the refusal, or over it
            over, miss = left - 1 + bool(but), int(left == 1 and not but)
            tests.append(instruction(EQUAL, value, over, miss))
        body = b"".join(tests) + body + instruction(LOAD, 0)
    return instruction(EQUAL, RULED[name], 0, len(body) // 8) + body


def common_rules() -> list[bytes]:
    """For every call: no leases, owners or locks on files, no memory that is nobody's, no
    namespaces, no timers of others, only sockets that end with the processes that hold them."""
    return [
        rule("clone3", ENOSYS),  # glibc then uses clone, whose flags can be read
        rule("openat2", ENOSYS),
        rule("prlimit64", EPERM, 0, but=[0]),
        rule("prlimit64", EPERM, 1, among=[resource.RLIMIT_CORE]),
        rule("fcntl", DONE, 1, among=LOCKS),
        rule("fcntl", EPERM, 1, but=FCNTL),
        rule("ioctl", ENOTTY, 1, but=IOCTL),
        rule("prctl", EPERM, 0, but=PRCTL),
        rule("mmap", EPERM, 3, among=[SHARED_ANONYMOUS], mask=SHARED_ANONYMOUS),
        rule("mmap", EPERM, 3, among=[HUGE_PAGES], mask=HUGE_PAGES),
        rule("madvise", EPERM, 2, among=[MADV_COLD, MADV_PAGEOUT]),
        rule("futex", ENOSYS, 1, among=FUTEX, mask=0x7F),
        *(rule(name, EPERM, 0, among=[OF_OTHERS], mask=OF_OTHERS) for name in CLOCKS),
        rule("clone", EPERM, 0, but=[0], mask=CLONE_NEVER),
        rule("socket", EPERM, 0, but=[AF_UNIX]),
        rule("socketpair", EPERM, 0, but=[AF_UNIX]),
        rule("setsockopt", EPERM, 2, but=SOCKET_OPTIONS),
    ]


def lone_rules() -> list[bytes]:
    """For a call beside the host's processes and under its file system: what Landlock does not know
    (owners, modes, times, sockets with a path; when new, signals and truncation). Changes of mode
    and time are made believe, so that shutil.copy works; the others are refused."""
    return [
        *map(rule, "fork vfork setsid setpgid socket connect bind truncate".split()),
        # all descriptors and folders are for its watcher to see
        rule("clone", EPERM, 0, but=[CLONE_THREAD | CLONE_FILES], mask=CLONE_THREAD | CLONE_FILES),
        rule("mkdir", EPERM, 1, but=[0o700], mask=0o700),
        rule("mkdirat", EPERM, 2, but=[0o700], mask=0o700),
        rule("socketpair", EPERM, 1, but=[SOCK_STREAM], mask=0xF),
        rule("fallocate", EOPNOTSUPP),  # it can pass the limit of a file's size
        rule("open", EPERM, 1, among=[0o1000], mask=O_TRUNC_ONLY),
        rule("openat", EPERM, 2, among=[0o1000], mask=O_TRUNC_ONLY),
        *(rule(name, EPERM, 0, but=[OWN]) for name in ("kill", "tgkill")),
        *(rule(name, EPERM if "chown" in name else DONE) for name in METADATA),
    ]


class Filter:
    """A program in memory; what is forked from us need not make it again."""

    def __init__(self, instructions: list[bytes]):
        program, own = b"".join(instructions), struct.pack("=I", OWN)
        self.code = ctypes.create_string_buffer(program)
        self.header = struct.pack("@HP", len(program) // 8, ctypes.addressof(self.code))
        self.own = [at for at in range(4, len(program), 8) if program[at : at + 4] == own]

    def put_on(self, flags: int = 0) -> int:
        """Filters this process and all that it will start; returns a NEW_LISTENER's descriptor."""
        for at in self.own:
            struct.pack_into("=I", self.code, at, os.getpid())
        return checked(LIBC.syscall(SECCOMP_NUMBER, 1, flags, self.header), "seccomp")


def system_calls(rung: str) -> Filter:
    """What a call may do. In bubblewrap it may fork, and signal all but process 1."""
    family = [rule(name, EPERM, 0, among=[0, 1, -1]) for name in ("kill", "tgkill")]
    rules = common_rules() + (family if rung == "bubblewrap" else lone_rules())
    verdicts = dict.fromkeys({*ALLOWED.values(), *RULED.values()}, ALLOW)
    verdicts |= dict.fromkeys(PRETENDED.values(), ERROR | DONE)
    verdicts[FIRST_UNKNOWN] = ERROR | ENOSYS  # nor is x32 there
    table = [verdicts.get(number, ERROR | EPERM) for number in range(FIRST_UNKNOWN + 1)]
    ends = []
    for number in range(FIRST_UNKNOWN, 0, -1):  # from the last run of one verdict to the first
        if table[number] != table[number - 1]:
            ends += [instruction(ABOVE, number, 0, 1), instruction(RETURN, table[number])]
    start = [instruction(LOAD, 4), instruction(EQUAL, 0xC00000B7 if ARM else 0xC000003E, 1, 0)]
    start.append(instruction(RETURN, KILL))  # it speaks for another machine: a 32-bit call
    return Filter([*start, instruction(LOAD, 0), *rules, *ends, instruction(RETURN, table[0])])


def starts() -> Filter:
    """Who starts a thread or process asks the reader of a descriptor (see permit): a fork bomb of
    root's is bound by no limit and leaves who should end it no time to, but asking it waits."""
    calls = [RULED[name] for name in ("clone", "fork", "vfork") if name in RULED]
    asks = [instruction(EQUAL, n, len(calls) - i, 0) for i, n in enumerate(calls)]
    ends = [instruction(RETURN, ALLOW), instruction(RETURN, NOTIFY)]
    return Filter([instruction(LOAD, 0), *asks, *ends])


def permit(listener: int, allowed: bool) -> None:
    """Answers one who asks to start a thread or process."""
    notice = bytearray(80)
    with contextlib.suppress(OSError):  # it is gone meanwhile
        fcntl.ioctl(listener, NOTICE_RECEIVE, notice)
        verdict = (0, NOTICE_CONTINUE) if allowed else (-EAGAIN, 0)
        fcntl.ioctl(listener, NOTICE_SEND, struct.pack("=8sqiI", notice[:8], 0, *verdict))


# ------------------------------------------------------- Landlock, namespaces, capabilities, limits

# execute, read files, list folders | what applies to a file
READ, FILE_BITS, EVERYTHING = 0b1101, 0b1100000000000111, 0xFFFF


def landlock(rights: dict[str, int]) -> None:
    """Leaves these rights to paths, no TCP, abstract sockets or signals; OSError: no Landlock."""
    version = checked(LIBC.syscall(444, None, 0, 1), "Landlock")
    handled = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    # files; TCP bind and connect; abstract sockets and signals
    fields = [handled, 3, 3][: 3 if version >= 6 else 2 if version >= 4 else 1]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = checked(LIBC.syscall(444, attributes, len(attributes), 0), "Landlock ruleset")
    for path, allowed in rights.items():
        fd = os.open(path, os.O_PATH)
        parent = struct.pack("=Qi", allowed & handled, fd)
        checked(LIBC.syscall(445, ruleset, 1, parent, 0), f"Landlock for {path}")
        os.close(fd)
    checked(LIBC.syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def first_process(stack: ctypes.Array) -> int:
    """Process 1 of a new pid namespace, in which our next child will be; with it they all end. It
    only waits, in our own memory; orphans the kernel reaps, since it ignores SIGCHLD."""
    checked(LIBC.unshare(NEW_PID), "unshare")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    top = (ctypes.addressof(stack) + len(stack)) & ~15
    pause = ctypes.cast(LIBC.pause, ctypes.c_void_p)
    pid = checked(LIBC.clone(pause, top, CLONE_VM | signal.SIGCHLD, None), "clone")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return pid


def limit(given: dict) -> None:
    """Limits of this process and all that it starts that nobody in them can raise again."""
    # CORE: with 0 one may still go to a program of the host. SIGPENDING: the user's, timers too
    limits = {"AS": given["memory_mb"] << 20, "CORE": 1, "SIGPENDING": 1024}
    if given["rung"].startswith("landlock"):
        # files that were unlinked and are still open hide from a watcher: few and small ones
        limits |= {"FSIZE": given["scratch_mb"] << 18, "NOFILE": 64}
    else:
        limits |= {"FSIZE": given["scratch_mb"] << 20, "NOFILE": 256, "NPROC": MOST_THREADS}
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1] % (1 << 64)  # -1: there is none
        resource.setrlimit(number, (min(value, hard),) * 2)


# -------------------------------------------------------------------- a scratch, a call, the server


def fresh_scratch(given: dict) -> None:
    """An empty scratch: where we may mount, a file system of bounded size in which what must be
    read below it (a virtual environment may lie in /tmp) is bound again."""
    scratch = given["scratch"]
    if not given["mounts"]:
        os.mkdir(scratch, 0o700)
        return
    options = f"size={given['scratch_mb']}m,nr_inodes={MOST_FILES},mode=1777".encode()
    checked(LIBC.mount(b"tmpfs", scratch.encode(), b"tmpfs", MS_NOSUID_NODEV, options), "mount")
    for kept, path in given["below"].items():
        file = not os.path.isdir(kept)
        os.makedirs(os.path.dirname(path) if file else path, exist_ok=file)
        if file:
            open(path, "x").close()
        checked(LIBC.mount(kept.encode(), path.encode(), None, MS_BIND, None), f"mount {path}")


def remove_scratch(given: dict, removers: list[subprocess.Popen]) -> None:
    """Takes the scratch down with all in it; what may take long on a disk is left to a process."""
    scratch = given["scratch"]
    if given["mounts"]:
        checked(LIBC.umount2(scratch.encode(), MNT_DETACH), "umount")
        return
    with contextlib.suppress(OSError):  # it holds folders
        for name in os.listdir(scratch)[:100]:
            os.unlink(f"{scratch}/{name}")
        os.rmdir(scratch)
        return
    removers[:] = [remover for remover in removers if remover.poll() is None]
    while len(removers) > 4:
        removers.pop(0).wait()
    os.rename(scratch, old := f"{scratch}.{time.monotonic_ns()}")
    removers.append(subprocess.Popen(["rm", "-rf", old], stdin=subprocess.DEVNULL))


def run(code: str) -> int:
    """Runs code as a script, prints its last expression's value or the traceback; exit status."""
    linecache.cache["<code>"] = (len(code), None, code.splitlines(True), "<code>")
    script = types.ModuleType("__main__")
    sys.modules["__main__"], scope, status = script, script.__dict__, 0
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), scope)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), scope)
            if value is not None:
                print(repr(value))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
    except BaseException:  # whatever it is, the model reads it
        kind, value, trace = sys.exc_info()
        unread = isinstance(value, SyntaxError) and value.filename == "<code>"
        traceback.print_exception(kind, value, None if unread else trace.tb_next)
        status = 1
    for thread in threading.enumerate():  # as at the end of a script
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the code may have put anything there
            stream.flush()
    return status & 255


def confine(given: dict, filters: tuple[Filter, Filter], server: socket.socket) -> None:
    """Puts on this process what its rung has; tells the server where it will ask to start more."""
    rung = given["rung"]
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if rung.startswith("landlock"):
        read = {path: READ if os.path.isdir(path) else READ & FILE_BITS for path in given["read"]}
        landlock(read | {given["scratch"]: EVERYTHING, "/dev/null": FILE_BITS})
    if rung == "landlock":
        LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that its watcher can see what it holds
    if rung != "unsafe":
        # what root may do beyond its own files; what it starts gets nothing back: no_new_privs
        checked(LIBC.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
        with contextlib.suppress(OSError):  # another may listen already: a container's runtime
            socket.send_fds(server, [b"?"], [filters[0].put_on(NEW_LISTENER)])
        filters[1].put_on()
    os.closerange(3, 65536)
    os.write(server.fileno(), b"+")


def call(given: dict, filters: tuple[Filter, Filter], server: socket.socket, out: int) -> None:
    """The forked process of one call: confines itself, says so, waits for the code. No return."""
    status = 1
    try:
        os.setsid()
        for fd, to in ((server.fileno(), 0), (out, 1), (out, 2)):
            os.dup2(fd, to)
        os.chdir(given["scratch"])
        with socket.socket(fileno=0) as pipe:
            confine(given, filters, pipe)
            size = int.from_bytes(pipe.recv(8, socket.MSG_WAITALL), sys.byteorder)
            text = pipe.recv(size, socket.MSG_WAITALL).decode("utf-8", "surrogatepass")
        os.open(os.devnull, os.O_RDONLY)  # the lowest free one: 0
        status = run(text)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def put_away(given: dict, pid: int, init: int) -> int:
    """Kills what is left of a call; returns its exit status when all of it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-pid if given["rung"] == "unsafe" else init or pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if init:
        os.waitpid(init, 0)
    return os.waitstatus_to_exitcode(status)


def await_end(channel: socket.socket, pid: int, listener: int = -1) -> None:
    """Returns when the call has ended, or its caller says that it must or is gone."""
    poller, ended, started = select.poll(), os.pidfd_open(pid), 0
    for source in {ended, channel.fileno(), listener} - {-1}:
        poller.register(source, select.POLLIN)
    while (ready := dict(poller.poll())).keys() == {listener}:
        if ready[listener] != select.POLLIN:  # nobody is left who could ask
            poller.unregister(listener)
            continue
        started += 1
        if started > MOST_THREADS:  # a bomb must not outrun who watches, however busy they are
            time.sleep(0.002)
        permit(listener, started <= MOST_STARTED)
    os.close(ended)


def answer(given: dict, channel, filters: tuple, stack, myself: int, removers: list) -> bool:
    """One call; False: the caller is gone; RuntimeError: it could not be confined. Sends b"ready"
    with the ends of the pipes for code and output; receives a secret (which the process that runs
    code, forked before, never holds); sends {"secret", "exit"} when all of the call is gone."""
    fresh_scratch(given)
    # process 1 before the pipes are made: it would hold their ends
    init = first_process(stack) if given["rung"] == "bubblewrap" else 0
    (pipe, its), (read, out) = socket.socketpair(), os.pipe()
    pid = os.fork()
    if not pid:
        call(given, filters, its, out)
    its.close()
    os.close(out)
    try:
        said, fds, *_ = socket.recv_fds(pipe, 1, 1)  # where it asks to start others, or nothing
        if (pipe.recv(1) if fds else said) != b"+":
            raise RuntimeError(os.read(read, 4096).decode("utf-8", "replace").strip())
        if init:
            checked(LIBC.setns(myself, NEW_PID), "setns")
        socket.send_fds(channel, [b"ready"], [pipe.fileno(), read])
        pipe.close()
        os.close(read)
        while (message := channel.recv(100)) == b"stop":  # for a call that had just ended
            pass
        if message:
            await_end(channel, pid, *fds)
    finally:
        status = put_away(given, pid, init)
    for listener in fds:
        os.close(listener)
    if message:
        channel.send(json.dumps({"secret": message.decode(), "exit": status}).encode())
    remove_scratch(given, removers)
    return bool(message)


def serve(given: dict) -> None:
    """Answers calls until the caller is gone."""
    checked(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if given["rung"] == "landlock+namespaces":  # of users, mounts, network and IPC
        uid, gid = os.getuid(), os.getgid()
        ids = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        checked(LIBC.unshare(NEW_USER | NEW_MOUNTS | NEW_NET | NEW_IPC), "unshare")
        for name, text in ids.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        checked(LIBC.mount(b"none", b"/", None, MS_PRIVATE, None), "mount")
        os.mkdir(given["scratch"])
    given["mounts"] = given["rung"] in ("bubblewrap", "landlock+namespaces")
    if given["rung"] != "bubblewrap":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:  # devices of the host, which are written to: but their times and modes stay
        for path in (b"/dev/null", b"/dev/random", b"/dev/urandom"):
            flags = os.statvfs(path).f_flag & 0xF | MS_READ_ONLY
            checked(LIBC.mount(b"none", path, None, flags, None), "mount of devices")
    # its memory is closed to others of its user, and there is no core
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    sys.path += given["packages"]  # no .pth lines, no sitecustomize: they run outside all fences
    site.setquit()
    site.sethelper()
    with contextlib.suppress(ImportError):
        __import__("numpy")
        __import__("sympy")
    limit(given)
    selectors.DefaultSelector = selectors.PollSelector  # for asyncio: epoll is refused
    sys.path.insert(0, given["scratch"])
    # what was printed before a timeout is told, and in its order
    sys.stdout.reconfigure(line_buffering=True)
    filters, stack = (starts(), system_calls(given["rung"])), ctypes.create_string_buffer(1 << 16)
    myself, channel = os.pidfd_open(os.getpid()), socket.socket(fileno=0)
    gc.collect()
    gc.freeze()  # what is here stays: forks need not copy it
    removers: list[subprocess.Popen] = []
    while answer(given, channel, filters, stack, myself, removers):
        pass


if __name__ == "__main__":
    serve(GIVEN)
