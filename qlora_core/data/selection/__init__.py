"""A small subset by diversity and quality, and the random control that its claim is tested against."""

from qlora_core.data.selection.choose import ClusterChoice, Selection, select_rows

__all__ = ["ClusterChoice", "Selection", "select_rows"]
