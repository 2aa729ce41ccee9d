"""Profiling: cells of a model at a resolution, run through an engine."""
