"""Measuring a model: retrieval, zero-shot classification, probes, diagnostics, and a report of it all."""
