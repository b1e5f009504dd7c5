"""How a rule is driven over one box of one tensor, in memory and streamed."""
