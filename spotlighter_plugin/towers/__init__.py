"""CLIP by name or file, and the prompts of the hosts."""
