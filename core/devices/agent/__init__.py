"""What runs on a device: one zipapp of the standard library alone, for the device's own Python from 3.8 on."""
