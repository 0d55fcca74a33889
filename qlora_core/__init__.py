"""QLoRA retraining as a library: every number of the pipeline is made and tested here. It knows nothing of Prefect."""
