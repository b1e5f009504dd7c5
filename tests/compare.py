"""Comparisons with the bounds that the design states."""

import numpy as np


def same_bits(got, expected):
  """Bitwise equality of two flat models, dtypes included."""
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    value, found = np.asarray(value), np.asarray(got[name])
    assert found.dtype == value.dtype, name
    assert found.shape == value.shape, name
    # As bytes: -0.0 is not 0.0, and a NaN is itself.
    assert found.tobytes() == value.tobytes(), name


def ulp(*arrays):
  """One float32 unit in the last place of the largest of some magnitudes."""
  largest = np.max([np.abs(np.asarray(a, np.float64)) for a in arrays], axis=0)
  return np.spacing(largest.astype(np.float32)).astype(np.float64)


def within_ulps(got, expected, ulps, *models):
  """|got - expected| <= ulps of max |.| over the models, element by element."""
  for name, value in expected.items():
    bound = ulps * ulp(*[model[name] for model in models])
    error = np.abs(np.asarray(got[name], np.float64) - value)
    assert (error <= bound).all(), (name, (error / bound).max())


def like_reference(got, expected, models):
  """Within float32 rounding of a float64 reference; bfloat16 rounds once more.

  Every step of a rule rounds relative to numbers no larger than the largest of
  its leaf; four units in the last place of that hold a chain of steps, and are
  a million times smaller than what one wrong mask or sign does.
  """
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    found = np.asarray(got[name])
    assert found.shape == value.shape, name
    if not value.size:
      continue
    largest = max(
      np.abs(np.asarray(m[name], np.float64)).max() for m in (*models, expected)
    )
    bound = 4 * ulp(largest)
    if found.dtype != np.float32:
      bound = bound + 2.0**-8 * np.abs(value)  # half a unit in the last place
    error = np.abs(found.astype(np.float64) - value)
    assert (error <= bound).all(), (name, (error / bound).max())
