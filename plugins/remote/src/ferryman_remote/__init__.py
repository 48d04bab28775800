"""Ferryman's place for remote hosts: neither the driver nor the daemon is written yet.

This distribution registers no entry point, so installing it adds no transport: opening
``qemu+tls://host/system`` fails as it does without it.
"""
