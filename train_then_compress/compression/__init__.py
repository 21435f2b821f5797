"""Compression: recipes and the methods they are made of. A method is a module here named like its step."""
