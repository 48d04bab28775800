"""Ferryman's place for Xen: the driver is not written yet.

This distribution registers no entry point, so installing it adds no scheme: opening ``xen:///`` fails as it
does without it.
"""
