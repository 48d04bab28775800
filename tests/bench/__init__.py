"""Ferryman's benchmark, and the peers it is measured against."""
