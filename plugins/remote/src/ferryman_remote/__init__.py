"""Ferryman's place for remote hosts: the codec of libvirt's RPC is there, neither the driver nor the daemon is yet.

This distribution registers no entry point, so installing it adds no transport: opening
``qemu+tls://host/system`` fails as it does without it.
"""
