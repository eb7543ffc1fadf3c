"""What a run depends on besides its config: the versions of packages, and the state of git."""

import functools
import os
import subprocess

PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf", "tensorboard")


@functools.cache
def packages() -> dict[str, str]:
    """The versions of the packages that the bits of a run may depend on."""
    from importlib import metadata  # here, since it takes a twentieth of the time of `--help`

    return {name: metadata.version(name) for name in PACKAGES}


@functools.cache
def git_state() -> tuple[str | None, bytes]:
    """The commit checked out in the working directory and the diff against it.

    Untracked files stand as `?? path` lines before the diff. (None, b"") where there is no git.
    A repository may come from anywhere as well: no program that its config names is started.
    """
    plain = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    alone = {**os.environ, "GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", *plain, *arguments], check=True, capture_output=True, timeout=10, env=alone
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        for key in git("config", "--local", "--includes", "--name-only", "--list").decode().split():
            if key.startswith("filter."):
                plain += ["-c", f"{key}={'false' if key.endswith('.required') else ''}"]
        tree = ["--ignore-submodules=all"]
        status = git("status", "--porcelain", *tree).splitlines(keepends=True)
        untracked = b"".join(line for line in status if line.startswith(b"??"))
        diff = ["diff", "--no-ext-diff", "--no-textconv", *tree, "HEAD"]
        return commit, untracked + git(*diff) if status else b""
    except (OSError, subprocess.SubprocessError):
        return None, b""
