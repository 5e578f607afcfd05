"""Robust: averages that a few wrong gradients do not move far.

Look here when single tasks, or clients, may send outliers.
"""
