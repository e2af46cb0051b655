"""Files that come with a question, and pages of the web, as text; readers.py says of which kinds.
Nothing outside `files_dir` is opened and no link is followed. Parsers run in a child process with
limits on memory and time that holds the open file and nothing else."""

import contextlib
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time

from toolkit.readers import MOST_BYTES
from toolkit.sandbox import ToolError, ToolFault

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MOST_PAGE = 10 << 20  # bytes of a page of the web, before and after unpacking
MEMORY = 2 << 30  # bytes of address space of a reader
FILE_READERS = {"file_reader", "image2text", "audio2text"}  # tools that open a question's files
CHILD = f"import json, sys; sys.path.insert(0, {ROOT!r}); from toolkit.readers import child; "
CHILD += "child(json.loads(sys.argv[1]))"


def opened(files_dir: str, path: str, most_bytes: int) -> int:
    """A descriptor of a regular file in `files_dir` of at most `most_bytes`, else ToolError. Each
    component is opened in the one before it, without following links or waking devices and pipes
    (O_PATH); what was looked at is what is then read, however the folder changes in between."""
    shown, parts = repr(path[:200]), [part for part in path.split("/") if part not in ("", ".")]
    if "\0" in path or len(path) > 4096 or path.startswith("/") or ".." in parts or not parts:
        what = f"{shown} is not inside the folder of files"
        raise ToolError(f"{what}: give a path relative to it, without '..', up to 4096 characters.")
    with contextlib.ExitStack() as stack:
        try:
            here = os.open(files_dir, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise ToolFault(f"the folder of files cannot be opened: {error}") from error
        stack.callback(os.close, here)
        for part in parts:
            try:
                here = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
            except (OSError, ValueError) as error:  # ValueError: no file name has such characters
                raise ToolError(f"There is no file {shown}.") from error
            stack.callback(os.close, here)
        found = os.fstat(here)
        if not stat.S_ISREG(found.st_mode):
            kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
            kind = kinds.get(stat.S_IFMT(found.st_mode), "a device or a pipe")
            raise ToolError(f"{shown} is {kind}, not a file.")
        if found.st_size > most_bytes:
            size = f"{found.st_size:,} bytes"
            raise ToolError(f"{shown} has {size}; up to {most_bytes:,} can be read.")
        try:  # opened by its descriptor: the same file, whatever bears its name by now
            return os.open(f"/proc/self/fd/{here}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ToolFault(f"{shown} cannot be opened: {error.strerror}") from error


def file_to_text(files_dir: str, path: str, *, seconds: float = 30.0, chars: int = 200_000) -> str:
    """The text of a file in `files_dir`, by what it is, up to `chars` characters and a note that
    there is more; "a.zip::b.csv" is a member of an archive, whose own text lists them. ToolError
    for what cannot be read within about `seconds`; ToolFault if no reader starts."""
    outer, *members = path.split("::")
    given = {"do": "file", "name": outer, "members": members, "chars": chars}
    with os.fdopen(opened(files_dir, outer, MOST_BYTES), "rb") as file:
        return in_child(file.fileno(), given, seconds)["text"]


def page_to_text(body, url: str, *, packed="", charset="", seconds, chars) -> tuple[str, str]:
    """(title, text and links) of what stood at `url`: HTML, or what file_to_text reads; errors too.
    `packed` and `charset` are what the server said; the child undoes both, where all work ends."""
    given = dict(do="page", name="page", members=[], chars=chars, url=url, most=MOST_PAGE)
    given |= dict(packed=packed, charset=charset)
    with os.fdopen(os.memfd_create("page"), "w+b") as file:
        file.write(body)
        file.seek(0)
        reply = in_child(file.fileno(), given, seconds)
    return reply["title"], reply["text"]


def in_child(fd: int, given: dict, seconds: float) -> dict:
    """The child's answer; ToolError or ToolFault if it says one of them, or nothing."""
    deadline = time.monotonic() + seconds
    most_bytes = 6 * given.get("chars", 0) + (1 << 20)  # six a character in JSON; a page has links
    with running(fd, given, deadline) as pipe:
        said = read(pipe, most_bytes + 1, deadline)
    if len(said) > most_bytes or not said:
        raise ToolError("It cannot be read: its reader ran out of memory or crashed.")
    reply = json.loads(said)
    if "error" in reply or "fault" in reply:
        raise ToolError(reply["error"]) if "error" in reply else ToolFault(reply["fault"])
    return reply


@contextlib.contextmanager
def running(fd: int, given: dict, deadline: float):
    """A child that works on the open file: yields the pipe of its answer, kills it in the end."""
    given = given | dict(seconds=max(0.0, deadline - time.monotonic()), memory=MEMORY)
    command = [sys.executable, "-B", "-E", "-s", "-c", CHILD, json.dumps(given)]
    ends = dict(stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/")
    ends["env"] = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(command, **ends, start_new_session=True)
    except OSError as error:
        raise ToolFault(f"the reader of files does not start: {error}") from error
    pipe = process.stdout.fileno()
    try:
        if read(pipe, 6, deadline) != b"ready\n":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            raise ToolFault(f"the reader of files does not start (exit {process.returncode})")
        yield pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def read(pipe: int, most_bytes: int, deadline: float) -> bytes:
    """What a pipe says until its end, up to `most_bytes`; ToolError where the deadline is first."""
    said = bytearray()
    while len(said) < most_bytes:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise ToolError("It took too long to read.")
        data = os.read(pipe, min(1 << 16, most_bytes - len(said)))
        if not data:
            break
        said += data
    return bytes(said)
