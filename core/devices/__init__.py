"""Devices: what is known of each, and how one that is not this machine is reached."""
