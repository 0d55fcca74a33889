"""The blind side-by-side page for human raters: study, assignment, links, web page, quality, exchange of votes."""
