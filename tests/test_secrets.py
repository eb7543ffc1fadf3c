import io
import logging
import sys

import pytest

from experiments.config.secrets import hide, redact, redact_logs, require, secret_variables
from experiments.errors import UsageError


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("token", "${oc.env:PLACE}"),
        ("api_key", "${oc.env:PLACE}"),
        ("wandb_api_key", "${oc.env:PLACE,none}"),
        ("password", "x-${oc.env:PLACE}"),
        ("place", "${oc.env:MY_TOKEN}"),
        ("place", "${oc.env:AWS_SECRET_ACCESS_KEY}"),
        ("place", "${secret:PLACE}"),
    ],
)
def test_what_is_marked_or_looks_secret_is_hidden(
    key: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PLACE", "MY_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"hunter2-{name}")
    [(value, name)] = secret_variables([((key,), text)]).items()
    assert value == f"hunter2-{name}"


@pytest.mark.parametrize(
    ("key", "text"),
    [("path", "${oc.env:PLACE}"), ("tokens", "3"), ("author", "${oc.env:PLACE}"), ("token", "cls")],
)
def test_what_does_not_look_secret_stays(
    key: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "somewhere")
    assert secret_variables([((key,), text)]) == {}


def test_a_secret_is_hidden_wherever_a_reference_carries_it() -> None:
    raw = {"token": "${oc.env:T}", "url": "u:${token}@host", "all": "${other}", "plain": "hunter2"}
    node = {"token": "hunter2", "url": "u:hunter2@host", "all": ["hunter2"], "plain": "hunter2"}
    assert hide(node, raw, {"hunter2": "T"}) == {
        "token": "${secret:T}",
        "url": "u:${secret:T}@host",
        "all": ["${secret:T}"],
        "plain": "hunter2",
    }


def test_a_secret_that_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model\.pin=\$\{secret:PIN\}: a secret stays a text"):
        hide({"model": {"pin": 1234}}, {"model": {"pin": "${oc.decode:${oc.env:PIN}}"}},
             {"1234": "PIN"})  # fmt: skip


def test_messages_name_a_secret_in_the_place_of_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T_TOKEN", "correct-horse")
    require({"token": "${secret:T_TOKEN}"}, "data")
    assert redact("no correct-horse here") == "no ${secret:T_TOKEN} here"


def test_a_traceback_in_a_log_has_the_name_of_a_secret_instead_of_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGGED_TOKEN", "abcd1234")
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    require("${secret:LOGGED_TOKEN}", "data.token")
    redact_logs()
    try:
        raise RuntimeError("refused abcd1234")
    except RuntimeError:
        logging.getLogger().exception("failed")
    assert "RuntimeError: refused ${secret:LOGGED_TOKEN}" in written.getvalue()
    assert "abcd1234" not in written.getvalue()
