"""The environment that a run depends on: package versions and git state."""

import functools
import os
import subprocess

PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf", "tensorboard")


@functools.cache
def packages() -> dict[str, str]:
    """The versions of the packages that the results of a run may depend on."""
    from importlib import metadata  # imported here: it takes 5 % of the time of `--help`

    return {name: metadata.version(name) for name in PACKAGES}


@functools.cache
def git_state() -> tuple[str | None, bytes]:
    """The commit checked out in the working directory and the diff against it.

    Untracked files are listed as `?? path` lines before the diff. (None, b"") if there is no git.
    The repository may be untrusted: no program that its config names is executed.
    """
    safe_config = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    environment = {**os.environ, "GIT_ALLOW_PROTOCOL": "none", "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", *safe_config, *arguments],
            check=True,
            capture_output=True,
            timeout=10,
            env=environment,
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        for key in git("config", "--local", "--includes", "--name-only", "--list").decode().split():
            if key.startswith("filter."):
                safe_config += ["-c", f"{key}={'false' if key.endswith('.required') else ''}"]
        options = ["--ignore-submodules=all"]
        status = git("status", "--porcelain", *options).splitlines(keepends=True)
        untracked = b"".join(line for line in status if line.startswith(b"??"))
        diff = ["diff", "--no-ext-diff", "--no-textconv", *options, "HEAD"]
        return commit, untracked + git(*diff) if status else b""
    except (OSError, subprocess.SubprocessError):
        return None, b""
