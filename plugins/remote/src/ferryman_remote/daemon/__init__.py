"""The daemon: every installed driver behind libvirt's own wire, and behind Ferryman's.

::

    client --- link --- session --+-- libvirt's program: calls.py, moves.py --+
                                  |                                           +-- hosts.py --- ferryman.connect()
    host ----- link --- session --+-- Ferryman's program: session.py ---------+

A session is one client.  A host is open once, for as long as the daemon runs, whoever comes and goes.
"""
