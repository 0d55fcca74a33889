import json
import math
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import fleiss_kappa

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.agreement import Label, agreement, read_labels
from qlora_core.evaluation.statistics.agreement_intervals import cohen_kappas, fleiss_kappas, krippendorff_alphas
from qlora_core.evaluation.statistics.bootstrap import percentile_interval, resample_weights

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


def test_agreement_gives_krippendorffs_ordinal_and_interval_alpha() -> None:
    result = agreement(_labels(*KRIPPENDORFF))
    assert result["krippendorff_ordinal"] == pytest.approx(0.815, abs=5e-4)
    assert result["krippendorff_interval"] == pytest.approx(0.849, abs=5e-4)
    for name in ("krippendorff_alpha", "krippendorff_ordinal", "krippendorff_interval", "raw"):
        low, high = result["intervals"][name]
        assert low < result[name] <= high + 1e-9
    assert "krippendorff_ordinal" not in agreement(_labels("ab", "ab"))


def test_interval_statistics_equal_the_libraries_on_the_whole_and_on_a_resample() -> None:
    counts = np.array([[0, 2, 1], [3, 0, 0], [1, 1, 1], [0, 0, 3], [2, 1, 0], [0, 3, 0]], dtype=float)
    draws = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 1, 0, 3, 0]], dtype=float)
    repeated = [np.repeat(counts, draw.astype(int), axis=0) for draw in draws]
    assert fleiss_kappas(counts, draws) == pytest.approx([fleiss_kappa(each, "fleiss") for each in repeated], abs=1e-12)
    values = np.array([1.0, 2.0, 4.0])
    for level in ("nominal", "ordinal", "interval"):
        found = krippendorff_alphas(counts, values, level, draws)
        expected = [
            krippendorff.alpha(value_counts=each.astype(int), value_domain=values, level_of_measurement=level)
            for each in repeated
        ]
        assert found == pytest.approx(expected, abs=1e-12)
    first, second = np.array([0, 1, 2, 1, 0, 2]), np.array([0, 1, 1, 1, 2, 2])
    kappas = cohen_kappas(first, second, 3, draws)
    expected = [
        cohen_kappa_score(np.repeat(first, draw.astype(int)), np.repeat(second, draw.astype(int))) for draw in draws
    ]
    assert kappas == pytest.approx(expected, abs=1e-12)


def test_agreement_intervals_cover_at_about_the_nominal_rate() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200_000)
    noisy = [np.where(rng.random(truth.size) < 0.7, truth, rng.integers(0, 3, truth.size)) for _ in range(2)]
    whole = float(cohen_kappa_score(*noisy))
    hits = []
    for start in range(0, 15_000, 100):
        part = slice(start, start + 100)
        draws = next(iter(resample_weights(100, resamples=200, seed=start)))
        low, high = percentile_interval(cohen_kappas(noisy[0][part], noisy[1][part], 3, draws), 0.95)
        hits.append(low <= whole <= high)
    assert 0.89 <= np.mean(hits) <= 0.99


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
