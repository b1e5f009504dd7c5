"""Which boxes are read, in which order, and what each takes."""
