"""A folder of your own pictures: train on it, then name what is on others."""
