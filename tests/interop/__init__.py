"""Stock clients of libvirt's against our daemons: every verb, each version of the migration, every message broken."""
