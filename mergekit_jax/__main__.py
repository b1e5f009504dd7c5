"""`python -m mergekit_jax` is `mergekit-jax`."""

from mergekit_jax import cli

cli.run()
