"""Folders and archives, as pairs of pictures."""
