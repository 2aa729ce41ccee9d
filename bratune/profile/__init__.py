"""Commands of earlier versions that stored rows name in ``repro``: each is told to `bratune profile` now."""
