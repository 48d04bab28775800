"""Every option of migrations on real QEMU: what passes, what the plan refuses, and what fails without harm."""
