"""A procedural micro-world: its plain-text corpus and text-to-text tasks."""
