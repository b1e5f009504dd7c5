"""The configuration that lies beside the weights of a published model."""

import json
from typing import Any

NAME = 'config.json'
# As Transformers spells it up to version 4, and since.
_KEYS = ('torch_dtype', 'dtype')
_FLOATS = ('float64', 'float32', 'float16', 'bfloat16')
_FLOATS += ('float8_e4m3fn', 'float8_e5m2')


def with_dtype(content: bytes, dtype: str) -> bytes:
  """The configuration, naming another dtype of the weights.

  Transformers loads a model in the dtype that its configuration names. Models
  of several parts name one for each.

  Args:
    content: the file; what is no JSON is left as it is.
    dtype: name of the dtype that the floating-point weights now have.
  """

  def renamed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
      key: dtype if key in _KEYS and value in _FLOATS else value
      for key, value in pairs
    }

  try:
    configuration = json.loads(content, object_pairs_hook=renamed)
  except ValueError:
    return content
  return (json.dumps(configuration, indent=2) + '\n').encode()
