"""Where the time of a forward pass goes: module by module, and operator by operator in a pass of its own."""
