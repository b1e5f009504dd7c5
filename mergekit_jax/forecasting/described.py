"""Models that are described by their shapes: plans without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mergekit_jax import checks, scopes, tree
from mergekit_jax.jobs import job
from mergekit_jax.planning import costs, planner
from mergekit_jax.planning.plan import Plan

_DTYPE = jnp.dtype('bfloat16')


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Sizes of a Llama-like decoder in bfloat16.

  Attributes:
    layers: number of layers.
    embed: width of the residual stream.
    mlp: width of the gated MLP.
    heads: query heads, of 128 each.
    kv_heads: key and value heads.
    vocab: rows of the embedding, and of the output layer.
    scanned: whether the layers are stacked on axis 1, as MaxText does.
  """

  layers: int
  embed: int
  mlp: int
  heads: int
  kv_heads: int
  vocab: int
  scanned: bool = False

  @property
  def stacked_axes(self) -> dict[str, int]:
    return {r'.*/layers/.*': 1} if self.scanned else {}

  @property
  def specs(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every leaf by its path."""
    shapes = self._stacked_shapes() if self.scanned else self._flat_shapes()
    return {p: jax.ShapeDtypeStruct(s, _DTYPE) for p, s in shapes.items()}

  @property
  def parameters(self) -> int:
    return sum(math.prod(spec.shape) for spec in self.specs.values())

  def _flat_shapes(self) -> dict[str, tuple[int, ...]]:
    """A leaf for each layer, heads joined, as Flax modules make them."""
    query, kv = 128 * self.heads, 128 * self.kv_heads
    layer = {
      'attention_norm/scale': (self.embed,),
      'attention/query/kernel': (self.embed, query),
      'attention/key/kernel': (self.embed, kv),
      'attention/value/kernel': (self.embed, kv),
      'attention/out/kernel': (query, self.embed),
      'mlp_norm/scale': (self.embed,),
      'mlp/gate/kernel': (self.embed, self.mlp),
      'mlp/up/kernel': (self.embed, self.mlp),
      'mlp/down/kernel': (self.mlp, self.embed),
    }
    return {
      'params/embed/embedding': (self.vocab, self.embed),
      **{
        f'params/layers_{number}/{path}': shape
        for number in range(self.layers)
        for path, shape in layer.items()
      },
      'params/norm/scale': (self.embed,),
      'params/head/kernel': (self.embed, self.vocab),
    }

  def _stacked_shapes(self) -> dict[str, tuple[int, ...]]:
    """All layers in one leaf, heads apart."""
    query = (self.embed, self.layers, self.heads, 128)
    kv = (self.embed, self.layers, self.kv_heads, 128)
    up = (self.embed, self.layers, self.mlp)
    layer = {
      'pre_self_attention_layer_norm/scale': (self.embed, self.layers),
      'self_attention/query/kernel': query,
      'self_attention/key/kernel': kv,
      'self_attention/value/kernel': kv,
      'self_attention/out/kernel': (self.heads, self.layers, 128, self.embed),
      'post_self_attention_layer_norm/scale': (self.embed, self.layers),
      'mlp/wi_0/kernel': up,
      'mlp/wi_1/kernel': up,
      'mlp/wo/kernel': (self.mlp, self.layers, self.embed),
    }
    return {
      'params/params/token_embedder/embedding': (self.vocab, self.embed),
      **{
        f'params/params/decoder/layers/{path}': shape
        for path, shape in layer.items()
      },
      'params/params/decoder/decoder_norm/scale': (self.embed,),
      'params/params/decoder/logits_dense/kernel': (self.embed, self.vocab),
    }


_64B = Decoder(80, 8192, 25_600, 64, 8, 128_256)

MODELS: Mapping[str, Decoder] = {
  '1b': Decoder(20, 2048, 5632, 16, 2, 32_000),
  '8b': Decoder(32, 4096, 14_336, 32, 8, 128_256),
  '24b': Decoder(40, 5120, 32_768, 32, 8, 131_072),
  '64b': _64B,
  'maxtext-64b': dataclasses.replace(_64B, scanned=True),
}


def model(name: str) -> Decoder:
  """The model of a name; ValueError with the nearest names if there is none."""
  return MODELS[checks.one_of('model', name, list(MODELS))]


def make_plan(
  specs: Mapping[str, jax.ShapeDtypeStruct],
  methods: Sequence[Any],
  experts: int,
  *,
  mesh: Mesh,
  hosts: int | None = None,
  memory_budget: int | str = '4GiB',
  stacked_axes: Mapping[str, int | tuple[int, ...]] | None = None,
  overrides: Mapping[str, Any] | None = None,
  dtype: Any = None,
  partition_rules: Mapping[str, PartitionSpec] | None = None,
) -> Plan:
  """Plans to merge experts of a described model, read beside their base.

  Args:
    specs: shape and dtype of every leaf by its path, for all models alike.
    methods: the rules, one for each merge that is made from one read.
    experts: how many experts there are.
    mesh: a mesh with Auto axes. Its devices are not used.
    hosts: over how many hosts they are spread; as they say themselves if None.
    memory_budget: for a host's share of the models.
    stacked_axes: as `merge_checkpoints` has them, as are all that follow.
    overrides: merges leaves differently.
    dtype: of the merged leaves.
    partition_rules: partition specs.

  Returns:
    The plan.
  """
  shapes = {path: spec.shape for path, spec in specs.items()}
  floating = tree.merged_shapes(specs)
  stacks = tree.stacked_axes(stacked_axes, floating)
  groups = scopes.group(methods, overrides, floating)
  merged = {path for _, paths in groups for path in paths}
  converted = job.floating(dtype)

  def leaf(path: str, models: int, dtype: jnp.dtype | None) -> costs.Leaf:
    stored = (specs[path].dtype,) * models
    stacked = stacks.get(path, ())
    return costs.Leaf(path, shapes[path], stored, dtype or stored[0], stacked)

  planned = [
    (rules, [leaf(path, 1 + experts, converted) for path in paths])
    for rules, paths in groups
  ]
  if copied := [leaf(path, 1, None) for path in specs if path not in merged]:
    planned.append(((), copied))
  return planner.make_plan(
    planned,
    mesh,
    memory_budget=checks.size('memory_budget', memory_budget),
    has_base=True,
    partition_rules=partition_rules,
    merges=len(methods),
    hosts=hosts,
  )
