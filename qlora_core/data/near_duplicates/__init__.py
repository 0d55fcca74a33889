"""Near-duplicate rows: MinHash proposes pairs, exact Jaccard similarity decides, the better row survives."""
