"""What the python tool's code runs in: the fences that a process puts around itself, and the warm
server that forks calls.

sandbox.py starts this file inside bubblewrap, or by itself where that is not to be had. Linux,
x86_64 and aarch64; everything through ctypes, nothing but the standard library. Facts are from
landlock(7), seccomp(2) and namespaces(7).

Without bubblewrap a call is one process (threads, but no fork): nothing can then outlive it, and it
may signal itself only.
"""

import ast
import builtins
import contextlib
import ctypes
import gc
import json
import linecache
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import threading
import time
import traceback

LIBC = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
# in the scratch folder: an empty file takes no quota, but a kilobyte of the kernel's memory
MOST_FILES = 20_000


def checked(result: int, what: str) -> int:
    """A system call's result; OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


# --------------------------------------------------------------------------------------------------
# seccomp: system calls that the code may not make

# name, number on x86_64, number on aarch64 (0: there is none)
NUMBERS = {
    name: int(numbers[ARM])
    for name, *numbers in (
        line.split(":")
        for line in """
ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 process_madvise:440:440
pidfd_getfd:438:438 kcmp:312:272 tkill:200:130 move_pages:279:239 migrate_pages:256:238
keyctl:250:219 add_key:248:217 request_key:249:218 bpf:321:280 perf_event_open:298:241
io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427 userfaultfd:323:282
kexec_load:246:104 kexec_file_load:320:294 init_module:175:105 finit_module:313:273
delete_module:176:106 syslog:103:116 acct:163:89 quotactl:179:60 quotactl_fd:443:443
swapon:167:224 swapoff:168:225 reboot:169:142 lookup_dcookie:212:18 fanotify_init:300:262
iopl:172:0 ioperm:173:0 modify_ldt:154:0 settimeofday:164:170 clock_settime:227:112
clock_adjtime:305:266 adjtimex:159:171 sethostname:170:161 setdomainname:171:162 vhangup:153:58
personality:135:92 mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51
mount_setattr:442:442 move_mount:429:429 open_tree:428:428 fsopen:430:430 fsconfig:431:431
fsmount:432:432 fspick:433:433 unshare:272:97 setns:308:268 open_by_handle_at:304:265
name_to_handle_at:303:264 setuid:105:146 setgid:106:144 setreuid:113:145 setregid:114:143
setresuid:117:147 setresgid:119:149 setgroups:116:159 setfsuid:122:151 setfsgid:123:152
memfd_create:319:279 memfd_secret:447:447 shmget:29:194 shmat:30:196 shmctl:31:195 msgget:68:186
semget:64:190 pidfd_send_signal:424:424 socket:41:198 socketpair:53:199 kill:62:129 tgkill:234:131
rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 pidfd_open:434:434 prlimit64:302:261 ioctl:16:29
clone:56:220 clone3:435:435 fork:57:0 vfork:58:0 prctl:157:167 open:2:0 openat:257:56
openat2:437:437 truncate:76:45 setsid:112:157 setpgid:109:154 chmod:90:0 fchmod:91:52
fchmodat:268:53 fchmodat2:452:452 chown:92:0 fchown:93:55 lchown:94:0 fchownat:260:54 utime:132:0
utimes:235:0 futimesat:261:0 utimensat:280:88 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7
removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16
""".split()
    )
}
FIRST_UNKNOWN = 463  # what kernels after Linux 6.12 added is not there
NEVER = list(NUMBERS)[: list(NUMBERS).index("socket")]
METADATA = list(NUMBERS)[list(NUMBERS).index("chmod") :]
EPERM, ENOSYS, DONE = 1, 38, 0  # DONE: the call does nothing and says that it succeeded
AF_UNIX, AF_INET, AF_INET6, SOCK_RAW, SOCK_PACKET = 1, 2, 10, 3, 10
NEW_NAMESPACE, CLONE_THREAD, O_TRUNC_ONLY = 0x7E020080, 0x10000, 0o1003
SIGNALS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open")
TIOCSTI, TIOCLINUX, PR_SET_PDEATHSIG = 0x5412, 0x541C, 1


def instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value & 0xFFFFFFFF)


LOAD, AND, EQUAL, ABOVE, RETURN = (
    0x20,
    0x54,
    0x15,
    0x35,
    0x06,
)  # BPF: words at offsets of struct seccomp_data
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def rule(
    name: str,
    error: int = EPERM,
    argument: int = 0,
    *,
    among=None,
    but=None,
    mask: int = 0xFFFFFFFF,
) -> bytes:
    """Refuses a call with `error`: always, or if (argument & mask) is `among` values, or is
    anything `but` them.
    """
    if not NUMBERS[name]:
        return b""
    body = instruction(RETURN, ERROR | error)
    values = among if among is not None else but
    if values is not None:
        tests = [instruction(LOAD, 16 + 8 * argument), instruction(AND, mask)]
        for left in range(
            len(values), 0, -1
        ):  # a hit jumps behind the other tests: to the refusal, or over it
            over = left - 1 + (1 if but is not None else 0)
            tests.append(
                instruction(
                    EQUAL, values[len(values) - left], over, 0 if left > 1 or but is not None else 1
                )
            )
        body = b"".join(tests) + body + instruction(LOAD, 0)
    return instruction(EQUAL, NUMBERS[name], 0, len(body) // 8) + body


def prologue() -> bytes:
    """Kills what speaks for another machine (32-bit calls), knows no x32 and no newer calls, and
    refuses NEVER.
    """
    machine = 0xC00000B7 if ARM else 0xC000003E
    known = [
        instruction(LOAD, 4),
        instruction(EQUAL, machine, 1, 0),
        instruction(RETURN, KILL),
        instruction(LOAD, 0),
        instruction(ABOVE, FIRST_UNKNOWN, 0, 1),
        instruction(RETURN, ERROR | ENOSYS),
    ]
    rules = [rule(name) for name in NEVER] + [
        rule("clone3", ENOSYS)
    ]  # glibc then uses clone, whose flags can be read
    rules += [
        rule("prlimit64", EPERM, 0, but=[0]),
        rule("ioctl", EPERM, 1, among=[TIOCSTI, TIOCLINUX]),
        rule("prctl", EPERM, 0, among=[PR_SET_PDEATHSIG]),
    ]
    return b"".join(known + rules)


def family_rules(protected: set[int]) -> bytes:
    """For a call in bubblewrap: it may fork; it may not signal its server; the network that it sees
    is empty.
    """
    rules = [
        rule("clone", EPERM, 0, but=[0], mask=NEW_NAMESPACE),
        rule("socket", EPERM, 0, but=[AF_UNIX, AF_INET, AF_INET6]),
        rule("socket", EPERM, 1, among=[SOCK_RAW, SOCK_PACKET], mask=0xF),
    ]
    return b"".join(rules + [rule(name, EPERM, 0, among=sorted(protected)) for name in SIGNALS])


def lone_rules(own: int) -> bytes:
    """For a call beside the host's processes and under its file system: one process, no sockets, no
    change of metadata.

    Landlock does not know about owners, modes and times (nor, when it was new, about truncation):
    changes of mode and time are made believe, so that shutil.copy works; the others are refused.
    """
    rules = [
        rule("clone", EPERM, 0, among=[0], mask=CLONE_THREAD),
        rule("fork"),
        rule("vfork"),
        rule("setsid"),
        rule("setpgid"),
        rule("socket"),
        rule("socketpair", EPERM, 0, but=[AF_UNIX]),
        rule("truncate"),
        rule("openat2", ENOSYS),
        rule("open", EPERM, 1, among=[0o1000], mask=O_TRUNC_ONLY),
        rule("openat", EPERM, 2, among=[0o1000], mask=O_TRUNC_ONLY),
    ]
    rules += [rule(name, EPERM, 0, but=[own]) for name in SIGNALS]
    quiet = [name for name in METADATA if "chmod" in name or "utime" in name]
    return b"".join(rules + [rule(name, DONE if name in quiet else EPERM) for name in METADATA])


def seccomp(rules: bytes) -> None:
    """Puts a filter of prologue() and other rules on this process and all that it will start."""
    code = ctypes.create_string_buffer(rules + instruction(RETURN, ALLOW))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(code))
    checked(LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    checked(LIBC.prctl(22, 2, program, 0, 0), "seccomp")


# --------------------------------------------------------------------------------------------------
# Landlock, namespaces, capabilities, limits

READ, FILE_BITS = (
    0b1101,
    0b1100000000000111,
)  # execute, read files, list folders | what applies to a file


def landlock(read: list, write: list) -> None:
    """Closes every file but those under the `read` and `write` paths (or descriptors), and TCP;
    OSError if there is none.
    """
    version = checked(LIBC.syscall(444, None, 0, 1), "Landlock")
    everything = (
        1 << (16 if version >= 5 else 15 if version >= 3 else 14 if version >= 2 else 13)
    ) - 1
    # files; TCP bind and connect; abstract sockets and signals
    attributes = struct.pack("=QQQ", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = checked(LIBC.syscall(444, attributes, size, 0), "Landlock ruleset")
    for paths, rights in ((read, READ), (write, everything)):
        for path in paths:
            if isinstance(path, str) and not os.path.exists(path):
                continue
            fd = path if isinstance(path, int) else os.open(path, os.O_PATH)
            allowed = rights if os.path.isdir(path) else rights & FILE_BITS
            checked(
                LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", allowed & everything, fd), 0),
                f"Landlock for {path}",
            )
            if fd is not path:
                os.close(fd)
    checked(LIBC.prctl(38, 1, 0, 0, 0), "no_new_privs")
    checked(LIBC.syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def own_namespaces(scratch: str, megabytes: int) -> None:
    """A user, mount, network and IPC namespace, and a file system of bounded size on the scratch
    folder; OSError if refused.
    """
    ids = {
        "setgroups": "deny",
        "uid_map": f"{os.getuid()} {os.getuid()} 1",
        "gid_map": f"{os.getgid()} {os.getgid()} 1",
    }
    checked(LIBC.unshare(0x10000000 | 0x20000 | 0x40000000 | 0x08000000), "unshare")
    for name, text in ids.items():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    checked(LIBC.mount(b"none", b"/", None, 0x44000, None), "mount")  # private, also below
    options = f"size={megabytes}m,nr_inodes={2 * MOST_FILES},mode=700".encode()
    checked(LIBC.mount(b"tmpfs", scratch.encode(), b"tmpfs", 6, options), "mount")


def drop_capabilities() -> None:
    """Gives up what root may do beyond its own files, here and in what it starts (with
    no_new_privs).
    """
    header = struct.pack("=Ii", 0x20080522, 0)
    checked(LIBC.capset(header, bytes(24)), "capset")


def limit(memory_mb: int, file_mb: int, files: int, processes: int | None) -> None:
    """Limits of this process that nobody in it can raise again."""
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: file_mb << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: files,
    }
    if processes:
        limits[resource.RLIMIT_NPROC] = processes
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


# --------------------------------------------------------------------------------------------------
# the server


def run(code: str) -> int:
    """Runs code as a script, prints the value of its last expression or the traceback; returns the
    exit status.
    """
    linecache.cache["<code>"] = (len(code), None, code.splitlines(True), "<code>")
    scope = {"__name__": "__main__", "__builtins__": builtins}
    status = 0
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


def call(given: dict, code: str, rules: bytes | None, protected: set[int], out: int) -> None:
    """The forked process of one call; never returns."""
    status = 1
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 65536)
        os.chdir(given["scratch"])
        sys.path.insert(0, given["scratch"])
        sys.stdout.reconfigure(
            line_buffering=True
        )  # what was printed before a timeout is told, and in its order
        if given["rung"].startswith("landlock"):
            # files that were unlinked and are still open hide from the watcher: few and small ones
            limit(given["memory_mb"], given["scratch_mb"] // 4, 64, None)
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            seccomp(rules + lone_rules(os.getpid()))
        else:
            limit(given["memory_mb"], given["scratch_mb"], 256, 64)
            if rules is not None:
                seccomp(rules + family_rules(protected))
        status = run(code)
    finally:
        os._exit(status)


def too_many_files(given: dict) -> bool:
    """Whether the scratch holds more files, or (without a file system of its own) more bytes, than
    it may.
    """
    if given["rung"] in ("bubblewrap", "landlock+namespaces"):
        folders = ("/tmp", "/dev/shm") if given["rung"] == "bubblewrap" else (given["scratch"],)
        return any(
            (found := os.statvfs(path)).f_files - found.f_ffree > MOST_FILES for path in folders
        )
    files = used = 0
    for folder, _, names in os.walk(given["scratch"]):
        for name in names:
            with contextlib.suppress(OSError):
                used += os.lstat(os.path.join(folder, name)).st_blocks * 512
            files += 1
            if files > MOST_FILES // 4 or used > given["scratch_mb"] << 20:
                return True
    return False


def watch(given: dict, pid: int, read: int, seconds: float) -> tuple[bytes, int, str]:
    """What a call prints (its beginning and its length) until it ends or must be stopped, and why
    it was.
    """
    text, total, ended, began, keep = bytearray(), 0, False, time.monotonic(), 4 * given["chars"]
    looked = began
    while True:
        now = time.monotonic()
        ready = select.select([read], [], [], 0 if ended else 0.005 if now - began < 0.5 else 0.02)[
            0
        ]
        data = os.read(read, 1 << 16) if ready else b""
        if (ready and not data) or (ended and not ready):
            return text, total, ""
        total += len(data)
        text += data[: max(0, keep - len(text))]
        if total > 16 * keep:
            return text, total, "it printed too much"
        if now - began > seconds:
            return text, total, f"the code ran longer than {seconds:g} s"
        if now - looked > 0.04:
            looked = now
            if too_many_files(given):
                return text, total, "too many or too large files"
        ended = ended or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def empty(folder: str, keep: list[str]) -> None:
    """Deletes what is in a folder but libraries that are mounted below it: a virtual environment
    may lie in /tmp.
    """
    for entry in os.scandir(folder):
        if any(path.startswith(entry.path + "/") for path in keep):
            empty(entry.path, keep)
        elif entry.path not in keep:
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(
                entry.path
            )


def put_away(given: dict, pid: int) -> tuple[int, bool]:
    """Kills what is left of a call and empties the scratch; returns its exit status and whether
    nothing is left.
    """
    everyone = (
        given["rung"] == "bubblewrap"
    )  # in a pid namespace of our own, where -1 is everybody but us
    with contextlib.suppress(ProcessLookupError):
        if everyone:
            os.kill(-1, signal.SIGKILL)
        elif given["rung"] == "unsafe":
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    while everyone:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    try:
        for scratch in (given["scratch"], *(["/dev/shm"] if everyone else [])):
            empty(scratch, given["read"])
    except (OSError, RecursionError):  # closed or very deep folders: a new server has a new scratch
        return os.waitstatus_to_exitcode(status), False
    return os.waitstatus_to_exitcode(status), True


def serve(given: dict) -> None:
    """Reads {"code", "seconds"} lines and answers each with a line {"text", "total", "exit",
    "stopped", "clean"}.
    """
    rung, protected = given["rung"], {os.getpid(), 1, -1, -os.getpgrp()} - {0}
    if rung == "landlock+namespaces":
        own_namespaces(given["scratch"], given["scratch_mb"])
    if rung != "bubblewrap":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if rung.startswith("landlock"):
        drop_capabilities()
        landlock(given["read"], [given["scratch"], "/dev/null"])
    LIBC.prctl(
        4, 0, 0, 0, 0
    )  # not dumpable: its memory and descriptors in /proc are closed to the code, and no core
    with contextlib.suppress(ImportError):
        __import__("numpy")
        __import__("sympy")
    rules = None if rung == "unsafe" else prologue()
    gc.collect()
    gc.freeze()  # what is here stays: forks need not copy it
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            call(given, asked["code"], rules, protected, write)
        os.close(write)
        text, total, stopped = watch(given, pid, read, asked["seconds"])
        status, clean = put_away(given, pid)
        os.close(read)
        reply = {
            "text": text.decode("utf-8", "replace"),
            "total": total,
            "exit": status,
            "stopped": stopped,
            "clean": clean,
        }
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
