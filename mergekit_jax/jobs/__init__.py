"""What is merged into what: checked before it, and told after it."""
