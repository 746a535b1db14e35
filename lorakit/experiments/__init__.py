"""Experiments: grids of runs, their records, intervals and figures."""
