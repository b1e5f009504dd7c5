"""What models are trained and scored on, whichever source it comes from."""
