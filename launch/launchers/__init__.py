"""Launchers: one description of a job (job.py), and a small file for each way to start it."""
