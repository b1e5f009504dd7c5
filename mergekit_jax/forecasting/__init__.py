"""What a merge will need, before it starts."""
