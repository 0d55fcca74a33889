"""Links: only what was signed, for this study and role, until its time."""

import stat
from pathlib import Path

import pytest

from qlora_core.errors import ConfigError
from qlora_core.evaluation.vote.links import Grant, LinkError, LinkSigner, check_rater_name, signing_secret

SECRET = "s" * 32
NOW = 1_000_000.0
GRANT = Grant("rate", "ann", 1_000_060)


def test_a_signed_link_gives_its_grant_back() -> None:
    signer = LinkSigner(SECRET, "study")
    assert signer.read(signer.sign(GRANT), "rate", now=NOW) == GRANT


def test_an_expired_link_is_refused_from_its_second_on() -> None:
    signer = LinkSigner(SECRET, "study")
    token = signer.sign(GRANT)
    assert signer.read(token, "rate", now=1_000_059.9)
    with pytest.raises(LinkError, match="expired"):
        signer.read(token, "rate", now=1_000_060.0)


def test_links_of_another_secret_study_or_role_are_refused() -> None:
    signer = LinkSigner(SECRET, "study")
    assert signer.read(signer.sign(GRANT), "rate", now=NOW)
    foreign = [LinkSigner("t" * 32, "study").sign(GRANT), LinkSigner(SECRET, "other").sign(GRANT), "", "a.b", "é"]
    for token in foreign:
        with pytest.raises(LinkError, match="not valid"):
            signer.read(token, "rate", now=NOW)
    with pytest.raises(LinkError, match="not valid"):
        signer.read(signer.sign(GRANT), "results", now=NOW)


def test_no_changed_character_passes() -> None:
    signer = LinkSigner(SECRET, "study")
    token = signer.sign(GRANT)
    for place in range(len(token) - 1):  # the last base64 digit has bits that carry nothing
        changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(LinkError):
            signer.read(changed, "rate", now=NOW)


def test_the_secret_is_made_once_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    study = tmp_path / "votes.sqlite"
    secret = signing_secret(study, {})
    path = tmp_path / "votes.sqlite.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(secret) == 64 and signing_secret(study, {}) == secret
    assert signing_secret(study, {"QLORA_VOTE_SECRET": SECRET}) == SECRET
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing_secret(study, {})
    path.chmod(0o600)
    path.write_text("")
    with pytest.raises(ConfigError, match="holds no secret"):
        signing_secret(study, {})


def test_a_short_secret_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 5 characters") as caught:
        signing_secret(tmp_path / "v", {"QLORA_VOTE_SECRET": "hush!"})
    assert "hush!" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "ann smith", "../x", "<b>", "a" * 65, ".x"])
def test_names_that_do_not_fit_a_link_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        check_rater_name(name)
