import json
import math
from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.agreement import Label, agreement, read_labels

# Fleiss' kappa on Wikipedia (and statsmodels' own test): 10 items, 14 raters, 5 classes
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip
# Krippendorff 2011, Computing Krippendorff's alpha-reliability: 4 raters, 12 units, "." is missing
KRIPPENDORFF = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def _labels(*raters: str) -> list[Label]:
    return [
        Label(item_id=f"i{item}", rater_id=f"r{rater}", label=None if label == "." else label)
        for rater, text in enumerate(raters)
        for item, label in enumerate(text)
    ]


def _no_nan(result: dict[str, object]) -> None:
    json.dumps(result, allow_nan=False)


def test_agreement_gives_the_textbook_fleiss_kappa() -> None:
    labels = [
        Label(item_id=str(item), rater_id=str(rater), label=label)
        for item, counts in enumerate(FLEISS)
        for rater, label in enumerate("".join(str(c) * n for c, n in enumerate(counts)))
    ]
    result = agreement(labels)
    assert result["fleiss_kappa"] == pytest.approx(0.210, abs=5e-4)
    assert result["raw"] == pytest.approx(0.378, abs=5e-4)  # the mean P_i on the same page


def test_agreement_gives_krippendorffs_nominal_alpha_with_missing_labels() -> None:
    result = agreement(_labels(*KRIPPENDORFF))
    assert result["krippendorff_alpha"] == pytest.approx(0.743, abs=5e-4)
    assert result["fleiss_kappa"] is None
    assert "equally many" in result["reasons"]["fleiss_kappa"]


def test_agreement_two_raters_gives_cohens_kappa_by_hand() -> None:
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed .7, expected .5, kappa .4
    result = agreement(_labels("y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15))
    assert result["cohen_kappa"] == pytest.approx(0.4, abs=1e-12)
    assert result["raw"] == pytest.approx(0.7, abs=1e-12)
    assert result["reasons"] == {}


def test_agreement_three_raters_gives_the_mean_and_every_pair() -> None:
    result = agreement(_labels("abab", "abab", "abba"))
    assert [pair["kappa"] for pair in result["cohen_pairs"]] == pytest.approx([1.0, 0.0, 0.0])
    assert result["cohen_kappa"] == pytest.approx(1 / 3)


def test_agreement_one_class_only_is_null_with_reasons_never_nan() -> None:
    result = agreement(_labels("aaa", "aaa"))
    assert (result["fleiss_kappa"], result["cohen_kappa"], result["krippendorff_alpha"]) == (None, None, None)
    assert result["raw"] == 1.0
    assert set(result["reasons"]) == {"fleiss_kappa", "cohen_kappa", "krippendorff_alpha"}
    _no_nan(result)


def test_agreement_raters_without_common_items_is_null_with_reasons() -> None:
    result = agreement(_labels("a.", ".b"))
    assert [result[key] for key in ("fleiss_kappa", "cohen_kappa", "krippendorff_alpha", "raw")] == [None] * 4
    assert len(result["reasons"]) == 4
    _no_nan(result)


def test_agreement_does_not_depend_on_names_of_labels() -> None:
    renamed = [text.translate(str.maketrans("12345", "vwxyz")) for text in KRIPPENDORFF]
    first, second = agreement(_labels(*KRIPPENDORFF)), agreement(_labels(*renamed))
    assert first["krippendorff_alpha"] == pytest.approx(second["krippendorff_alpha"], abs=1e-12)


def test_agreement_item_labelled_twice_by_one_rater_is_refused() -> None:
    with pytest.raises(EvaluationError, match="rater 'r0' labelled item 'i0' twice"):
        agreement(_labels("a") + _labels("b"))


def test_agreement_no_labels_is_refused_with_an_example() -> None:
    with pytest.raises(EvaluationError, match="item_id"):
        agreement([])


def test_read_labels_takes_numbers_as_text_and_names_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"item_id": 1, "rater_id": "x", "label": 2}\n{"item_id": 1, "rater_id": "y", "label": 2.0}\n')
    assert [row.label for row in read_labels(path)] == ["2", "2"]
    path.write_text('{"item_id": 1, "rater_id": "x", "label": 2}\n{"item_id": 1, "rater": "y", "label": 2}\n')
    with pytest.raises(EvaluationError, match="line 2: rater_id: Field required"):
        read_labels(path)


@pytest.mark.integration
def test_agreement_gives_pandalms_published_kappas(shared_data: Path) -> None:
    items = json.loads((shared_data / "human/pandalm/testset-v1.json").read_text(encoding="utf-8"))
    labels = [
        Label.model_validate({"item_id": item["idx"], "rater_id": rater, "label": item[f"annotator{rater}"]})
        for item in items
        for rater in (1, 2, 3)
    ]
    result = agreement(labels)
    assert [round(pair["kappa"], 2) for pair in result["cohen_pairs"]] == [0.85, 0.88, 0.86]
    assert result["items"] == 999
    assert math.isclose(result["fleiss_kappa"], result["krippendorff_alpha"], abs_tol=1e-3)
