"""How ``demo:moe`` was made: its text, its losses, its training loop and the gates it had to pass."""
