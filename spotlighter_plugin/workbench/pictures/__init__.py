"""Lit tokens, embeddings and curves."""
