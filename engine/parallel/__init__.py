"""One model over several devices: tensor parallelism."""
