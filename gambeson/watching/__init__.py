"""Reads what a run does while it goes on, here or elsewhere, and tells it; never writes below the run's folders."""
