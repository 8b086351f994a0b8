"""Flights and folders: rigs that are calibrated once, lists of pairs, jobs that resume."""
