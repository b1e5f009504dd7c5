"""What is read out of arguments; what is refused is in test_bad_input.py."""

import pytest

from mergekit_jax import checks


@pytest.mark.parametrize(
  'given, expected',
  [
    (1000, 1000),
    ('3 B', 3),
    ('1.5k', 1500),
    ('.5 MB', 500_000),
    ('4GB', 4_000_000_000),
    ('2tb', 2_000_000_000_000),
    ('1KiB', 1024),
    ('512MiB', 512 * 1024**2),
    ('1.5 gib', 3 * 512 * 1024**2),
    ('2Ti', 2 * 1024**4),
  ],
)
def test_sizes_are_bytes(given, expected):
  assert checks.size('memory_budget', given) == expected
