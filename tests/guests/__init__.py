"""Guests to migrate, and the witness that watches them from outside the hypervisor.

:mod:`.counter` is one boot sector with memory that can be verified from a dump, :mod:`.linux` a Linux that
verifies its memory itself; :mod:`.witness` hears the ticks of either. Standard library only.
"""
