"""Processes, devices and locks: the only package that knows ranks, nodes and the launcher."""
