"""data=table: columns by name, encoded as the training rows say and no others."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_runs import SMALL, assert_same_run, call, go_on, record, stop_after

from experiments import evaluate, job, load_run
from experiments.data import Missing
from experiments.data.tables import encode, load
from experiments.errors import UsageError

Rows = list[dict[str, Any]]
COLORS = ["red", "green", "blue"]


def rows_of(count: int = 60) -> Rows:
    """A number, a text, a boolean and a class for each row."""
    return [
        {
            "age": 20 + number % 7,
            "height": 1.5 + number / 100,
            "color": COLORS[number % 3],
            "member": number % 2 == 0,
            "kind": ["cat", "dog"][number // 3 % 2],
        }
        for number in range(count)
    ]


def write(file: Path, rows: Rows) -> str:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def inputs(split: Any) -> Any:
    """x: a tensor, or a dict of them."""
    return split.x


@pytest.fixture
def table(tmp_path: Path) -> str:
    return write(tmp_path / "table.csv", rows_of())


def changed(path: Path, **values: Any) -> str:
    """A file whose row 50 has other values."""
    rows = rows_of()
    rows[50] |= values
    return write(path / "changed.csv", rows)


def test_numbers_are_standardised_by_the_training_rows_alone(table: str) -> None:
    data = load(table, "kind", split="last", valid=10, test=10)
    raw = np.array([row["height"] for row in rows_of()])
    mean, scale = raw[:40].mean(), raw[:40].std()
    for split, part in (("train", raw[:40]), ("valid", raw[40:50]), ("test", raw[50:])):
        found = inputs(getattr(data, split))["numbers"]
        assert found.dtype == torch.float32
        assert np.array_equal(found[:, 1].numpy(), ((part - mean) / scale).astype(np.float32))
    assert data.statistics["numbers"]["height"]["mean"] == mean


def test_categories_are_codes_in_the_order_of_their_texts_and_0_is_unknown(tmp_path: Path) -> None:
    data = load(changed(tmp_path, color="pink"), "kind", split="last", valid=10, test=10)
    codes = inputs(data.train)["categories"]
    assert codes.dtype == torch.int64
    assert codes[:3].tolist() == [[3, 2], [2, 1], [1, 2]]
    assert inputs(data.test)["categories"][0].tolist() == [0, 2]
    assert data.sizes == {"numbers": 2, "cardinalities": [4, 3]}


def test_texts_are_classes_in_the_order_of_their_names(table: str) -> None:
    data = load(table, "kind", split="last")
    assert data.statistics["target"] == {"name": "kind", "classes": ["cat", "dog"]}
    assert data.train.y[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.y.dtype == torch.int64


def test_integers_are_classes_too_and_numbers_when_the_config_says_so(table: str) -> None:
    classes = load(table, "age", split="last")
    assert classes.statistics["target"]["classes"] == list(range(20, 27))
    assert classes.train.y[:3].tolist() == [0, 1, 2]
    numbers = load(table, "age", split="last", classes=False)
    assert numbers.train.y[:3].tolist() == [[20], [21], [22]]
    assert numbers.train.y.dtype == torch.float32


def test_a_target_with_fractions_is_numbers(table: str) -> None:
    data = load(table, "height", numbers=["age"], categories=[])
    assert data.train.y.shape == (48, 1)
    assert inputs(data.train).shape == (48, 1)  # the tensor alone, without categories


def test_parquet_gives_the_same_bits_as_csv(table: str) -> None:
    import polars as pl

    pl.read_csv(table).write_parquet(Path(table).with_suffix(".parquet"))
    one, other = (load(path, "kind") for path in (table, table.replace(".csv", ".parquet")))
    assert one.statistics == other.statistics
    for name in ("numbers", "categories"):
        assert torch.equal(inputs(one.train)[name], inputs(other.train)[name])


def test_a_file_for_each_split_is_read_as_the_training_file_is(tmp_path: Path) -> None:
    rows = rows_of()
    codes: Rows = [{**row, "color": f"0{number % 3}"} for number, row in enumerate(rows)]
    codes[5]["color"] = "x"  # so that the others are texts: 00, not 0
    files = [
        write(tmp_path / f"{name}.csv", part)
        for name, part in (("train", codes[:20]), ("valid", codes[20:40]), ("test", codes[40:]))
    ]
    of_categories = ["color", "member"]
    data = load(files[0], "kind", None, of_categories, valid=files[1], test=files[2])
    assert [len(split) for split in data.splits.values()] == [20, 20, 20]
    assert inputs(data.valid)["categories"][:, 0].min() == 1


def test_new_rows_are_encoded_as_those_of_the_run(table: str) -> None:
    data = load(table, "kind", split="last", valid=10, test=10)
    statistics = json.loads(json.dumps(data.statistics))
    rows = rows_of()[50:]
    columns = {name: [row[name] for row in rows] for name in ("age", "height", "color", "member")}
    found = encode(columns, statistics)
    assert isinstance(found, dict)
    for name, expected in inputs(data.test).items():
        assert torch.equal(found[name], expected)


def test_saved_statistics_do_without_the_training_file(tmp_path: Path) -> None:
    rows = rows_of()
    train = write(tmp_path / "train.csv", rows[:30])
    test = write(tmp_path / "test.csv", rows[30:])
    before = load(train, "kind", test=test)
    Path(train).unlink()
    after = load(train, "kind", test=test, statistics=before.statistics)
    assert torch.equal(inputs(after.test)["numbers"], inputs(before.test)["numbers"])
    assert torch.equal(after.test.y, before.test.y)
    assert isinstance(after.train, Missing)
    assert "train.csv: there is no such file any more" in after.train.reason


def test_missing_values_are_filled_only_when_the_config_says_so(tmp_path: Path) -> None:
    file = changed(tmp_path, age=None, color=None)
    with pytest.raises(
        UsageError, match=r"changed\.csv: row 50 has no age, as 1 in all; data\.mis"
    ):
        load(file, "kind")
    data = load(file, "kind", missing="fill", split="last", valid=5, test=10)
    median = np.median([row["age"] for row in rows_of()[:45]])
    learnt = data.statistics["numbers"]["age"]
    expected = np.float32((median - learnt["mean"]) / learnt["scale"])
    assert inputs(data.test)["numbers"][0, 0] == expected
    assert inputs(data.test)["categories"][0, 0] == 1
    assert inputs(data.train)["categories"][:, 0].unique().tolist() == [2, 3, 4]


def test_a_constant_column_does_not_divide_by_zero(tmp_path: Path) -> None:
    rows = [{**row, "age": 3} for row in rows_of()]
    data = load(write(tmp_path / "flat.csv", rows), "kind")
    assert inputs(data.train)["numbers"][:, 0].unique().tolist() == [0]


def test_folds_are_each_row_once_and_groups_stay_together(table: str) -> None:
    found = []
    for fold in range(3):
        data = load(
            table, "kind", numbers=["height"], categories=[], split="grouped", group="age",
            folds=3, fold=fold, test=0.1,
        )  # fmt: skip
        learnt = data.statistics["numbers"]["height"]
        heights = inputs(data.valid)[:, 0].double() * learnt["scale"] + learnt["mean"]
        found.append({round((float(height) - 1.5) * 100) for height in heights})
    ages = [{row % 7 for row in rows} for rows in found]
    assert sum(map(len, ages)) == len(set.union(*ages))
    assert sum(map(len, found)) == len(set.union(*found)) > 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "knid"}, r"data\.target: there is no column knid; did you mean kind\?"),
        ({"numbers": ["hight"]}, r"data\.numbers: there is no column hight; did you mean height\?"),
        ({"numbers": ["kind"]}, r"data\.numbers: kind is the target"),
        ({"numbers": ["age"], "categories": ["age"]}, "age is also in data.categories"),
        ({"numbers": ["color"]}, "the column color holds String, not numbers"),
        ({"categories": ["height"]}, "the column height holds Float64, no categories"),
        ({"classes": False}, r"data\.classes=false: the target kind holds String"),
        ({"target": "height", "classes": True}, "row 0 has the height 1.5, which is no class|"
                                                "has the height 1.5[0-9]+, which is no class"),
        ({"target": None}, r"data\.target=null: a table needs the column"),
        ({"path": None}, r"data\.path=null: a table needs its file"),
        ({"path": "nowhere.csv"}, r"data\.path=nowhere\.csv: there is no such file"),
        ({"path": "table.xlsx"}, r"expected a file that ends with \.csv"),
        ({"split": "grouped", "group": "aeg"}, r"data\.group: there is no column aeg; did you"),
        ({"split": "grouped"}, r"data\.split=grouped: needs data\.group"),
        ({"target": "height", "split": "stratified"}, "needs a target of classes"),
        ({"folds": 3, "valid": "table.csv"}, "validation is a fold"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_told_in_one_line(
    arguments: dict[str, Any], words: str, table: str
) -> None:
    with pytest.raises(UsageError, match=words):
        load(**({"path": table, "target": "kind"} | arguments))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"height": "inf"}, r"changed\.csv: row 50 has an infinite height"),
        ({"height": "nan"}, "the column height holds numbers and texts, such as nan;"),
        ({"age": "unknown"}, "the column age holds numbers and texts, such as unknown; correct"),
        ({"kind": None}, r"row 50 has no kind, the target, as 1 in all"),
        ({"kind": "cow"}, r"row 50 has the kind cow, a class that no training row has"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        load(changed(tmp_path, **values), "kind", split="last", valid=5, test=10)


def test_files_whose_columns_differ_are_told_apart(tmp_path: Path, table: str) -> None:
    rows: Rows = [{**row, "weight": 3} for row in rows_of()]
    for row in rows:
        del row["age"]
    other = write(tmp_path / "other.csv", rows)
    with pytest.raises(UsageError, match=r"other\.csv: its columns are those of .*without age and "
                                         "with weight; name the columns"):  # fmt: skip
        load(table, "kind", test=other)
    assert len(load(table, "kind", ["height"], ["color"], test=other).test) == 60
    with pytest.raises(UsageError, match=r"other\.csv: there is no column age"):
        load(table, "kind", ["age"], ["color"], test=other)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("packed.csv", b"\x1f\x8b\x08\x00 and more", "is compressed; unpack it"),
        ("broken.parquet", b"PAR1 and nothing else PAR1", "cannot be read"),
        ("empty.csv", b"", "cannot be read"),
        ("header.csv", b"a,kind\n", "has no rows"),
        ("double.csv", b"a,a,kind\n1,2,x\n", "has two columns a; rename one"),
        ("ragged.csv", b"a,kind\n1,x\n1,2,3,x\n", "cannot be read"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        load(str(tmp_path / name), "kind")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("statistics", [[], {"numbers": {}}, {"numbers": {"a": 1}}, "text"])
def test_statistics_of_another_form_are_refused(statistics: Any, table: str) -> None:
    with pytest.raises(UsageError, match="statistics: are not those of a table"):
        load(table, "kind", statistics=statistics)


def test_without_polars_the_extra_is_named(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polars", None)
    with pytest.raises(UsageError, match=r"pip install 'experiments\[tables\]'"):
        load(table, "kind")


def test_a_run_on_a_table_is_evaluated_without_its_file_and_predicts_new_rows(
    tmp_path: Path, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    rows = rows_of()
    train, test = (write(tmp_path / f"{n}.csv", r) for n, r in (("a", rows), ("b", rows[:20])))
    config = compose([
        *SMALL, "data=table", f"data.path={train}", f"data.test={test}", "data.target=kind",
        "data.numbers=[age,height]", "data.categories=[]", "model.in_features=2",
        "model.out_features=2", "loader.batch_size=16",
    ])  # fmt: skip
    assert go_on(tmp_path / "run", config, job.load_data(config)) == "finished"
    Path(train).unlink()
    arguments = [tmp_path / "run", "--checkpoint", "last", "--split", "test"]
    assert call(evaluate.main, *arguments) == 0
    report = json.loads((tmp_path / "run" / "evaluation-last-test.json").read_text())
    assert report["loss"] == record(tmp_path / "run")["metrics"]["test"]["loss/test"]
    run = load_run(tmp_path / "run", "last")
    x = encode({"age": [20], "height": [1.5]}, run.statistics)
    assert run.model(x).shape == (1, 2)


def test_a_run_on_a_table_that_was_stopped_ends_with_the_same_bits(
    table: str, tmp_path: Path, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    config = compose([
        *SMALL, "data=table", f"data.path={table}", "data.target=kind", "data.folds=3",
        "data.numbers=[age,height]", "data.categories=[]", "model.in_features=2",
        "model.out_features=2", "loader.batch_size=8",
    ])  # fmt: skip
    go_on(tmp_path / "unbroken", config, job.load_data(config))
    assert go_on(tmp_path / "run", config, job.load_data(config), stop_after(4)) == "interrupted"
    saved = (tmp_path / "run" / "statistics.json").read_bytes()
    job._load_data.cache_clear()
    go_on(tmp_path / "run", config, job.load_data(config))
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    assert (tmp_path / "run" / "statistics.json").read_bytes() == saved


def test_the_option_takes_the_keys_of_its_function(
    compose: Callable[[list[str]], dict[str, Any]],
) -> None:
    node = compose(["data=table", "data.path=a.csv", "data.target=b", "data.valid=v.csv",
                    "data.test=0.2", "data.numbers=[x,y]", "data.fold=1"])["data"]  # fmt: skip
    assert (node["valid"], node["test"], node["numbers"]) == ("v.csv", 0.2, ["x", "y"])


def test_a_parquet_file_that_is_cut_off_anywhere_is_told_in_one_line(
    table: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cut.parquet"
    import polars as pl

    pl.read_csv(table).write_parquet(file)
    content = file.read_bytes()
    capfd.readouterr()
    for size in {0, 1, 4, 8, 12, len(content) - 1, *range(0, len(content), 97)}:
        file.write_bytes(content[:size])
        with pytest.raises(
            UsageError, match=r"cut\.parquet: cannot be read .*; save it again"
        ) as told:
            load(str(file), "kind")
        assert "\n" not in str(told.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("size", [0, 1 << 20, (1 << 32) - 1])
def test_a_parquet_file_whose_footer_is_not_inside_it_is_told_in_one_line(
    size: int, table: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "footer.parquet"
    import polars as pl

    pl.read_csv(table).write_parquet(file)
    content = file.read_bytes()
    file.write_bytes(content[:-8] + size.to_bytes(4, "little") + content[-4:])
    capfd.readouterr()
    with pytest.raises(UsageError, match=r"footer\.parquet: cannot be read .*; save it again"):
        load(str(file), "kind")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("mark", "remedy"), [(";", "save it with commas"), ("\t", "name it .tsv")])
def test_a_csv_file_with_another_separator_is_refused_by_its_name(
    tmp_path: Path, mark: str, remedy: str
) -> None:
    file = tmp_path / "people.csv"
    file.write_text("".join(f"{mark.join(row)}\n" for row in [("age", "kind"), ("1,5", "cat")]))
    with pytest.raises(UsageError, match=rf"data\.path=.*separated by .*, not commas; {remedy}"):
        load(str(file), "kind")


def test_numbers_with_a_decimal_comma_are_no_categories(tmp_path: Path) -> None:
    rows = [{**row, "height": str(row["height"]).replace(".", ",")} for row in rows_of()]
    file = write(tmp_path / "people.csv", rows)
    with pytest.raises(UsageError, match=r"column height holds numbers with a comma, such as 1,5;"):
        load(file, "kind")


def test_numbers_without_a_finite_deviation_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "people.csv", [{**row, "age": row["age"] * 1e300} for row in rows_of()])
    with pytest.raises(UsageError, match=r"column age holds numbers up to 2\.6e\+301, whose"):
        load(file, "kind")


def test_groups_are_refused_where_the_rule_does_not_keep_them_together(tmp_path: Path) -> None:
    file = write(tmp_path / "people.csv", rows_of())
    with pytest.raises(UsageError, match=r"data\.group=age: data\.split=random keeps no groups"):
        load(file, "kind", group="age")
