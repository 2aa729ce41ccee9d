"""Studies: experiments about the tool itself, each with its figures: ``python -m bratune.studies NAME``."""
