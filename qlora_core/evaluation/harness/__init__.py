"""lm-evaluation-harness on a quantized base and its adapters: tasks, requests, paired results. An optional extra."""
