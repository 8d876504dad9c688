"""Evaluation: a model on splits of data sets, phrase by phrase, to numbers and tables."""
