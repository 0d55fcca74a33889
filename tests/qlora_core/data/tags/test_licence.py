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
        ("Apache 2.0 (non-commercial use only)", "Apache-2.0 AND non-commercial", "non_commercial"),
        ("BSD-3-Clause, research only", "BSD AND non-commercial", "non_commercial"),
        ("Apache-2.0, GPL-3.0", "Apache-2.0 AND GPL", "share_alike"),
        ("Apache-2.0 with Commons Clause", "Apache-2.0 AND non-commercial", "non_commercial"),
        ("public domain? non commercial", "CC0-1.0 AND non-commercial", "non_commercial"),
        ("CC BY 4.0 / proprietary", "CC-BY-4.0 AND proprietary", "proprietary"),
        ("CC0 but NC", "CC0-1.0 AND non-commercial", "non_commercial"),
        ("ODbL-1.0, non-commercial", "ODbL-1.0 AND non-commercial", "non_commercial"),
        ("not for commercial use", "non-commercial", "non_commercial"),
        ("MIT; may not be used for any commercial purpose", "MIT AND non-commercial", "non_commercial"),
        ("CC BY-NC 4.0, no modifications", "CC-BY-NC-4.0 AND no-derivatives", "no_derivatives"),
        ("CC BY 4.0, academic use", "CC-BY-4.0 AND non-commercial", "non_commercial"),
        ("MIT with exceptions", "MIT", "unknown"),
        ("CC BY 4.0 on request", "CC-BY-4.0", "unknown"),
        ("MIT Apache-2.0", "Apache-2.0", "unknown"),
        ("MIT 仅限研究", "MIT", "unknown"),
        ("GPL-3.0-or-later", "GPL", "share_alike"),
        ("GPLv2+", "GPL", "share_alike"),
        ("CC0 1.0 Universal (CC0 1.0) Public Domain Dedication", "CC0-1.0", "permissive"),
        ("http://www.apache.org/licenses/LICENSE-2.0", "Apache-2.0", "permissive"),
        ("https://opensource.org/licenses/MIT", "MIT", "permissive"),
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
