"""What is measured on every row: taggers write columns beside the rows, `qlora_core.data.policy` decides by them."""
