"""Work: what a cell runs, from the request that asks for it to the call that is timed."""
