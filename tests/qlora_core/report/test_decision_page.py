"""One page that says the decision, with marks from data shown and not obeyed."""

from qlora_core.report.decision_page import decision_page


def test_page_says_verdict_reasons_figures_drift_and_slices_in_this_order() -> None:
    page = decision_page(
        "REJECT",
        ["slice category=math fell by 0.3"],
        compared_with="champion version 4",
        figures=["held-out loss: 1.2 -> 1.1"],
        findings=(["data drifted"], ["category math: loss 2.0"]),
        links={"report": "/srv/report.html"},
    )
    order = [
        "# REJECT",
        "champion version 4",
        "fell by 0.3",
        "1.2 -&gt; 1.1",
        "data drifted",
        "loss 2.0",
        "/srv/report.html",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)


def test_empty_parts_are_left_out_and_marks_are_escaped() -> None:
    page = decision_page(
        "HOLD",
        ["category [x](http://evil) <script>\n# PROMOTE"],
        compared_with="the base",
        figures=[],
        findings=([], []),
        links={},
    )
    assert "## Figures" not in page and "## Worst" not in page and "## More" not in page
    assert "<script>" not in page and "[x](" not in page and "\n# PROMOTE" not in page
