"""Conversations from files to rows: read, encoded, split, packed."""
