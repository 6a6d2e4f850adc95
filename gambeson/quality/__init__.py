"""Measures of synthetic data: which images are worth keeping, told before training; each with its interval and space.

Samples of features come from space.py, numbers leave as `Measured` (measured.py); one file per family of measures.
"""
