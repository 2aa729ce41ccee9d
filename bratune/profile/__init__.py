"""Contests of whole models and of the attention of stages, until one engine measures everything in turn."""
