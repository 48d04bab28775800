"""The demonstration: a running guest crosses from one host to another and back, and keeps counting."""
