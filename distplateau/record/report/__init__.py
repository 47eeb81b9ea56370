"""The report of a run, or of several side by side: one HTML page and its figures."""
