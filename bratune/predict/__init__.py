"""Prediction: roofline, launch model and kernel resources for GPUs that are not here."""
