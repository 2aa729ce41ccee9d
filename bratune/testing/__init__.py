"""Testing: what every backend has to pass, and backends that fail in one way each."""

from bratune.testing.conformance import CASES, BackendConformance, Case, Inputs, problem_id

__all__ = ["CASES", "BackendConformance", "Case", "Inputs", "problem_id"]
