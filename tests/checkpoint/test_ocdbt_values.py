"""Where OCDBT's values lie on disk, against what TensorStore reads."""

import numpy as np
import tensorstore as ts

from mergekit_jax.checkpoint import ocdbt_values


def written(path, values, **config):
  store = ts.KvStore.open(
    {'driver': 'ocdbt', 'base': f'file://{path}/', 'config': config}
  ).result()
  with ts.Transaction() as transaction:
    for key, value in values.items():
      store.with_transaction(transaction)[key] = value


def read(place):
  if isinstance(place, bytes):
    return place
  with open(place.file, 'rb') as file:
    file.seek(place.offset)
    return file.read(place.length)


def test_all_keys_of_a_deep_tree(tmp_path):
  """Nodes of 300 bytes: the tree has inner nodes, and keys share prefixes."""
  random = np.random.default_rng(0)
  values = {
    f'params.layer_{i:03d}.kernel/{i % 3}.0'.encode(): random.bytes(size)
    for i, size in enumerate(random.choice([3, 50, 500], 200))
  }
  written(
    tmp_path, values, max_decoded_node_bytes=300, max_inline_value_bytes=10
  )
  places = ocdbt_values.places(tmp_path)
  assert {key: read(place) for key, place in places.items()} == values
  assert {type(place) for place in places.values()} == {
    bytes,
    ocdbt_values.Extent,
  }


def test_the_latest_version(tmp_path):
  written(tmp_path, {b'a': b'x' * 2000, b'b': b'y' * 2000})
  written(tmp_path, {b'a': b'z' * 3000})
  places = ocdbt_values.places(tmp_path)
  assert {key: read(place) for key, place in places.items()} == {
    b'a': b'z' * 3000,
    b'b': b'y' * 2000,
  }
