"""data=text: rows of characters, whose targets are the next ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import Missing
from experiments.data.text import decode, encode, load
from experiments.errors import UsageError

TEXT = "the quick brown fox jumps over the lazy dog é€😀 " * 20


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return str(tmp_path / "text.txt")


def test_targets_are_the_inputs_one_character_later(file: str) -> None:
    data = load(file, 16, valid=100, test=200)
    for split, part in (
        ("train", TEXT[:-300]), ("valid", TEXT[-300:-200]), ("test", TEXT[-200:]),
    ):  # fmt: skip
        found = getattr(data, split)
        rows = (len(part) - 1) // 16
        assert found.x.shape == found.y.shape == (rows, 16)
        assert found.x.dtype == found.y.dtype == torch.int64
        assert decode(found.x.flatten(), data.statistics) == part[: rows * 16]
        assert decode(found.y.flatten(), data.statistics) == part[1 : rows * 16 + 1]


def test_the_vocabulary_is_that_of_the_training_part(file: str) -> None:
    data = load(file, 16)
    assert data.statistics == {"vocabulary": "".join(sorted(set(TEXT)))}
    assert data.sizes == {"vocabulary": len(set(TEXT))}
    assert int(data.train.x.max()) == len(set(TEXT)) - 1


@given(st.text(st.sampled_from(sorted(set(TEXT))), max_size=50))
def test_a_text_comes_back_from_its_codes(text: str) -> None:
    statistics = json.loads(json.dumps({"vocabulary": "".join(sorted(set(TEXT)))}))
    assert decode(encode(text, statistics), statistics) == text


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_character_that_the_training_part_has_not_is_named(split: str, tmp_path: Path) -> None:
    text = TEXT[:-250] + "Z" + TEXT[-249:] if split == "valid" else TEXT[:-50] + "Z" + TEXT[-49:]
    (tmp_path / "text.txt").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=f"the {split} part: character 50 is 'Z', which the train"):
        load(str(tmp_path / "text.txt"), 16, valid=100, test=200 if split == "valid" else 100)


def test_files_of_their_own_and_saved_statistics(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("train", "valid", "test")]
    for name, text in zip(files, (TEXT, TEXT[:90], TEXT[:80]), strict=True):
        Path(name).write_text(text, "utf-8")
    before = load(files[0], 16, valid=files[1], test=files[2])
    assert [len(split) for split in before.splits.values()] == [(len(TEXT) - 1) // 16, 5, 4]
    Path(files[0]).write_text("other", "utf-8")
    Path(files[1]).unlink()
    Path(files[0]).unlink()
    after = load(files[0], 16, valid=files[1], test=files[2], statistics=before.statistics)
    assert torch.equal(after.test.x, before.test.x)
    assert isinstance(after.train, Missing)
    assert isinstance(after.valid, Missing)


@pytest.mark.parametrize(
    ("content", "length", "words"),
    [
        (b"abc", 2, r"data\.length=2: the train part has 1 characters, and a row takes 3"),
        (b"abc\xff", 1, "byte 3 is not UTF-8"),
        (b"", 1, "data.test=0.1: leaves no characters to train on"),
    ],
)
def test_a_file_that_makes_no_rows_is_told_in_one_line(
    content: bytes, length: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        load(str(tmp_path / "text.txt"), length)


def test_a_missing_file_and_statistics_of_another_form_are_named(file: str) -> None:
    with pytest.raises(UsageError, match=r"data\.path=nowhere: there is no such file"):
        load("nowhere")
    with pytest.raises(UsageError, match=r"data\.path=null: name a text file"):
        load(None)
    others: list[Any] = [{}, {"vocabulary": "ba"}, {"vocabulary": 3}, []]
    for statistics in others:
        with pytest.raises(UsageError, match="statistics: are not those of a text"):
            load(file, 16, statistics=statistics)
