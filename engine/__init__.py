"""One model on one accelerator: scheduler, memory, execution. Knows no network and no service."""
