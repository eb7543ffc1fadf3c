"""The run directory: its ownership, and the contents of run.json."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from saved_runs import SMALL, go_on, record, stop_after
from test_durable import disk_full, failing, in_a_child

from experiments import job
from experiments.data import Data
from experiments.directory import git as git_module
from experiments.directory import record as runs
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.claim import LOCK_FILE, claim, is_locked
from experiments.directory.fingerprint import fingerprint
from experiments.directory.git import git_state
from experiments.directory.paths import display_path
from experiments.errors import Diverged, UsageError

Compose = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def config(compose: Compose) -> dict[str, Any]:
    return compose([*SMALL, "seed=7"])


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    go_on(path, config, tiny)
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the lock timeout, for tests that hold the lock on purpose."""
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.0)
    git_state.cache_clear()


def started(path: Path, config: dict[str, Any]) -> runs.Run:
    path.mkdir()
    return runs.start(path, config, ["seed=7"])


# The contents of run.json.


def test_it_says_what_ran_where(finished: Path, config: dict[str, Any]) -> None:
    said = record(finished)
    assert said["state"] == "finished"
    assert said["seed"] == 7
    assert said["python"] == platform.python_version()
    assert said["platform"] == platform.platform()
    assert said["packages"]["torch"] == torch.__version__
    assert said["environment"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert said["environment"]["threads"] == config["trainer"]["threads"]
    assert said["environment"]["device"] == "cpu"
    assert said["environment"]["deterministic"] is True


def test_it_says_when(finished: Path) -> None:
    said = record(finished)
    took = datetime.fromisoformat(said["ended"]) - datetime.fromisoformat(said["started"])
    assert took.total_seconds() == pytest.approx(said["seconds"], abs=0.5)
    assert said["seconds"] > 0
    assert said["resumed_at"] == []


def test_it_has_the_command_and_its_overrides(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/experiments", "seed=7"])
    run = started(tmp_path / "run", config)
    assert record(run.path)["command"] == ["experiments", "seed=7"]
    assert record(run.path)["overrides"] == ["seed=7"]


def test_it_has_the_fingerprint_of_every_split(finished: Path, tiny: Data) -> None:
    expected = {
        name: fingerprint({"x": split.x, "y": split.y}) for name, split in tiny.splits.items()
    }
    assert record(finished)["data"] == expected
    assert len(set(expected.values())) == 3


def test_it_has_the_fingerprints_of_the_first_and_the_last_weights(
    finished: Path, compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    weights = record(finished)["weights"]
    content = Checkpoints(finished / "checkpoints").load()
    assert content is not None
    assert weights["final"] == fingerprint(content["model"])
    assert weights["initial"] != weights["final"]
    # the initial weights depend only on the seed and the model
    go_on(tmp_path / "run", compose([*SMALL, "seed=7", "optimizer=adam"]), tiny, stop_after(1))
    assert record(tmp_path / "run")["weights"]["initial"] == weights["initial"]
    go_on(tmp_path / "other", compose([*SMALL, "seed=8"]), tiny, stop_after(1))
    assert record(tmp_path / "other")["weights"]["initial"] != weights["initial"]


def test_it_has_the_best_the_last_and_the_test_metrics(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "loss/valid" in line]
    best = min(validated, key=lambda line: float(line["loss/valid"]))
    metrics = record(finished)["metrics"]
    assert metrics["last"].items() <= validated[-1].items()
    assert metrics["best"].items() <= best.items()
    assert metrics["test"].items() <= lines[-1].items()
    assert metrics["last"].keys() == {"loss/valid", "accuracy/valid", "epoch", "step"}


def test_its_config_is_resolved_and_fingerprinted(finished: Path, config: dict[str, Any]) -> None:
    text = (finished / "config.yaml").read_bytes()
    assert yaml.safe_load(text) == config
    assert record(finished)["config_sha256"] == sha256(text).hexdigest()


def test_nothing_temporary_is_left(finished: Path) -> None:
    assert [file.name for file in finished.rglob(".*")] == [LOCK_FILE]


# Git.


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit, as the working directory."""
    path = tmp_path / "repository"
    path.mkdir()
    monkeypatch.chdir(path)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    (path / "file").write_text("one\n")
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first"]
    for arguments in (["init", "-q"], ["add", "."], commit):
        subprocess.run(["git", *arguments], check=True)
    return path


def test_a_clean_tree_is_its_commit(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    run = started(tmp_path / "run", config)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert record(run.path)["git"] == {"commit": head.stdout.strip(), "dirty": False, "diff": None}
    assert not (run.path / "git.diff").exists()


def test_a_dirty_tree_has_its_diff_beside(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    (repository / "file").write_text("two\n")
    (repository / "new").write_text("x")
    run = started(tmp_path / "run", config)
    diff = (run.path / "git.diff").read_text()
    assert "-one\n+two\n" in diff
    assert "?? new\n" in diff
    git = record(run.path)["git"]
    assert git["dirty"] is True
    assert git["diff"] == sha256(diff.encode()).hexdigest()


def test_no_repository_is_no_commit(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    run = started(tmp_path / "run", config)
    git = record(run.path)["git"]
    assert git.pop("unknown").startswith("not a git repository")
    assert git == {"commit": None, "dirty": None, "diff": None}


def head() -> str:
    command = ["git", "-c", "safe.directory=*", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_large_diff_is_kept_in_part_with_its_digest_and_size(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    (repository / "file").write_text("a line of 20 letters\n" * 100_000)
    run = started(tmp_path / "run", config)
    diff = (run.path / "git.diff").read_bytes()
    whole = subprocess.run(["git", "diff", "HEAD"], capture_output=True, check=True).stdout
    assert len(diff) < git_module.MAX_DIFF_BYTES + 100
    assert diff.splitlines()[-1].endswith(f" of {len(whole)} bytes".encode())
    assert whole.startswith(diff[: diff.rfind(b"...")])
    digest = sha256(whole).hexdigest()
    expected = {"commit": head(), "dirty": True, "diff": digest, "diff_bytes": len(whole)}
    assert record(run.path)["git"] == expected


def test_a_diff_that_takes_too_long_is_unknown_with_the_reason(
    repository: Path,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (repository / "file").write_text("two\n")

    def pass_deadline(git: git_module.Git) -> Iterator[bytes]:
        git.deadline = 0.0
        return git.stream("diff", "HEAD")

    monkeypatch.setattr(git_module.Git, "diff", pass_deadline)
    run = started(tmp_path / "run", config)
    git = record(run.path)["git"]
    reason = "git diff took longer than 2 s; what differs from the commit is not recorded"
    assert git == {"commit": head(), "dirty": True, "diff": None, "unknown": reason}
    assert capsys.readouterr().err == f"warning: git: {reason}\n"
    assert not (run.path / "git.diff").exists()


def add_submodule(repository: Path) -> Path:
    """Commit a submodule `part`, checked out; returns its folder."""
    commit = "git -c user.name=a -c user.email=a@b commit -qm one"
    for command in (
        f"git init -q part && cd part && echo one > inner && git add inner && {commit}",
        f"git add part 2> /dev/null && git config submodule.part.url ./part && {commit}",
    ):
        subprocess.run(command, shell=True, cwd=repository, check=True)
    return repository / "part"


def test_another_commit_of_a_submodule_is_a_difference(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    part = add_submodule(repository)
    (part / "inner").write_text("two\n")
    commit = "git -c user.name=a -c user.email=a@b commit -qam two"
    subprocess.run(commit, shell=True, cwd=part, check=True)
    run = started(tmp_path / "run", config)
    assert record(run.path)["git"]["dirty"] is True
    assert b"+Subproject commit" in (run.path / "git.diff").read_bytes()


def test_what_differs_inside_a_submodule_is_unknown_and_no_warning(
    repository: Path, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (add_submodule(repository) / "inner").write_text("two\n")
    git = record(started(tmp_path / "run", config).path)["git"]
    unknown = "what differs inside submodules is not looked at"
    assert git == {"commit": head(), "dirty": None, "diff": None, "unknown": unknown}
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_of_a_repository_of_another_owner_only_the_commit_is_read(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    (repository / "file").write_text("two\n")
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 12345, 12345)
    git = record(started(tmp_path / "run", config).path)["git"]
    assert (git["commit"], git["dirty"], git["diff"]) == (head(), None, None)
    assert git["unknown"] == "the repository has another owner; its diff is not read"


def test_a_broken_repository_is_no_commit_with_gits_own_reason(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    (repository / ".git" / "HEAD").write_text("nonsense\n")
    git = record(started(tmp_path / "run", config).path)["git"]
    assert (git["commit"], git["dirty"]) == (None, None)
    assert git["unknown"]


def test_without_git_there_is_no_commit(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    git = record(started(tmp_path / "run", config).path)["git"]
    assert git["commit"] is None
    assert git["unknown"] == "git cannot be started (No such file or directory)"


def test_a_repository_without_a_commit_says_so(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    git = record(started(tmp_path / "run", config).path)["git"]
    assert git["unknown"] == "the repository has no commit"


def test_names_and_contents_in_another_encoding_are_in_the_diff(
    repository: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    (repository / "file").write_bytes("é\n".encode("latin-1"))
    Path(os.fsdecode(b"caf\xe9")).touch()
    with (repository / ".git" / "config").open("ab") as file:
        file.write(b'[filter "\xe9"]\n\tclean = false\n\trequired = true\n')
    run = started(tmp_path / "run", config)
    diff = (run.path / "git.diff").read_bytes()
    assert b"+\xe9\n" in diff
    assert b'?? "caf\\351"\n' in diff


# The final state.


def go(path: Path, config: dict[str, Any], data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load_data", lambda config: data)
    job.execute(started(path, config), config)


def test_a_run_is_running_while_it_runs(config: dict[str, Any], tmp_path: Path) -> None:
    run = started(tmp_path / "run", config)
    assert record(run.path)["state"] == "running"
    assert record(run.path)["ended"] is None


def test_an_interrupted_run_says_so(config: dict[str, Any], tiny: Data, tmp_path: Path) -> None:
    go_on(tmp_path / "run", config, tiny, stop_after(6))
    said = record(tmp_path / "run")
    assert said["state"] == "interrupted"
    assert said["metrics"]["last"]["step"] == 5
    assert "final" not in said["weights"]


def test_a_resumed_run_says_when(config: dict[str, Any], tiny: Data, tmp_path: Path) -> None:
    for stopped in (stop_after(2), stop_after(1), lambda: None):
        go_on(tmp_path / "run", config, tiny, stopped)
    said = record(tmp_path / "run")
    assert said["state"] == "finished"
    times = [said["started"], *said["resumed_at"], said["ended"]]
    assert len(times) == 4
    assert times == sorted(times)


def test_a_failed_run_has_the_traceback(
    config: dict[str, Any], tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.directory.tracking.Tracker.log", full_disk)
    with pytest.raises(OSError, match="No space left"):
        go(tmp_path / "run", config, tiny, monkeypatch)
    said = record(tmp_path / "run")
    assert said["state"] == "failed"
    assert said["error"].startswith("Traceback (most recent call last)")
    assert "No space left on device" in said["error"]
    assert (tmp_path / "run" / "error.txt").read_text() == said["error"]


def test_a_diverged_run_says_at_which_step(
    compose: Compose, tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*SMALL, "optimizer.lr=1e30", "scheduler=constant"])
    with pytest.raises(Diverged):
        go(tmp_path / "run", config, tiny, monkeypatch)
    said = record(tmp_path / "run")
    assert said["state"] == "diverged"
    assert "at step 3; try a smaller optimizer.lr" in said["error"]


def test_a_failed_run_that_is_resumed_has_no_error_any_more(
    config: dict[str, Any], tiny: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "experiments.directory.checkpoints.Checkpoints.save", lambda *args, **kwargs: 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            go(tmp_path / "run", config, tiny, patch)
    go_on(tmp_path / "run", config, tiny)
    said = record(tmp_path / "run")
    assert said["state"] == "finished"
    assert "error" not in said
    assert not (tmp_path / "run" / "error.txt").exists()


def test_a_record_is_the_old_or_the_new_one_when_the_disk_is_full(
    config: dict[str, Any], tmp_path: Path
) -> None:
    run = started(tmp_path / "run", config)
    for number in range(6):
        with failing(number, disk_full), pytest.raises(OSError, match="No space left"):
            run.update(metrics={"number": number})
        assert record(run.path).get("metrics") in (None, {"number": 4}, {"number": 5})
    assert not list(run.path.glob(".*.tmp"))


# Ownership.


def test_a_free_directory_is_found(tmp_path: Path) -> None:
    names = [claim(tmp_path / "a" / "run", exact=False).name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_of_many_processes_each_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    go, children = os.pipe(), []
    for number in range(8):
        child = os.fork()
        if not child:
            os.read(go[0], 1)
            path = claim(tmp_path / "run", exact=False)
            (path / str(number)).touch()
            os._exit(0)
        children.append(child)
    os.write(go[1], b"x" * 8)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert sorted(len(list(path.iterdir())) for path in tmp_path.iterdir()) == [1] * 8


def test_a_named_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert claim(tmp_path / "run", exact=True) == tmp_path / "run"
    assert claim(tmp_path / "new" / "run", exact=True).is_dir()


def test_a_named_directory_with_a_run_is_refused(finished: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="already holds a run; choose another or use resume="):
        claim(finished, exact=True)
    with pytest.raises(UsageError, match="already holds a run"):
        runs.start(finished, config, [])


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for exact in (True, False):
        with pytest.raises(UsageError, match="cannot be created"):
            claim(tmp_path / "file" / "run", exact=exact)


def test_a_run_is_owned_until_it_ends(config: dict[str, Any], tmp_path: Path) -> None:
    run = started(tmp_path / "run", config)
    with pytest.raises(UsageError, match="another process is running it"):
        runs.reopen(run.path)
    run.end("interrupted")
    runs.reopen(run.path).end("interrupted")


def test_a_process_that_died_owns_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    assert in_a_child(lambda: started(tmp_path / "run", config)) == 0
    assert record(tmp_path / "run")["state"] == "running"
    runs.reopen(tmp_path / "run").end("interrupted")


def test_what_a_killed_write_left_is_cleared_away(config: dict[str, Any], tmp_path: Path) -> None:
    run = started(tmp_path / "run", config)
    run.end("interrupted")
    (run.path / ".run.json.123.tmp").write_bytes(b"{")
    runs.reopen(run.path).end("interrupted")
    assert not list(run.path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["link", "checkpoints/link", "metrics.jsonl"])
def test_a_directory_with_a_symbolic_link_is_not_gone_on_with(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    run = started(tmp_path / "run", config)
    run.end("interrupted")
    (run.path / "checkpoints").mkdir()
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a symbolic link"):
        runs.reopen(run.path)
    assert record(run.path)["state"] == "interrupted"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"schema": 2}', '{"schema": 1}'])
def test_a_directory_that_holds_no_run_is_told(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"holds no run|cannot be read as a run"):
        runs.reopen(tmp_path)


def test_a_path_is_shown_as_one_would_type_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert display_path(tmp_path / "a" / "b") == "a/b"
    assert display_path(tmp_path.parent) == str(tmp_path.parent)


@pytest.mark.parametrize("state", runs.COMPLETED)
def test_a_completed_run_keeps_its_state_when_its_worker_dies(
    state: runs.State, config: dict[str, Any], tmp_path: Path
) -> None:
    started(tmp_path / "run", config).end(state)
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert runs.record_end(tmp_path / "run", "failed", "killed")["state"] == state
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert not is_locked(tmp_path / "run")


@pytest.mark.parametrize("state", runs.COMPLETED)
def test_a_completed_run_is_not_reopened_by_its_sweep(
    state: runs.State, config: dict[str, Any], tmp_path: Path
) -> None:
    started(tmp_path / "run", config).end(state)
    with pytest.raises(runs.Completed):
        runs.reopen(tmp_path / "run", keep=runs.COMPLETED)
    assert record(tmp_path / "run")["state"] == state
    assert not is_locked(tmp_path / "run")


def test_what_cannot_be_reopened_is_not_left_locked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        runs.reopen(tmp_path)
    assert not is_locked(tmp_path)
