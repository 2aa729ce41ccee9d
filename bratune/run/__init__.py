"""Run: who runs cells, in which process, with which stored rows, and what their rows say together."""
