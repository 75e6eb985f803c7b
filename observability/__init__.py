"""What every process tells of itself: figures for Prometheus, log lines, traces. Knows no
service."""
