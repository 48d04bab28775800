"""Drive QEMU over QMP: the driver that Ferryman opens for the scheme ``qemu``."""
