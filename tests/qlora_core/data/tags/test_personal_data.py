"""Personal data and secrets: what is found, what only looks like it, and that no value gets out."""

import logging
import socket
from collections.abc import Callable

import pytest

from qlora_core.data.row import Row
from qlora_core.data.tags.personal_data import PersonalDataTagger, Recogniser
from qlora_core.errors import ConfigError

# Put together here, so that no scanner of this repository takes them for somebody's.
RANDOM = "a8Fk3Lq9Zt2Wm7Xc5Rv1Bn6Yd4Gh0Js8Pu"
SECRETS = {
    "AWS_KEY": "AKIA" + "Q3EGRT5WZ7KD2MLP",
    "GITHUB_TOKEN": "ghp" + "_" + RANDOM + "q2",
    "SLACK_TOKEN": "xoxb" + "-2143658709-" + RANDOM,
    "API_KEY": "sk" + "-proj-" + RANDOM,
    "JWT": "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0In0" + "." + RANDOM,
    "PRIVATE_KEY": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n-----END RSA " + "PRIVATE KEY-----",
}
PERSONAL = {
    "EMAIL": "jane.carter85@gmail.com",
    "PHONE": "+1 650-253-0000",
    "CREDIT_CARD": "4556 7375 8689 9855",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "US_SSN": "536-22-8145",
    "IP_ADDRESS": "84.23.119.201",
}


def kinds(text: str, *allow: str) -> list[str]:
    secrets, personal = Recogniser(allow).find(text)
    return [finding.kind for finding in [*secrets, *personal]]


@pytest.mark.parametrize("kind", [*SECRETS, *PERSONAL])
def test_each_type_is_found_where_it_stands(kind: str) -> None:
    value = {**SECRETS, **PERSONAL}[kind]
    text = f"Please write to them or use {value} for that."
    secrets, personal = Recogniser().find(text)
    (found,) = [*secrets, *personal]
    assert (found.kind, text[found.start : found.end]) == (kind, value)
    assert bool(secrets) == (kind in SECRETS)


@pytest.mark.parametrize(
    "text",
    [
        'password = "' + RANDOM[:12] + '"',
        "DB_PASSWORD=" + RANDOM[:14],
        '{"api_key": "' + RANDOM[:20] + '"}',
        "postgres://app:" + RANDOM[:10] + "@db.internal:5432/app",
    ],
)
def test_assigned_passwords_are_found_without_their_names(text: str) -> None:
    (found,) = Recogniser().find(text)[0]
    assert found.kind == "PASSWORD"
    assert RANDOM.startswith(text[found.start : found.end])


@pytest.mark.parametrize(
    "text",
    [
        # What pattern recognisers are known to trip over: years, digit runs, decimals, servers, documentation.
        "The Sumerian culture (3000-2350 BC); Hogarth (1697–1764); Vulgar Errors of 1646.\nFurther, 1690.",
        "One kilometre is 0.621371 miles, and pi is 3.14159265358979.",
        "Set the name server to 8.8.8.8 or 1.1.1.1; the router is 192.168.1.1, the version 2.10.3.4.",
        "Write to user@example.com, admin@mail.example.org or root@localhost.",
        "In 2023 there were 12345678 items, 1000000 of them sold; the order number is 4556737586899850.",
        "std::vector<int> a::b::c; @property def f(x): return x @ y; foo@bar",
        "password: your_password_here1 and token = os.environ['TOKEN1234'] and secret: <your-secret>",
        "token: tokenization, password=password, the key: value pairs, secret = None",
        "AKIA" + "IOSFODNN7EXAMPLE is the key of the manual; sk-learn-compatible-estimators is none",
        "numbers 1 2 3 4 5 6 7 8 9 10, dates 2020-01-02 12/31/1999, times 12:30:45, sum 48/2 = <<48/2=24>>24",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert kinds(text) == []


def test_allowed_values_are_nobodys_if_they_fit_in_full() -> None:
    text = "Write to help@acme-shop.com or jane@acme-shop.com.au."
    assert kinds(text) == ["EMAIL", "EMAIL"]
    assert kinds(text, r"[a-z]+@acme-shop\.com") == ["EMAIL"]
    with pytest.raises(ConfigError, match=r"data\.tags\.allow: '\(' is no regular expression"):
        Recogniser(["("])


def test_counts_cover_every_text_of_a_row_and_hold_no_value(row: Callable[..., Row]) -> None:
    secret, mail = SECRETS["AWS_KEY"], PERSONAL["EMAIL"]
    one = row(f"{mail}?", "Yes.", rejected=f"No: {secret}", tools=f'["{mail}"]')
    made = PersonalDataTagger().tag([one, row("Hello?", "Hello.")])
    first, second = made.table.to_pylist()
    assert first["personal_data"] == [{"type": "EMAIL", "count": 2}]
    assert first["secrets"] == [{"type": "AWS_KEY", "count": 1}]
    assert (first["has_personal_data"], first["has_secrets"]) == (True, True)
    assert second == {"personal_data": [], "secrets": [], "has_personal_data": False, "has_secrets": False}
    assert secret not in str(made.table.to_pylist()) and mail not in str(made.table.to_pylist())


def test_nothing_is_asked_of_the_network_and_no_value_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with caplog.at_level(logging.DEBUG):
        assert len(kinds(" and ".join([*SECRETS.values(), *PERSONAL.values()]))) == len(SECRETS) + len(PERSONAL)
    assert not any(value in caplog.text for value in [*SECRETS.values(), *PERSONAL.values()])


def test_long_texts_without_blanks_take_time_in_proportion(row: Callable[..., Row]) -> None:
    # A pattern that goes back over such a text would take hours; the suite's own time limit is the check.
    for text in ("a" * 300_000, "a@" * 100_000, "1" * 300_000, "1-" * 100_000, "eyJ" * 100_000, "-----BEGIN " * 30_000):
        assert kinds(text) == []
