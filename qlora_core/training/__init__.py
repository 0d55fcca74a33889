"""Training of LoRA adapters over a frozen base: batches, schedules, optimizers, checkpoints, the loop, the export."""
