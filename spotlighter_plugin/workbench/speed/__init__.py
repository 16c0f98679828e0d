"""Images a second, operations and memory, with and without the plug-in."""
