"""The method, in torch alone; one idea a file."""
