"""Reporting: records as tables, figures and one HTML page; comparison verdicts."""
