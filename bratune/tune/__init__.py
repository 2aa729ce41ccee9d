"""Tuning: search space, study, fidelity and plans."""
