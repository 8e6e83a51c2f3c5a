"""Runs, comparisons of runs, and reports on them; the command line and nothing else is built on this."""
