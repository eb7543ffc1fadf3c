import re
from pathlib import Path

import paced
import pytest
from conftest import FinishedRun
from terminal import run_in_terminal

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory, small_mnist_dir: Path) -> str:
    """A run in a terminal of the usual 80 columns, whose every batch takes long enough for it to
    be drawn.
    """
    return run_in_terminal(
        tmp_path_factory.mktemp("terminal"),
        80,
        f"data.path={small_mnist_dir}",
        *("trainer.epochs=3", "loader.batch_size=200", "model._target_=paced.slow"),
        environment=paced.environment(),
    )


def drawn(terminal: str) -> list[str]:
    """Each state of the line that is drawn again and again."""
    states = re.split(r"[\r\n]+", ESCAPE.sub("", terminal))
    return [state for state in states if "%" in state]


def test_without_a_terminal_each_epoch_is_one_plain_line(finished_run: FinishedRun) -> None:
    out = finished_run.completed.stdout
    epochs = [line for line in out.splitlines() if line.startswith("epoch")]
    assert len(epochs) == 2
    for number, line in enumerate(epochs, 1):
        assert re.fullmatch(
            rf"epoch {number}/2  loss/train \d+\.\d{{4}}  loss/valid \d+\.\d{{4}}  "
            r"accuracy [01]\.\d{4}  [\d,]+ rows/s",
            line,
        )


def test_without_a_terminal_nothing_moves_the_cursor(finished_run: FinishedRun) -> None:
    out = finished_run.completed.stdout + finished_run.completed.stderr
    assert "\x1b" not in out
    assert "\r" not in out


def test_a_terminal_shows_epoch_loss_accuracy_rate_and_remaining_time(terminal: str) -> None:
    """In one line, none of it cut off for want of columns."""
    pattern = re.compile(
        r"epoch [23]/3 \S+ +\d+% loss \d+\.\d{4}  accuracy [01]\.\d{4}  [\d,]+ rows/s \d:\d\d:\d\d"
    )
    assert any(pattern.fullmatch(state.strip()) for state in drawn(terminal)), drawn(terminal)


def test_no_drawn_line_is_wider_than_the_terminal(terminal: str) -> None:
    assert all(len(state) <= 80 for state in drawn(terminal))


def test_the_bar_grows_to_the_whole(terminal: str) -> None:
    shares = [int(share) for state in drawn(terminal) for share in re.findall(r"(\d+)%", state)]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 4
    assert shares[-1] == 100


def test_the_bar_is_drawn_inside_an_epoch_and_not_only_at_its_end(terminal: str) -> None:
    shares = {int(share) for state in drawn(terminal) for share in re.findall(r"(\d+)%", state)}
    assert shares - {0, 33, 67, 100}


def test_a_terminal_keeps_each_epochs_numbers_above_the_bar(terminal: str) -> None:
    text = ESCAPE.sub("", terminal)
    for number in (1, 2, 3):
        assert len(re.findall(rf"epoch {number}/3  loss/train ", text)) == 1


def test_the_cursor_is_shown_again_at_the_end(terminal: str) -> None:
    assert terminal.rfind("\x1b[?25h") > terminal.rfind("\x1b[?25l")


def test_no_line_of_the_bar_is_left_at_the_end(terminal: str) -> None:
    """It is erased: the rate and the time left in it would be those of some moment before."""
    last = terminal.rfind("%")
    assert "\x1b[2K" in terminal[last:]
    assert terminal[last:].index("\x1b[2K") < terminal[last:].index("best ")


def test_a_terminal_of_20_columns_is_enough(tmp_path: Path, small_mnist_dir: Path) -> None:
    written = run_in_terminal(
        tmp_path, 20, f"data.path={small_mnist_dir}", "trainer.epochs=1", "model=linear"
    )
    assert "Traceback" not in written
