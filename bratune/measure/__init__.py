"""Measuring: timing, memory, telemetry, statistics, the correctness gate and the worker process."""
