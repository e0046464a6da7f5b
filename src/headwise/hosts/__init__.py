"""Hosts: what serves models -> headwise's stages; one folder for each host, and the only ones that import it."""
