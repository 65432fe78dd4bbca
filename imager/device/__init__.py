"""What is on this machine: identities, inventory, the write guard, loop devices.

Invariant: this wing imports the foundation and nothing else of the project,
and no device is written here but by code that says so in its name.
"""
