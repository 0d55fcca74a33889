"""Licences: one spelling, one class, never a guess."""

from collections.abc import Callable

import pytest

from qlora_core.data.row import Row
from qlora_core.data.tags.licence import ALLOWED, LicenceTagger, normalise_licence, provider_of


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("CC-BY", "CC-BY", "permissive"),
        ("CC BY", "CC-BY", "permissive"),
        ("cc_by_4.0", "CC-BY-4.0", "permissive"),
        ("Creative Commons Attribution 4.0 International", "CC-BY-4.0", "permissive"),
        ("CC-BY-NC", "CC-BY-NC", "non_commercial"),
        ("CC BY-NC", "CC-BY-NC", "non_commercial"),
        ("CC BY-NC-SA", "CC-BY-NC-SA", "non_commercial"),
        ("Creative Commons Attribution-NonCommercial-ShareAlike", "CC-BY-NC-SA", "non_commercial"),
        ("https://creativecommons.org/licenses/by-sa/3.0/", "CC-BY-SA-3.0", "share_alike"),
        ("CC-BY-ND 4.0", "CC-BY-ND-4.0", "no_derivatives"),
        ("cc0", "CC0-1.0", "permissive"),
        ("Public Domain", "CC0-1.0", "permissive"),
        ("MIT License", "MIT", "permissive"),
        ("Apache License, Version 2.0", "Apache-2.0", "permissive"),
        ("bsd-3-clause", "BSD", "permissive"),
        ("CDLA-Sharing-1.0", "CDLA-Sharing-1.0", "share_alike"),
        ("GNU AGPL v3", "AGPL-3.0", "share_alike"),
        ("GNU General Public License", "GPL", "share_alike"),
        ("All rights reserved", "proprietary", "proprietary"),
        ("for non-commercial use", "non-commercial", "non_commercial"),
        ("CC-BY-SA-3.0 + MIT", "CC-BY-SA-3.0 AND MIT", "share_alike"),
        ("MIT and CC BY-NC 4.0", "CC-BY-NC-4.0 AND MIT", "non_commercial"),
        ("MIT + something odd", "MIT", "unknown"),
        ("mitigated", None, "unknown"),
        ("see the website", None, "unknown"),
        ("", None, "unknown"),
        (None, None, "unknown"),
    ],
)
def test_spellings_of_one_licence_are_one(text: str | None, name: str | None, kind: str) -> None:
    found = normalise_licence(text)
    assert (found.id, found.kind) == (name, kind)


def test_presets_allow_less_and_less() -> None:
    assert ALLOWED["commercial"] < ALLOWED["share_alike"] < ALLOWED["research"]
    assert "unknown" not in ALLOWED["commercial"]


def test_provider_terms_hang_on_the_generator(row: Callable[..., Row]) -> None:
    made = LicenceTagger().tag([row("a", "b", licence="MIT", generator="gpt-4"), row("a", "b", licence="CC BY-NC")])
    assert made.table.to_pylist() == [
        {"licence_id": "MIT", "licence_class": "permissive", "provider_terms": "openai"},
        {"licence_id": "CC-BY-NC", "licence_class": "non_commercial", "provider_terms": None},
    ]
    found = [provider_of(name) for name in ("claude-3-opus", "Llama-2-70b", "human", "chip20b", "text-davinci-003")]
    assert found == ["anthropic", "meta", None, None, "openai"]
