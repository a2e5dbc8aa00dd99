"""Rows in: from a file to checked conversations and pairs; nothing lost, accepted + quarantined = read."""
