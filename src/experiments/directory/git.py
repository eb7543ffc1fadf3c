"""The git state that a run starts from: the commit and what differs from it.

The repository may be untrusted, huge or broken: no program that its config names is executed, its
diff is neither waited for longer than SECONDS nor held in memory, and what cannot be read is None,
with the reason.
"""

import functools
import hashlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

SECONDS = 2.0  # for all of git's answers together
MAX_DIFF_BYTES = 1_000_000  # of git.diff; the digest is of the whole
# Which commit a submodule has is read; looking at its files would execute what its config names.
OPTIONS = ("--ignore-submodules=dirty",)
SUBMODULES = "what differs inside submodules is not looked at"
SAFE_CONFIG = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
SAFE_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}


@dataclass(frozen=True)
class GitState:
    """What git says of the working directory.

    commit: None if it is unknown or there is none. dirty: whether anything differs from it, None
        if unknown. unknown: why something is unknown.
    diff: untracked files as `?? path` lines, then the diff; at most MAX_DIFF_BYTES of it and then a
        line that says so. sha256, size: of the whole, in bytes.
    """

    commit: str | None = None
    dirty: bool | None = None
    unknown: str | None = None
    diff: bytes = b""
    sha256: str | None = None
    size: int = 0

    @property
    def record(self) -> dict[str, object]:
        """The entry of run.json."""
        entry: dict[str, object] = {
            "commit": self.commit,
            "dirty": self.dirty,
            "diff": self.sha256,
        }
        if self.size > MAX_DIFF_BYTES:
            entry["diff_bytes"] = self.size
        return entry | ({"unknown": self.unknown} if self.unknown else {})


class GitError(Exception):
    """Git does not answer; the message says why."""


@functools.cache
def git_state() -> GitState:
    """The state of the repository around the working directory; told in a line on standard error
    if only a part of it can be read.
    """
    state = read_state(Git(time.monotonic() + SECONDS))
    if state.commit is not None and state.unknown not in (None, SUBMODULES):
        print(f"warning: git: {state.unknown}", file=sys.stderr)
    return state


def read_state(git: "Git") -> GitState:
    """The state as far as git tells it."""
    try:
        commit = git.commit()
    except GitError as error:
        return GitState(unknown=str(error))
    if git.other_owner:
        return GitState(commit, unknown="the repository has another owner; its diff is not read")
    dirty = None
    try:
        git.read_config()
        unknown = SUBMODULES if git.submodules else None
        untracked, dirty = git.status()
        if not dirty:
            return GitState(commit, None if unknown else False, unknown)
        digest, head, size = hashlib.sha256(), b"", 0
        for chunk in chain(untracked, git.diff()):
            digest.update(chunk)
            size += len(chunk)
            head += chunk[: max(0, MAX_DIFF_BYTES - len(head))]
        if size > MAX_DIFF_BYTES:
            head = head[: head.rfind(b"\n") + 1]
            head += f"... cut off: {len(head)} of {size} bytes\n".encode()
        return GitState(commit, True, unknown, head, digest.hexdigest(), size)
    except GitError as error:
        return GitState(commit, dirty, f"{error}; what differs from the commit is not recorded")


class Git:
    """Read-only git commands with a common deadline, seconds of time.monotonic()."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.config = list(SAFE_CONFIG)
        self.other_owner = False
        self.submodules = False

    def commit(self) -> str:
        """The commit that is checked out.

        Of a repository of another owner, only this is read: `rev-parse` executes nothing.
        """
        try:
            return self.output("rev-parse", "--verify", "HEAD").decode().strip()
        except GitError as error:
            if "dubious ownership" not in str(error):
                raise
        self.other_owner = True
        self.config += ["-c", "safe.directory=*"]
        return self.output("rev-parse", "--verify", "HEAD").decode().strip()

    def read_config(self) -> None:
        """Clear every filter that the repository's own config defines: it names a program; and see
        whether submodules are checked out.
        """
        listed = self.output("config", "--list", "--show-scope", "--name-only", "-z").split(b"\0")
        for scope, key in zip(listed[::2], map(os.fsdecode, listed[1::2]), strict=False):
            if scope in (b"local", b"worktree") and key.startswith("filter."):
                self.config += ["-c", f"{key}={'false' if key.endswith('.required') else ''}"]
            section, _, name = key.partition(".")  # submodule.recurse is of none
            self.submodules |= (scope, section) == (b"local", "submodule") and "." in name

    def status(self) -> tuple[list[bytes], bool]:
        """The lines of the untracked files, and whether anything differs."""
        lines = self.output("status", "--porcelain", *OPTIONS).splitlines(keepends=True)
        return [line for line in lines if line.startswith(b"??")], bool(lines)

    def diff(self) -> Iterator[bytes]:
        """The diff of the tracked files, in chunks."""
        safe = ("--no-ext-diff", "--no-textconv", "--submodule=short")
        return self.stream("diff", *safe, *OPTIONS, "HEAD")

    def output(self, *arguments: str) -> bytes:
        """The output of a command. Raises GitError."""
        return b"".join(self.stream(*arguments))

    def stream(self, *arguments: str) -> Iterator[bytes]:
        """The output of a command in chunks. Raises GitError if it fails or takes too long."""
        try:
            process = subprocess.Popen(
                ["git", *self.config, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **SAFE_ENVIRONMENT},
            )
        except OSError as error:
            raise GitError(f"git cannot be started ({error.strerror})") from None
        assert process.stdout is not None
        assert process.stderr is not None
        errors = b""
        with process, selectors.DefaultSelector() as ready:
            try:
                for pipe in (process.stdout, process.stderr):
                    ready.register(pipe, selectors.EVENT_READ)
                while ready.get_map():
                    for key, _ in self.select(ready, arguments[0]):
                        chunk = os.read(key.fd, 65536)
                        if not chunk:
                            ready.unregister(key.fileobj)
                        elif key.fileobj is process.stdout:
                            yield chunk
                        else:
                            errors = (errors + chunk)[:10_000]
            finally:
                if ready.get_map():
                    process.kill()
        if process.returncode != 0:
            raise GitError(reason(errors))

    def select(
        self, ready: selectors.BaseSelector, command: str
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """The pipes to read from. Raises GitError at the deadline."""
        found = ready.select(max(0.0, self.deadline - time.monotonic()))
        if not found or time.monotonic() > self.deadline:
            raise GitError(f"git {command} took longer than {SECONDS:g} s")
        return found


def reason(errors: bytes) -> str:
    """Why git failed, in a line, from what it wrote to standard error."""
    lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
    first = lines[0].removeprefix("fatal: ") if lines else "git failed"
    if "Needed a single revision" in first:
        return "the repository has no commit"
    text = first if len(first) <= 200 else f"{first[:200]}..."
    return "".join(char if char.isprintable() else "?" for char in text)
