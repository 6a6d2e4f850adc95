"""The report: statistics over rows, the verdict in words, charts, and one self-contained HTML page."""
