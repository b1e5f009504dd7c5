"""What a streamed merge refuses: with a message that says what to do, and with
nothing left at the output."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
from mergekit_jax import cli, sharding, streamed, verify
from mergekit_jax.checkpoint import replace, source
from mergekit_jax.command import flags
from mergekit_jax.jobs import job
from tests import checkpoints, compare, models

# Leaves in ascending order of size as well as of name.
SHAPES = {'a/kernel': (16, 24), 'b/kernel': (40, 50), 'odd': (7, 5)}
BASE, EXPERTS = models.trees(SHAPES)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(base, experts) as paths. No test may write there."""
  directory = tmp_path_factory.mktemp('saved')
  paths = checkpoints.save_set(directory, SHAPES)
  before = checkpoints.digest(directory)
  yield paths
  assert checkpoints.digest(directory) == before


@pytest.fixture
def merge(saved, tmp_path):
  """Merges the saved checkpoints into `out`, with other arguments."""

  def run(method=None, **arguments):
    base, experts = saved
    arguments = {
      'base': base,
      'experts': experts,
      'output': tmp_path / 'out',
      **arguments,
    }
    return mk.merge_checkpoints(method or mk.average(), **arguments)

  return run


@pytest.fixture
def refused(merge, tmp_path):
  """Demands that a merge raises and leaves the directory as it was.

  A merge that was under way may leave its stage, from which the same merge
  would go on.
  """

  def contents():
    files = checkpoints.digest(tmp_path).items()
    return {k: v for k, v in files if '/out.mergekit-tmp' not in k}

  def check(error, message, method=None, **arguments):
    before = contents()
    with pytest.raises(error) as caught:
      merge(method, **arguments)
    assert message in str(caught.value)
    assert contents() == before
    return str(caught.value)

  return check


def many(count):
  return {f'leaf_{i:02}': np.ones(3, np.float32) for i in range(count)}


def changed(tree, name, leaf):
  """The same tree with another leaf; None takes it away."""
  first, *rest = name.split('/')
  if rest:
    return tree | {first: changed(tree.get(first, {}), '/'.join(rest), leaf)}
  others = {key: value for key, value in tree.items() if key != first}
  return others if leaf is None else others | {first: leaf}


def test_a_jax_without_the_cpu(refused, monkeypatch):
  """Before anything is read: totals are answered there."""

  def without_cpu(*, backend=None):
    raise RuntimeError(f'Unknown backend {backend}')

  monkeypatch.setattr(jax, 'local_devices', without_cpu)
  refused(ValueError, 'leaves out the CPU', mk.ties())


class TestSources:
  @pytest.mark.parametrize('name', ['base', 'experts'])
  def test_missing(self, refused, tmp_path, name):
    path = tmp_path / 'nowhere'
    given = path if name == 'base' else [path]
    message = f'There is no checkpoint at {path}'
    refused(FileNotFoundError, message, **{name: given})

  @pytest.mark.parametrize(
    'given',
    [{'base': ''}, {'experts': ['']}, {'output': ''}, {'output': {'a': ''}}],
    ids=str,
  )
  def test_an_empty_path(self, refused, tmp_path, monkeypatch, given):
    """Not the working directory, even where that would do."""
    monkeypatch.chdir(tmp_path)
    checkpoints.save_safetensors(tmp_path / 'model.safetensors', BASE)
    model = {'base': None, 'experts': [tmp_path], 'overwrite': True}
    refused(ValueError, 'An empty path was given', **model | given)

  @pytest.mark.parametrize('given', ['closed', 'closed/base'])
  def test_without_permission(self, tmp_path, monkeypatch, given):
    """What may not be looked at is not missing."""
    checkpoints.save(tmp_path / 'closed' / 'base', BASE)
    stat = os.stat

    # In place of a mode, which does not close a directory to everyone.
    def denied(path, **options):
      if tmp_path / 'closed' in pathlib.Path(path).parents:
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))
      return stat(path, **options)

    monkeypatch.setattr(os, 'stat', denied)
    path = tmp_path / given
    with pytest.raises(PermissionError, match=f'Access to {path} was denied'):
      mk.open_checkpoint(path)

  @pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
  def test_a_file_beside_the_weights_that_cannot_be_read(
    self, merge, refused, tmp_path, monkeypatch, name
  ):
    """What is to be copied is asked for before hours of merging."""
    path = tmp_path / 'base'
    path.mkdir()
    checkpoints.save_safetensors(path / 'model.safetensors', BASE)
    for each in ('config.json', 'tokenizer.json', 'train.py'):
      (path / each).write_text('{}')
    monkeypatch.chdir(tmp_path)
    read_bytes = epath.Path.read_bytes

    # In place of a mode, which does not close a file to everyone.
    def denied(self):
      # Code that no configuration asks for is not copied.
      if self.name in (name, 'train.py'):
        raise PermissionError(errno.EACCES, 'Permission denied', self.name)
      return read_bytes(self)

    monkeypatch.setattr(epath.Path, 'read_bytes', denied)
    with monkeypatch.context() as patch:
      patch.setattr(mk.Checkpoint, 'read_parts', pytest.fail)
      message = refused(OSError, f'{path / name} cannot be read', base='base')
    assert 'Permission denied' in message
    merge(base='base', format='orbax')

  def test_not_a_checkpoint(self, refused, tmp_path):
    path = tmp_path / 'notes'
    path.mkdir()
    (path / 'readme.txt').write_text('nothing to merge')
    message = refused(ValueError, f'{path} is not a checkpoint', base=path)
    assert '_METADATA' in message and 'found: readme.txt' in message

  @pytest.mark.parametrize(
    'made, below, newest',
    [
      (['blobs/0', 'refs/main', 'snapshots/1a2b/x'], 'snapshots/1a2b', '1a2b'),
      (['checkpoint-500/x', 'runs/x'], 'checkpoint-500', 'checkpoint-500'),
      (
        ['checkpoint-1000/x', 'checkpoint-500/x', 'checkpoint-9'],
        'checkpoint-500 and checkpoint-1000',
        'checkpoint-1000',
      ),
      (['checkpoints/ckpt_2/x', 'train/x'], 'checkpoints', 'checkpoints'),
    ],
    ids=['cache', 'trainer', 'steps', 'run'],
  )
  def test_a_directory_above(self, refused, tmp_path, made, below, newest):
    """Of a model in Hugging Face's cache, or of what a trainer saves."""
    path = tmp_path / 'models--org--name'
    for name in made:
      (path / name).parent.mkdir(parents=True, exist_ok=True)
      (path / name).write_text('')
    message = f'{path} is not a checkpoint, but {below} in it may be. Give that'
    said = refused(ValueError, message, base=path)
    assert str(path) in said and said.endswith(f'/{newest}.')

  def test_the_index_of_shards(self, refused, tmp_path):
    arrays = {'w': np.ones(3, np.float32)}
    checkpoints.save_shards(tmp_path / 'shards', arrays)
    path = tmp_path / 'shards' / 'model.safetensors.index.json'
    message = f'{path} lists the files of a checkpoint. Give its directory: '
    message = refused(ValueError, message, base=path)
    assert message.endswith(f'{path.parent}.')

  def test_pickled(self, refused, tmp_path):
    path = tmp_path / 'torch'
    path.mkdir()
    (path / 'pytorch_model.bin').write_bytes(b'')
    message = refused(ValueError, 'is a PyTorch checkpoint', experts=[path])
    assert 'safetensors' in message

  @pytest.mark.parametrize(
    'name', ['checkpoint_3', 'flax_model.msgpack', 'checkpoint_7/checkpoint_7']
  )
  def test_msgpack(self, refused, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'..')
    refused(ValueError, 'is a flax msgpack file', base=path)
    refused(ValueError, 'is a flax msgpack file', base=path.parent)

  def test_pointer_of_git_lfs(self, refused, tmp_path):
    path = tmp_path / 'model.safetensors'
    path.write_text('version https://git-lfs.github.com/spec/v1\nsize 7\n')
    refused(ValueError, 'git lfs pull', base=path)

  def test_unfinished(self, refused, tmp_path):
    path = tmp_path / 'save.orbax-checkpoint-tmp'
    path.mkdir()
    refused(ValueError, 'was not finished', base=path)

  def test_different_trees(self, saved, refused, tmp_path):
    """One error that lists every path, before a byte of weights is read."""
    other = changed(EXPERTS[0], 'params/a/kernel', jnp.zeros((16, 23)))
    other = changed(other, 'params/b/kernel', None)
    other = changed(other, 'params/b/added', jnp.zeros(3))
    integers = changed(
      EXPERTS[1], 'params/odd', jnp.zeros((7, 5), dtype=jnp.int32)
    )
    paths = [
      checkpoints.save(tmp_path / 'other', other),
      saved[1][1],
      checkpoints.save(tmp_path / 'integers', integers),
    ]
    message = refused(ValueError, 'differ in 4 places', experts=paths)
    *lines, quantised, hint = message.splitlines()[1:]
    assert quantised.startswith('params/odd looks quantised: ')
    assert hint.startswith('What else is to be as the base has it')
    assert "overrides={'regular expression of its path': 'base'}" in hint
    assert lines == [
      '  params/a/kernel: float32[16,23] in experts[0], float32[16,24] '
      'expected',
      '  params/b/added: only in experts[0], float32[3]',
      '  params/b/kernel: missing in experts[0]',
      '  params/odd: int32[7,5] in experts[2], float32[7,5] expected',
    ]

  @pytest.mark.parametrize('quantised', ['base', 'experts'])
  def test_quantised(self, refused, tmp_path, quantised):
    """As the base has them, these leaves would not be merged at all."""
    codes = jax.tree.map(lambda leaf: leaf.astype(jnp.int8), BASE)
    path = checkpoints.save(tmp_path / 'codes', codes)
    given = {quantised: path if quantised == 'base' else [path]}
    message = refused(ValueError, 'a/kernel looks quantised: it', **given)
    assert message.endswith('Store all as floating-point numbers first.')
    assert 'override' not in message

  def test_different_in_one_leaf(self, refused, tmp_path):
    other = changed(EXPERTS[0], 'params/odd', jnp.zeros(3))
    path = checkpoints.save(tmp_path / 'other', other)
    message = refused(ValueError, 'differ in 1 place and', experts=[path])
    assert "--override 'REGEX:base'" in message

  @pytest.mark.parametrize('shared', [True, False])
  def test_many_differences(self, saved, refused, tmp_path, shared):
    renamed = {f'renamed_{key}': x for key, x in many(30).items()}
    both = {'norm': jnp.ones(3)} if shared else {}
    paths = [
      checkpoints.save(tmp_path / name, {'params': tree | both})
      for name, tree in (('one', many(30)), ('other', renamed))
    ]
    places = '60 places' if shared else '1 place'
    message = refused(
      ValueError, f'differ in {places}', base=paths[0], experts=paths[1:]
    )
    lines = message.splitlines()[1:-1]
    if shared:
      assert len(lines) == 60
    else:
      # Nothing is called alike: another layout, of perhaps 100,000 paths.
      (line,) = lines
      assert line == (
        '  experts[0] has none of the 30 paths expected: '
        f'params/{min(renamed)} is its first, params/{min(many(30))} that of '
        'the others'
      )

  @pytest.mark.parametrize('indexed', [True, False])
  def test_a_whole_model_beside_shards(self, refused, tmp_path, indexed):
    path = tmp_path / 'both'
    path.mkdir()
    tensors = {'w': np.ones(3, np.float32)}
    checkpoints.save_safetensors(path / 'model.safetensors', tensors)
    shard = 'model-00001-of-00001.safetensors'
    if indexed:  # else what is left of an earlier save
      checkpoints.save_safetensors(path / shard, tensors)
    index = {'weight_map': {'w': shard}}
    (path / 'model.safetensors.index.json').write_text(json.dumps(index))
    refused(ValueError, 'holds model.safetensors, which is a model', base=path)
    index = {'weight_map': {'w': 'model.safetensors'}}
    (path / 'model.safetensors.index.json').write_text(json.dumps(index))
    assert [*mk.open_checkpoint(path).specs] == ['w']

  def test_a_header_that_is_nested_without_end(self, refused, tmp_path):
    path = tmp_path / 'model.safetensors'
    path.write_bytes((200_000).to_bytes(8, 'little') + b'[' * 200_000)
    refused(ValueError, 'its header is malformed', base=path)

  @pytest.mark.parametrize(
    'file, name',
    [
      ('adapter_model', 'q_proj.lora_A.weight'),
      ('adapter_model', 'k_proj.ia3_l'),
      ('model', 'q_proj.lora_A.default.weight'),
    ],
  )
  def test_an_adapter_among_models(self, refused, tmp_path, file, name):
    path = tmp_path / 'adapter'
    path.mkdir()
    factor = {name: np.ones((2, 3))}
    checkpoints.save_safetensors(path / f'{file}.safetensors', factor)
    (path / 'adapter_config.json').write_text('{}')
    refused(ValueError, 'adapter) is a PEFT adapter', experts=[path])

  @pytest.mark.parametrize('name', ['base', 'experts'])
  @pytest.mark.parametrize('whole', [True, False])
  def test_factors_of_adapters(self, refused, tmp_path, name, whole):
    """Left out as other leaves may be, they took along what was learned."""
    factor = 'params/a/kernel_lora_a'
    tree = changed(EXPERTS[0] if whole else {}, factor, jnp.ones((16, 2)))
    path = checkpoints.save(tmp_path / 'adapted', tree)
    given = {name: path if name == 'base' else [path]}
    message = refused(ValueError, f'{factor} is called like a', **given)
    assert message.endswith('Put each adapter into its model first.')
    assert 'override' not in message

  @pytest.mark.parametrize('adapter', [False, True])
  def test_what_an_adapter_has_left_in_its_model(
    self, merge, tmp_path, adapter
  ):
    path = tmp_path / 'whole'
    path.mkdir()
    checkpoints.save_safetensors(path / 'model.safetensors', EXPERTS[0])
    (path / 'adapter_config.json').write_text('{}')
    if adapter:
      factor = {'q_proj.lora_A.weight': np.ones((2, 3))}
      checkpoints.save_safetensors(path / 'adapter_model.safetensors', factor)
    report = merge(experts=[path])
    assert len(report.tensors) == len(SHAPES)

  def test_none(self, refused):
    refused(ValueError, 'give a list of at least one', experts=[])

  def test_one_path_for_a_list(self, saved, refused):
    path = saved[1][0]
    for experts in (path, str(path), {'one': path}):
      refused(ValueError, 'give a list, with a tree', experts=experts)

  @pytest.mark.parametrize(
    'method',
    [mk.ties(), mk.dare(), mk.dare_ties(), mk.task_arithmetic()],
    ids=['ties', 'dare', 'dare_ties', 'task_arithmetic'],
  )
  def test_no_base(self, refused, method):
    refused(ValueError, 'but no base was given', method, base=None)


class TestArguments:
  @pytest.mark.parametrize('density', [0, -0.1, 1.01, np.nan, '0.2'])
  @pytest.mark.parametrize('method', [mk.ties, mk.dare_ties])
  def test_density(self, method, density):
    with pytest.raises(ValueError, match=r'density=.* was given; .*'):
      method(density=density)

  @pytest.mark.parametrize('rate', [1, 1.5, -0.1, np.nan, None])
  @pytest.mark.parametrize('method', [mk.dare, mk.dare_ties])
  def test_drop_rate(self, method, rate):
    with pytest.raises(ValueError, match=r'drop_rate=.* was given; .*'):
      method(drop_rate=rate)

  @pytest.mark.parametrize('method', [mk.ties, mk.dare_ties])
  def test_scope(self, method):
    """Not even None, which to a chain is the widest scope of its stages."""
    with pytest.raises(ValueError, match="scope=None was .* 'tensor', 'model'"):
      method(scope=None)

  @pytest.mark.parametrize('scale', [np.inf, -np.inf, np.nan, '1', True])
  @pytest.mark.parametrize(
    'method', [mk.ties, mk.dare, mk.dare_ties, mk.task_arithmetic]
  )
  def test_scale(self, method, scale):
    with pytest.raises(ValueError, match=r'scale=.* was given; give a'):
      method(scale=scale)

  @pytest.mark.parametrize(
    'method',
    [mk.average([1, 2]), mk.task_arithmetic(weights=[1, 2, 3, 4])],
    ids=['too_few', 'too_many'],
  )
  def test_number_of_weights(self, refused, method):
    message = refused(ValueError, 'weights were given for 3 experts', method)
    assert 'one weight for each expert' in message

  def test_iterators(self):
    values = {'math': 0.2, 'code': 0.3, 'law': 0.5}.values()
    merged = mk.merge(mk.average(values), (e for e in EXPERTS), BASE)
    expected = mk.merge(mk.average([0.2, 0.3, 0.5]), EXPERTS, BASE)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)

  @pytest.mark.parametrize('weights', [0.5, jnp.float32(0.5), None])
  def test_one_weight(self, weights):
    if weights is None:
      assert mk.ties(weights=None) == mk.ties()
      return
    with pytest.raises(ValueError, match='give one number an expert'):
      mk.ties(weights=weights)

  def test_hyperparameters_in_a_row(self):
    """Many values at once, to be mapped over."""
    scales = jnp.array([0.5, 1.0])
    rules = mk.dare(drop_rate=jnp.array([0.1, 0.2]), scale=scales)
    merged = jax.vmap(lambda rule: mk.merge(rule, EXPERTS, BASE, key=0))(rules)
    assert merged['params']['odd'].shape == (2, 7, 5)
    with pytest.raises(ValueError, match='a fraction in'):
      mk.dare(drop_rate=jnp.array([0.1, 1.5]))

  @pytest.mark.parametrize(
    'stages', [(lambda t, d: d, mk.weighted_sum()), (mk.weighted_sum,)]
  )
  def test_stages_that_are_no_rules(self, stages):
    with pytest.raises(ValueError, match='decorated with @mergekit_jax.rule'):
      mk.chain(*stages)

  def test_chain_without_consensus(self):
    with pytest.raises(ValueError, match='end with 3 task vectors; end with a'):
      mk.merge(mk.chain(mk.trim(0.2)), EXPERTS, BASE)

  def test_chain_that_scales_before_its_consensus(self):
    with pytest.raises(ValueError, match='given 3 task vectors; put a consens'):
      mk.merge(mk.chain(mk.trim(0.2), mk.scale(0.5)), EXPERTS, BASE)

  @pytest.mark.parametrize(
    'stage',
    [mk.trim(0.2), mk.drop(0.5), mk.weighted_sum(), mk.disjoint_mean()],
    ids=repr,
  )
  def test_chain_that_goes_on_behind_its_consensus(self, stage):
    chain = mk.chain(mk.weighted_sum(), stage)
    with pytest.raises(ValueError, match='Put it before the consensus'):
      mk.merge(chain, EXPERTS, BASE, key=0)

  @pytest.mark.parametrize('experts', [EXPERTS[0], 7, 'path'])
  def test_one_expert_alone(self, experts):
    with pytest.raises(ValueError, match='give a list, with a tree'):
      mk.merge(mk.average(), experts)

  def test_trees_where_paths_belong_and_paths_where_trees_do(self, saved):
    base, experts = saved
    with pytest.raises(ValueError, match='call mergekit_jax.merge_checkpoints'):
      mk.merge(mk.average(), experts, base)
    with pytest.raises(ValueError, match='call mergekit_jax.merge_checkpoints'):
      mk.merge(mk.average(), [str(experts[0])])
    with pytest.raises(ValueError, match=r'experts\[0\] is a dict; give the'):
      mk.merge_checkpoints(mk.average(), experts=EXPERTS, output='out')

  def test_mesh_that_is_none(self, refused):
    refused(ValueError, 'give a jax.sharding.Mesh', mesh={'fsdp': 2})

  def test_not_a_rule(self, refused):
    refused(ValueError, "'ties' was given", 'ties')

  @pytest.mark.parametrize('stage', [mk.trim(0.2), mk.weighted_sum()], ids=repr)
  def test_a_stage_in_place_of_a_rule(self, refused, stage):
    message = f'; {type(stage).__name__} is a stage, which takes task vectors.'
    refused(ValueError, f'A method is a rule{message}', stage)
    refused(ValueError, message, overrides={'.*': stage})
    with pytest.raises(ValueError, match=message):
      mk.merge(stage, EXPERTS, BASE)

  @pytest.mark.parametrize('method', [mk.ties(), mk.average()], ids=repr)
  def test_a_rule_in_place_of_a_stage(self, method):
    with pytest.raises(ValueError, match='is a whole method: merge by it'):
      mk.chain(mk.trim(0.2), method)

  @pytest.mark.parametrize(
    'name', ['overrides', 'stacked_axes', 'partition_rules']
  )
  def test_regex(self, refused, name):
    value = {
      'overrides': 'base',
      'stacked_axes': 0,
      'partition_rules': jax.P(),
    }[name]
    message = refused(
      ValueError,
      f"{name}: 'params/od' matches no path",
      **{name: {'params/.*': value, 'params/od': value}},
    )
    assert "Did you mean 'params/odd'" in message
    message = f"{name}: 'params/(' is not a regular expression"
    refused(ValueError, message, **{name: {'params/(': value}})

  @pytest.mark.parametrize(
    'name', ['overrides', 'stacked_axes', 'partition_rules']
  )
  def test_rules_that_are_no_dictionary(self, refused, name):
    message = f"{name}=[('.*', 0)] was given; give a dictionary"
    refused(ValueError, message, **{name: [('.*', 0)]})

  @pytest.mark.parametrize(
    'name', ['overrides', 'stacked_axes', 'partition_rules']
  )
  @pytest.mark.parametrize('expression', [1, re.compile('.*')], ids=str)
  def test_expressions_that_are_no_text(
    self, refused, tmp_path, name, expression
  ):
    message = f'{name}: {expression!r} was given for a regular expression; give'
    refused(ValueError, message, **{name: {expression: 'base'}})
    assert not [*tmp_path.iterdir()]
    if name != 'partition_rules':
      with pytest.raises(ValueError, match=re.escape(message)):
        mk.merge(mk.average(), EXPERTS, **{name: {expression: 'base'}})

  def test_an_override_that_comes_too_late(self, refused):
    message = refused(
      ValueError,
      "'params/odd' comes too late",
      overrides={'.*': 'base', 'params/odd': mk.average()},
    )
    assert 'Put it before' in message

  @pytest.mark.parametrize('value', [0.5, None, np.ones(2)], ids=str)
  def test_override_that_is_no_rule(self, refused, value):
    refused(ValueError, "An override is 'base' or", overrides={'.*': value})

  def test_stacked_axis(self, refused):
    message = refused(
      ValueError, 'params/odd has shape (7, 5)', stacked_axes={'.*/odd': 2}
    )
    assert 'no axis (2,)' in message
    for axes in (0.5, '1'):
      refused(ValueError, 'and no axis', stacked_axes={'.*/odd': axes})

  @pytest.mark.parametrize(
    'spec',
    [
      *(jax.P('expert'), jax.P(None, None, None), jax.P('fsdp', 'fsdp')),
      *(None, 'fsdp', 0, jax.P(jax.P.UNCONSTRAINED), [0], [([],)]),
    ],
    ids=repr,
  )
  def test_partition_rule_that_does_not_fit(self, refused, spec):
    message = refused(
      ValueError,
      f'{spec!r} does not fit params/odd',
      partition_rules={'.*/odd': spec},
    )
    assert '(7, 5)' in message and 'Give a PartitionSpec' in message

  @pytest.mark.parametrize(
    'budget', ['', '-1', 'four GiB', '4 gigs', '1.2.3GiB', '.', None, 'MiB']
  )
  def test_malformed_memory_budget(self, refused, budget):
    message = f'memory_budget={budget!r} was given'
    message = refused(ValueError, message, memory_budget=budget)
    assert '512MiB' in message

  def test_small_memory_budget(self, merge, refused, tmp_path):
    """What the error says is needed is exactly enough."""
    message = refused(ValueError, 'is too small', memory_budget=1000)
    needed = int(
      re.search(r'takes ([\d,]+) bytes', message)[1].replace(',', '')
    )
    refused(ValueError, 'is too small', memory_budget=needed - 1)
    merge(memory_budget=needed)
    assert (tmp_path / 'out').exists()
    rounded_up = re.search(r'at least that \((\w+)\)\.', message)[1]
    merge(memory_budget=rounded_up, overwrite=True)

  @pytest.mark.parametrize('dtype', ['float31', 'int8'])
  def test_dtype(self, refused, dtype):
    """Weights rounded to integers would be no model."""
    refused(ValueError, dtype, dtype=dtype)

  @pytest.mark.parametrize('dtype', ['f8', 'f2', 'd', 'e', '>f4', ''])
  def test_a_code_for_a_dtype(self, refused, dtype):
    """To numpy f8 is float64, and who writes it may mean 8 bits."""
    message = f'dtype={dtype!r} was given; give a floating-point dtype by its'
    assert "'float8_e4m3fn'" in refused(ValueError, message, dtype=dtype)

  @pytest.mark.parametrize('dtype', ['f16', 'float128'])
  def test_a_dtype_that_jax_has_not(self, refused, dtype):
    refused(ValueError, 'was given; give a floating-point dtype', dtype=dtype)

  @pytest.mark.parametrize(
    'dtype, name',
    [
      ('bf16', 'bfloat16'),
      ('fp16', 'float16'),
      ('fp32', 'float32'),
      ('float8_e5m2', 'float8_e5m2'),
      (jnp.bfloat16, 'bfloat16'),
      (np.dtype('float64'), 'float64'),
    ],
    ids=str,
  )
  def test_names_of_a_dtype(self, merge, tmp_path, dtype, name):
    merge(dtype=dtype)
    written = mk.open_checkpoint(tmp_path / 'out').specs['params/odd']
    assert written.dtype.name == name

  def test_format(self, refused):
    refused(ValueError, "format='gguf' was given", format='gguf')

  def test_an_empty_leaf_in_orbax(self, refused, merge, tmp_path, monkeypatch):
    """No option leaves it out; it is refused before a stage is made."""
    model = tmp_path / 'model.safetensors'
    checkpoints.save_safetensors(model, {'a': np.ones(2), 'z': np.ones((0, 3))})
    merge(base=None, experts=[model])
    what_to_do = 'Write safetensors, or take it out of the base'
    monkeypatch.setattr(streamed, 'staged', pytest.fail)
    for overrides in (None, {'z': 'base'}):
      message = refused(
        *(ValueError, 'z is empty (shape (0, 3)), and Orbax cannot store'),
        base=model,
        experts=[model],
        format='orbax',
        output=tmp_path / 'new',
        overrides=overrides,
      )
      assert what_to_do in message

  def test_mesh_larger_than_the_devices(self):
    with pytest.raises(ValueError) as caught:
      sharding.make_mesh({'fsdp': 8, 'tensor': 2})
    assert 'needs 16 devices, but there are 8' in str(caught.value)
    assert '--devices 16' in str(caught.value)

  @pytest.mark.parametrize('sizes', [{'a': 0}, {'a': -1, 'b': -1}])
  def test_mesh_without_devices(self, sizes):
    with pytest.raises(ValueError, match='has an axis without devices'):
      sharding.make_mesh(sizes)

  def test_array_of_scales(self, refused):
    message = 'scale is an array of shape (2,); a merge takes one number'
    refused(ValueError, message, mk.ties(scale=np.ones(2)))

  @pytest.mark.parametrize('seed', [-1, 2**32, 1.5, True, '5'])
  def test_seed(self, refused, seed):
    message = f'={seed!r} was given; give a whole number from 0 to 2**32 - 1'
    refused(ValueError, f'seed{message}', seed=seed)
    with pytest.raises(ValueError, match=re.escape(f'seed{message}')):
      mk.sweep({'a': mk.dare()}, EXPERTS, BASE, lambda tree: tree, seed=seed)
    with pytest.raises(ValueError, match=re.escape(f'key{message}')):
      mk.merge(mk.dare(), EXPERTS, BASE, key=seed)

  @pytest.mark.parametrize('seed', [2**32 + 1, -1])
  def test_seed_in_an_array(self, seed):
    with pytest.raises(ValueError, match='give a whole number from 0 to'):
      mk.merge(mk.dare(), EXPERTS, BASE, key=np.array(seed))

  def test_nothing_but_an_optimizer(self, refused, tmp_path):
    moments = {'opt_state': {'mu': np.ones(3)}}
    path = checkpoints.save(tmp_path / 'moments', moments)
    refused(ValueError, 'has nothing to merge', base=None, experts=[path])

  def test_an_axis_beyond_32_bits(self):
    long = {'a': jax.ShapeDtypeStruct((2**31,), jnp.int8)}
    with pytest.raises(ValueError, match='a has shape .* an axis of 2'):
      job.demand_short_axes(long)
    job.demand_short_axes({'a': jax.ShapeDtypeStruct((2**31 - 1, 9), jnp.int8)})


class TestCommandLine:
  """The same in the words of the command line."""

  def check(self, message, *arguments):
    parsed = cli.parse(['', 'plan', '--experts', 'x', *arguments])
    with pytest.raises(ValueError) as caught:
      flags.what_to_merge(parsed)
    assert message in str(caught.value)

  def test_method(self):
    self.check("Did you mean 'ties'", '--method', 'tis')
    self.check("Did you mean 'average'", '--method', 'avarage')
    self.check("Did you mean 'ties'", '--method', 'TIES')

  def test_names_of_mergekit(self):
    """Only where its name is none here: TIES has a density."""
    calls = 'What mergekit calls '
    self.check(f'{calls}linear is average here.', '--method', 'linear')
    self.check(f'{calls}dare_linear is dare here.', '--method', 'dare_linear')
    self.check(
      f'{calls}lambda is scale here.', '--method=ties', '--set=lambda=0.3'
    )
    self.check(
      f'{calls}normalize is combine here. True is combine=mean, false combine=',
      *('--method=dare_ties', '--set=normalize=true'),
    )
    drop = f'{calls}density is 1 - drop_rate here.'
    self.check(drop, '--method=dare', '--set=density=0.3')
    self.check(drop, '--method=dare', '--sweep=density=0.3,0.5')
    self.check(drop, '--method=dare', '--override=.*:density=0.3')
    what = ['plan', '--method=ties', '--set=density=0.3', '--experts=x']
    flags.what_to_merge(cli.parse(['', *what]))

  def test_option(self):
    self.check(
      "Did you mean 'density'", '--method', 'ties', '--set', 'densty=0.2'
    )
    self.check(
      "average has no option 'density'; there is weights",
      *('--method', 'average', '--set', 'density=0.2'),
    )

  def test_value(self):
    self.check('density=2.0 was given', '--method=ties', '--set=density=2')
    self.check(
      "scope='models' was given", '--method=ties', '--set=scope=models'
    )
    self.check('scope=None was given', '--method=ties', '--set=scope=none')
    self.check(
      'density=3.0 was given', '--method=ties', '--override=.*:density=3'
    )

  def test_which_method_refuses_a_value(self):
    methods = ['--method', 'task_arithmetic', 'ties', 'average']
    self.check(
      'ties: weights=(1.0, -0.5) were given; this method divides by their sum',
      *(*methods, '--weights', '1', '-0.5'),
    )

  def test_malformed(self):
    self.check("--set 'density' was", '--method=ties', '--set=density')
    self.check("--override '.*' was", '--method=ties', '--override=.*')
    self.check("--stacked_axes 'x' was", '--method=ties', '--stacked_axes=x')
    self.check(
      "--stacked_axes: 'one' was given",
      *('--method=ties', '--stacked_axes=.*=one'),
    )
    self.check("--mesh 'fsdp' was", '--method=ties', '--mesh=fsdp')
    self.check(
      "--partition_rules 'x' was", '--method=ties', '--partition_rules=x'
    )
    self.check(
      "--weights: 'x' was given", '--method=ties', '--weights', '0.3,x'
    )
    self.check(
      "--override 'scale' was", '--method=ties', '--override=.*:density=1,scale'
    )

  @pytest.mark.parametrize(
    'given, message',
    [
      ('--set=weights=0.1,0.9', 'Give them with --weights W1 W2'),
      ('--sweep=weights=0.1,0.9', 'give merge_checkpoints or sweep {name:'),
      ('--override=.*:weights=0.1,0.9', 'overrides={regex: mk.ties(weights='),
    ],
  )
  def test_weights_as_an_option(self, given, message):
    """Named is what was given, and it cannot all be done here."""
    flag = given.split('=')[0]
    self.check(f'{flag} takes no weights. ', '--method=ties', given)
    self.check(message, '--method=ties', given)

  @pytest.mark.parametrize(
    'given',
    [
      ['--set', 'scale=0.3', 'scale=0.5'],
      ['--set', 'scale=0.3', '--set', 'scale=0.5'],
      ['--sweep', 'scale=0.3,0.5', '--sweep', 'scale=1'],
      ['--set', 'scale=7', '--sweep', 'scale=0.1,0.2'],
      ['--override', '.*:scale=1,scale=2'],
    ],
  )
  def test_an_option_that_is_given_twice(self, given):
    self.check('scale was given twice', '--method=ties', *given)

  @pytest.mark.parametrize(
    'flag, rules',
    [
      ('override', ['.*/emb:base', '.*/emb:density=0.5']),
      ('stacked_axes', ['.*/emb=0', '.*/emb=1']),
      ('partition_rules', ['.*/emb=-,fsdp', '.*/emb=fsdp']),
    ],
  )
  def test_an_expression_that_is_given_twice(self, flag, rules):
    """The first match wins, and the last one must not replace it."""
    message = f"--{flag} names '.*/emb' twice; give it once."
    self.check(message, '--method=ties', f'--{flag}', *rules)
    apart = [x for rule in rules for x in (f'--{flag}', rule)]
    self.check(message, '--method=ties', *apart)

  def test_experts_that_are_joined_by_commas(self, tmp_path):
    given = ['--method=ties', '--experts', 's3://bucket/a,s3://bucket/b']
    message = "--experts 's3://bucket/a,s3://bucket/b' was given"
    self.check(f'{message}; separate experts by spaces', *given)
    self.check('separate experts', '--method=ties', '--experts=a,b')
    (tmp_path / 'a,b').mkdir()
    given[-1] = str(tmp_path / 'a,b')
    flags.what_to_merge(cli.parse(['', 'plan', *given]))

  def test_a_value_that_is_swept_twice(self):
    self.check('same merge twice', '--method=ties', '--sweep=scale=0.3,0.30')

  def test_flags_that_are_repeated_add_up(self):
    parsed = cli.parse(
      ['', 'plan', '--experts', 'x', '--experts', 'y', 'z']
      + ['--method', 'ties', '--method', 'dare', '--seed', '1', '--seed', '2']
      + ['--weights', '0.3,0.4', '--weights', '0.5']
    )
    assert parsed.experts == ['x', 'y', 'z']
    what = flags.what_to_merge(parsed)
    seeded = flags.seeded(parsed, what['methods'], 3)
    assert [*seeded] == ['ties', 'dare-seed=1', 'dare-seed=2']
    ties, _ = seeded['ties']
    assert [x for x in jax.tree.leaves(ties) if 0.2 < x < 1] == [0.3, 0.4, 0.5]

  def test_a_merge_can_be_planned_as_it_is(self):
    merging = [
      '--method=ties',
      '--experts',
      'x',
      '--output',
      'y',
      '--overwrite',
    ]
    assert cli.parse(['', 'plan', *merging, '--overwrite']).experts == ['x']
    with pytest.raises(SystemExit):
      cli.parse(['', 'merge', *merging[:3]])

  @pytest.mark.parametrize(
    'given',
    [
      ['merge', '--method=ties', '--experts=x', '--output='],
      ['merge', '--method=ties', '--experts', 'x', '', '--output=y'],
      ['plan', '--method=ties', '--experts=x', '--base='],
      ['inspect', ''],
      ['verify', ''],
    ],
    ids=' '.join,
  )
  def test_an_empty_path(self, given, capsys):
    with pytest.raises(SystemExit):
      cli.parse(['', *given])
    assert ': an empty path was given' in capsys.readouterr().err

  def test_seed(self):
    parsed = cli.parse(
      ['', 'plan', '--method=dare', '--seed', '1', '-1', '--experts', 'x']
    )
    with pytest.raises(ValueError, match='seed=-1 was given'):
      flags.seeded(parsed, {'': mk.dare()}, 1)

  def test_mesh(self):
    self.check(
      'needs 12 devices, but there are 8',
      *('--method=ties', '--mesh=fsdp=6,tensor=2'),
    )


class TestOutput:
  @pytest.mark.parametrize(
    ('given', 'message'),
    [
      (None, 'output is a NoneType; give the path of a new checkpoint'),
      (b'out', 'output is a bytes; give'),
      ([pathlib.Path('out')], 'output is a list; give'),
      ({'a': 'out', 'b': None}, "output['b'] is a NoneType; give"),
    ],
  )
  def test_no_path(self, refused, given, message):
    refused(ValueError, message, output=given)

  def test_an_empty_directory_is_free(self, merge, tmp_path):
    (tmp_path / 'out').mkdir()
    report = merge()
    assert checkpoints.load(report.output).keys() >= {'params/odd'}

  def test_exists(self, saved, refused, tmp_path):
    output = checkpoints.save(tmp_path / 'out', EXPERTS[0])
    message = refused(FileExistsError, f'{output} exists')
    assert '--overwrite' in message

  def test_overwrite(self, saved, merge, tmp_path):
    output = checkpoints.save(tmp_path / 'out', {'params': {'old': np.ones(3)}})
    merge(mk.average([1, 0, 0]), overwrite=True)
    base, experts = models.flat(SHAPES)
    merged = checkpoints.load(output)
    assert merged.keys() == {
      *(f'params/{name}' for name in SHAPES),
      'params/steps',
    }
    np.testing.assert_array_equal(merged['params/odd'], experts[0]['odd'])
    assert {path.name for path in tmp_path.iterdir()} == {
      'out',
      'out.report.json',
    }

  def test_overwrite_is_put_off_until_the_merge_is_complete(
    self, saved, merge, tmp_path, monkeypatch
  ):
    """The old checkpoint lies untouched while the new one is written."""
    output = checkpoints.save(tmp_path / 'out', EXPERTS[0])
    before = checkpoints.digest(output)
    seen = []
    run = mk.streamed.stream.run

    def spy(*arguments, **options):
      result = run(*arguments, **options)
      seen.append(checkpoints.digest(output))
      return result

    monkeypatch.setattr(mk.streamed.stream, 'run', spy)
    merge(overwrite=True)
    assert seen == [before]
    assert checkpoints.digest(output) != before

  def test_overwrite_of_what_cannot_be_removed(
    self, merge, tmp_path, monkeypatch, caplog
  ):
    """The merge is done, says where the rest lies, and is not gone on with."""
    output = checkpoints.save(tmp_path / 'out', EXPERTS[0])
    old = tmp_path / 'out.mergekit-old'
    remove = replace.remove

    # In place of a mode, which does not protect a directory from everyone.
    def denied(path):
      if path == old and old.exists():
        raise PermissionError(errno.EACCES, 'Permission denied', '_METADATA')
      remove(path)

    with monkeypatch.context() as patch:
      patch.setattr(replace, 'remove', denied)
      with caplog.at_level('WARNING', logger='absl'):
        merge(overwrite=True)
      assert f'{output} was replaced and is complete' in caplog.text
      said = f'{old}, could not be removed: [Errno 13] Permission denied'
      assert caplog.text.count(said) == 1
      assert 'The merge stopped' not in caplog.text
      left = {'out', 'out.report.json', 'out.mergekit-old'}
      assert {path.name for path in tmp_path.iterdir()} == left
      assert verify.verify(output) == []
      # Again, it would be in the way: that is said before anything is read.
      patch.setattr(mk.Checkpoint, 'read_parts', pytest.fail)
      with pytest.raises(OSError, match=f'{old}, could not be removed'):
        merge(mk.average([1, 0, 0]), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == left
    assert verify.verify(output) == []
    merge(mk.average([1, 0, 0]), overwrite=True)
    left.remove('out.mergekit-old')
    assert {path.name for path in tmp_path.iterdir()} == left

  def test_overwrite_that_fails_midway(self, refused, tmp_path, saved):
    """The NaN is in the last tensor: the others were written before."""
    bad = EXPERTS[0]['params']['odd'].at[6, 4].set(np.nan)
    bad = changed(EXPERTS[0], 'params/odd', bad)
    path = checkpoints.save(tmp_path / 'bad', bad)
    checkpoints.save(tmp_path / 'out', EXPERTS[0])
    refused(FloatingPointError, 'odd', experts=[path], overwrite=True)

  def test_overwrite_of_what_is_damaged(self, refused, tmp_path):
    output = checkpoints.save(tmp_path / 'out', EXPERTS[0])
    os.truncate(output / '_METADATA', 9)
    refused(FileExistsError, 'delete it yourself', overwrite=True)

  @pytest.mark.parametrize(
    'made, found',
    [
      (['thesis.tex', 'work.txt'], 'thesis.tex'),
      (['a.safetensors', 'b.safetensors'], 'one of which it cannot be told'),
      (['7/_CHECKPOINT_METADATA'], '7/no item'),
      ([], 'a file'),
    ],
  )
  def test_overwrite_of_something_else(self, refused, tmp_path, made, found):
    """A mistyped path must not cost somebody a home directory."""
    output = tmp_path / 'out'
    for name in made:
      (output / name).parent.mkdir(parents=True, exist_ok=True)
      (output / name).write_text('years of work')
    if not made:
      output.write_text('years of work')
    message = f'{output} exists and is not a checkpoint and nothing else (found'
    refused(FileExistsError, f'{message} {found}', overwrite=True)

  @pytest.mark.parametrize('format', [None, 'safetensors'])
  def test_called_like_an_unfinished_save(
    self, refused, tmp_path, monkeypatch, format
  ):
    """Which no command would read; it is refused before a stage is made."""
    monkeypatch.setattr(streamed, 'staged', pytest.fail)
    output = tmp_path / 'x.orbax-checkpoint-tmp-1'
    message = f'output={output} would be taken for a save that Orbax has not'
    refused(ValueError, message, output=output, format=format)

  @pytest.mark.parametrize('name', ['run[1]', 'all*/out', 'run?'])
  def test_that_orbax_takes_for_a_pattern(
    self, saved, refused, merge, tmp_path, monkeypatch, name
  ):
    """It would find no arrays below it, and write a checkpoint without."""
    output, link = tmp_path / name, tmp_path / 'link'
    output.mkdir(parents=True)
    link.symlink_to(output)
    with monkeypatch.context() as patch:
      patch.setattr(mk.Checkpoint, 'read_into', pytest.fail)
      for given in (output, link):
        message = refused(ValueError, f'written to {output}: ', output=given)
        assert "format='safetensors'" in message
    merge(output=output, format='safetensors')
    assert verify.verify(output) == []

  def test_below_a_link_without_the_characters_of_a_pattern(
    self, merge, tmp_path
  ):
    """What counts is where the output lies in the end."""
    (tmp_path / 'plain').mkdir()
    (tmp_path / 'run[1]').symlink_to('plain')
    merge(output=tmp_path / 'run[1]' / 'out')
    assert verify.verify(tmp_path / 'plain' / 'out') == []

  def test_beside_sources_whose_paths_look_like_patterns(
    self, saved, merge, tmp_path
  ):
    base, experts = saved
    for number, path in enumerate((base, *experts)):
      shutil.copytree(path, tmp_path / '[s]*?' / str(number))
    base, *experts = sorted((tmp_path / '[s]*?').iterdir())
    merge(output=tmp_path / 'other', base=base, experts=experts)
    merge()
    compare.same_bits(
      *(checkpoints.load(tmp_path / name) for name in ('out', 'other'))
    )

  def test_touches_an_input(self, saved, refused):
    base, experts = saved
    for output in [
      base,
      experts[2],
      base / 'merged',
      experts[0] / 'a' / 'b',
      base.parent,
      base.parent / 'x' / '..' / 'base',
    ]:
      message = refused(
        ValueError, 'lie in each other', output=output, overwrite=True
      )
      assert os.path.realpath(output) in message

  @pytest.mark.parametrize('below', ['.', 'merged'])
  def test_touches_an_input_through_a_link(self, refused, tmp_path, below):
    path = checkpoints.save(tmp_path / 'model', EXPERTS[0])
    link = tmp_path / 'link'
    link.symlink_to(path)
    arguments = {'experts': [path], 'output': link / below}
    refused(ValueError, 'lie in each other', overwrite=True, **arguments)

  @pytest.mark.parametrize('kind', ['tmp', 'old'])
  @pytest.mark.parametrize('below', ['', '/checkpoint'])
  def test_an_input_lies_where_it_clears_up(
    self, refused, tmp_path, kind, below
  ):
    """As what a killed merge has left does, which is all there is of it."""
    checkpoints.save(tmp_path / 'run', EXPERTS[0])
    place = tmp_path / f'run.mergekit-{kind}'
    source = checkpoints.save(f'{place}{below}', EXPERTS[0])
    link = tmp_path / 'link'
    link.symlink_to(source)
    for given in (source, link):
      arguments = {'base': given, 'output': tmp_path / 'run'}
      message = refused(
        ValueError, f'base ({given}) lies in', overwrite=True, **arguments
      )
      assert f'{place}, which a merge into' in message
      assert 'give it another name' in message

  @pytest.mark.parametrize('name', ['x.mergekit-tmp', 'x.mergekit-old', 'a'])
  def test_called_like_what_another_merge_clears(self, refused, tmp_path, name):
    output = tmp_path / name
    if name == 'a':
      output = tmp_path / 'x.mergekit-tmp' / 'a'
    refused(ValueError, f'output={output} would be taken for', output=output)

  @pytest.mark.parametrize('format', ['safetensors', 'orbax'])
  def test_lies_in_another_output(self, refused, merge, tmp_path, format):
    """Which could not be overwritten any more."""
    merge(output=tmp_path / 'done', format=format)
    for below in ('x', 'x/y'):
      output = tmp_path / 'done' / below
      message = f'lies in {tmp_path / "done"}, which is a checkpoint'
      refused(ValueError, message, output=output, overwrite=True)
    merge(output=tmp_path / 'done', format=format, overwrite=True)

  @pytest.mark.parametrize('below', ['x', 'x/y'])
  def test_lies_in_a_file(self, refused, tmp_path, below):
    file = tmp_path / 'file'
    file.write_text('thesis')
    message = f'lies in {file}, which is a file'
    refused(ValueError, message, output=file / below)
    refused(ValueError, message, output=file / below, overwrite=True)

  def test_lies_beside_the_step_of_another_output(
    self, refused, merge, tmp_path
  ):
    source, done = tmp_path / 'source', tmp_path / 'done'
    with ocp.CheckpointManager(source, item_names=('items',)) as steps:
      steps.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(BASE)))
    merge(base=source, output=done)
    assert [path.name for path in done.iterdir()] == ['0']
    refused(ValueError, f'lies in {done}, which', output=done / 'x')

  def test_lies_in_a_step(self, refused, merge, tmp_path):
    manager = tmp_path / 'manager'
    with ocp.CheckpointManager(manager, item_names=('items',)) as steps:
      steps.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(BASE)))
    for step in (manager / '0', manager / '0' / 'items'):
      refused(ValueError, f'lies in {step}, which', output=step / 'out')
    merge(output=manager / 'merged')

  def test_lies_where_other_things_lie(self, merge, tmp_path):
    """Also if the first of them is a model that was downloaded there."""
    model = tmp_path / 'all' / 'model.safetensors'
    model.parent.mkdir()
    checkpoints.save_safetensors(model, {'w': np.ones(3, np.float32)})
    merge(output=tmp_path / 'all' / 'one')
    merge(output=tmp_path / 'all' / 'other')
    # The report is of an output that was moved.
    (tmp_path / 'all' / 'one').rename(tmp_path / 'moved')
    (tmp_path / 'all' / 'one').mkdir()
    merge(output=tmp_path / 'all' / 'one' / 'x')

  @pytest.mark.parametrize('layout', ['safetensors', 'orbax'])
  def test_holds_what_an_input_links_to(self, layout, refused, tmp_path):
    """As a directory with another tokenizer does, or a step that is a link."""
    real, link = tmp_path / 'real', tmp_path / 'link'
    link.mkdir()
    if layout == 'safetensors':
      real.mkdir()
      checkpoints.save_safetensors(real / 'model.safetensors', EXPERTS[0])
      (link / 'model.safetensors').symlink_to('../real/model.safetensors')
    else:
      checkpoints.save(real, EXPERTS[0])
      (link / '0').symlink_to('../real')
    arguments = {'base': None, 'experts': [link], 'output': real}
    refused(ValueError, 'lie in each other', overwrite=True, **arguments)

  @pytest.mark.parametrize('overwrite', [False, True])
  def test_something_else_where_the_report_is_to_lie(
    self, refused, merge, tmp_path, monkeypatch, overwrite
  ):
    notes, message = tmp_path / 'out.report.json', 'not the report of a merge'
    with monkeypatch.context() as patch:
      patch.setattr(streamed, 'staged', pytest.fail)
      for text in ('my notes', '{"mine": 1}', '[]', '3'):
        notes.write_text(text)
        refused(FileExistsError, message, overwrite=overwrite)
      notes.unlink()
      notes.mkdir()
      said = refused(FileExistsError, message, overwrite=overwrite)
      assert said.startswith(f'{notes} exists') and 'Move it away' in said
    notes.rmdir()
    merge()
    # Its own may stay where the output was removed, and is replaced.
    shutil.rmtree(tmp_path / 'out')
    merge(mk.average([1, 0, 0]), overwrite=overwrite)
    assert verify.verify(tmp_path / 'out') == []

  def test_a_directory_that_looks_like_an_output_moved_aside(
    self, merge, tmp_path
  ):
    aside = tmp_path / 'out.mergekit-old'
    aside.mkdir()
    (aside / 'thesis.tex').write_text('years of work')
    merge(output=tmp_path / 'out')
    assert (aside / 'thesis.tex').exists()

  def test_home(self, merge, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert merge(output='~/out').output == os.path.realpath(tmp_path / 'out')

  def test_a_link_is_followed(self, merge, saved, tmp_path):
    """Also one to a place where there is nothing yet."""
    (tmp_path / 'disk').mkdir()
    link = tmp_path / 'latest'
    link.symlink_to('disk/run')
    for arguments in ({}, {'overwrite': True}):
      report = merge(output=link, **arguments)
      assert link.is_symlink()
      assert report.output == os.path.realpath(tmp_path / 'disk' / 'run')
    assert verify.verify(link) == []
    np.testing.assert_array_equal(
      checkpoints.load(tmp_path / 'disk' / 'run')['params/odd'],
      checkpoints.load(link)['params/odd'],
    )
    assert sorted(p.name for p in (tmp_path / 'disk').iterdir()) == [
      'run',
      'run.report.json',
    ]

  def test_a_path_that_goes_up_behind_a_link(self, merge, tmp_path):
    """Merge and report lie where the file system says that this is."""
    (tmp_path / 'disk' / 'run').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('disk/run')
    merge(output=tmp_path / 'link' / '..' / 'out')
    assert {path.name for path in (tmp_path / 'disk').iterdir()} == {
      'run',
      'out',
      'out.report.json',
    }

  def test_name_that_begins_like_an_input(self, saved, merge, tmp_path):
    """`base-merged` does not lie in `base`."""
    base = checkpoints.save(tmp_path / 'base', BASE)
    merge(base=base, output=tmp_path / 'base-merged')
    assert (tmp_path / 'base-merged').exists()


@pytest.fixture(scope='module', params=[np.nan, np.inf, -np.inf])
def bad(request, tmp_path_factory):
  """A model with one bad value, and that value."""
  leaf = BASE['params']['b']['kernel'].at[39, 49].set(request.param)
  path = tmp_path_factory.mktemp('bad') / 'model'
  tree = changed(BASE, 'params/b/kernel', leaf)
  return checkpoints.save(path, tree), request.param


class TestNonfinite:
  def test_expert(self, saved, refused, merge, bad, tmp_path):
    base, (first, _, third) = saved
    path, value = bad
    experts = [first, path, third]
    message = refused(
      FloatingPointError,
      f'experts[1]: params/b/kernel in {path} holds 1 non-finite',
      experts=experts,
    )
    assert 'allow_nonfinite=True' in message
    merge(experts=experts, allow_nonfinite=True)
    merged = checkpoints.load(tmp_path / 'out')
    expected = np.zeros((40, 50), bool)
    expected[39, 49] = True
    found = merged['params/b/kernel']
    np.testing.assert_array_equal(~np.isfinite(found), expected)
    np.testing.assert_array_equal(found[39, 49], value)
    assert np.isfinite(merged['params/a/kernel']).all()

  def test_expert_without_a_base(self, saved, refused, bad):
    message = f'experts[0]: params/b/kernel in {bad[0]} holds'
    refused(
      FloatingPointError, message, experts=[bad[0], saved[1][0]], base=None
    )

  def test_base(self, refused, bad):
    message = f'base: params/b/kernel in {bad[0]} holds'
    refused(FloatingPointError, message, base=bad[0])

  def test_base_and_experts(self, refused, bad):
    """Inf - Inf is caught too."""
    path = bad[0]
    message = f'base: params/b/kernel in {path} holds'
    method = mk.task_arithmetic()
    refused(FloatingPointError, message, method, base=path, experts=[path])

  def test_method_with_rounds(self, refused, tmp_path):
    base = {'params': {'kernel': np.ones((3, 5), np.float32)}}
    expert = changed(base, 'params/kernel', np.full((3, 5), np.nan, np.float32))
    path = checkpoints.save(tmp_path / 'base', base)
    experts = [path, checkpoints.save(tmp_path / 'expert', expert)]
    refused(
      FloatingPointError,
      f'experts[1]: params/kernel in {experts[1]} holds 15 non-finite',
      mk.ties(),
      base=path,
      experts=experts,
    )

  def test_finite_but_large(self, merge, tmp_path):
    """Squares that overflow in float32 are no fault of the checkpoint."""
    large = jax.tree.map(
      lambda x: x * 1e30 if jnp.issubdtype(x.dtype, jnp.floating) else x, BASE
    )
    path = checkpoints.save(tmp_path / 'large', large)
    merge(experts=[path])
    merged = checkpoints.load(tmp_path / 'out')['params/odd']
    np.testing.assert_array_equal(merged, large['params']['odd'])


class TestDamage:
  @pytest.mark.parametrize('length', [4, 100, -30])
  def test_truncated_safetensors(self, refused, tmp_path, length):
    path = tmp_path / 'model.safetensors'
    checkpoints.save_safetensors(path, EXPERTS[0])
    path.write_bytes(path.read_bytes()[:length])
    refused(ValueError, f'{path} is damaged or cut off', experts=[path])

  @pytest.mark.parametrize('damage', ['flipped', 'truncated', 'gone'])
  @pytest.mark.parametrize('name', ['base', 'experts'])
  def test_orbax_data(self, saved, refused, tmp_path, damage, name):
    """zstd tells flipped bytes by its header; plain chunks have no checksum."""
    compress = damage == 'flipped'
    path = checkpoints.save(tmp_path / 'model', EXPERTS[0], compress)
    folder = path / 'ocdbt.process_0' / 'd'
    data = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    for frame in re.finditer(re.escape(b'\x28\xb5\x2f\xfd'), bytes(content)):
      content[frame.start()] ^= 0xFF
    if damage == 'flipped':
      data.write_bytes(content)
    elif damage == 'truncated':
      data.write_bytes(content[:100])
    else:
      data.unlink()
    given = path if name == 'base' else [*saved[1][:2], path]
    message = refused(OSError, f' in {path} could not', **{name: given})
    source = {'base': 'base', 'experts': 'experts[2]'}[name]
    assert message.startswith(f'{source}: params/')
    assert 'Restore the checkpoint from a copy' in message

  @pytest.mark.parametrize(
    'error',
    [PermissionError('Access was denied'), ValueError('UNAVAILABLE: busy')],
  )
  def test_no_damage(self, refused, monkeypatch, error):
    """A copy is no better where it is the reading that fails."""

    def fails():
      raise error

    joined = lambda *arguments: types.SimpleNamespace(result=fails)
    monkeypatch.setattr(source.Checkpoint, 'read_parts', joined)
    message = refused(OSError, f'could not be read ({error}).')
    assert message.endswith(').')

  def test_orbax_metadata(self, refused, tmp_path):
    path = checkpoints.save(tmp_path / 'model', EXPERTS[0])
    file = path / '_METADATA'
    file.write_text(file.read_text()[:-20])
    refused(ValueError, f'{file} is damaged', base=path)

  @pytest.mark.parametrize('place', ['..', 'above'])
  def test_orbax_leaf_that_leads_elsewhere(self, refused, tmp_path, place):
    """Without OCDBT the name of a leaf is a part of the path of its data."""
    saving = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
    tree = {'w': np.ones(3, np.float32)}
    for name in ('model', 'secret'):
      saving.save(tmp_path / name, args=ocp.args.PyTreeSave(tree))
    above = '..' if place == '..' else str(tmp_path)
    file = tmp_path / 'model' / '_METADATA'
    metadata = json.loads(file.read_text())
    (leaf,) = metadata['tree_metadata'].values()
    leaf['key_metadata'][0]['key'] = f'{above}/secret/w'
    metadata['tree_metadata'] = {repr((f'{above}/secret/w',)): leaf}
    file.write_text(json.dumps(metadata))
    path = tmp_path / 'model'
    refused(ValueError, 'Invalid file path', base=None, experts=[path])


def test_full_disk(saved, tmp_path):
  """No file may grow beyond a part of the output, as if the disk were full."""
  base, experts = saved
  output = tmp_path / 'out'
  program = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
runpy.run_module('mergekit_jax', run_name='__main__', alter_sys=True)
"""
  finished = subprocess.run(
    [
      *(sys.executable, '-B', '-c', program, 'merge', '--method', 'average'),
      *('--base', base, '--experts', *experts),
      *('--output', output, '--devices', '2'),
    ],
    cwd=pathlib.Path(__file__).parents[1],
    # Or it would leave a compiled program that is cut off to other tests.
    env=os.environ | {'JAX_ENABLE_COMPILATION_CACHE': 'false', 'XLA_FLAGS': ''},
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert finished.returncode == 1, finished.stderr
  last = finished.stderr.splitlines()[-1]
  assert last.startswith('mergekit-jax: ')
  assert str(output) in last and 'File too large' in last
  assert 'Traceback' not in finished.stderr
  # What was written may stay, for when there is room; never as a checkpoint.
  assert {path.name for path in tmp_path.iterdir()} <= {'out.mergekit-tmp'}
