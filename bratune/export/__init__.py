"""Exports: one module per training code base that can load a plan."""
