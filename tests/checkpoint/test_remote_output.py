"""Outputs in an object store, against an S3-compatible server."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
from mergekit_jax import cli, processes
from mergekit_jax.checkpoint import locks, remote, replace, stage
from mergekit_jax.verify import verify
from tests import checkpoints, launch, s3

SHAPES = {'a': (64, 48), 'b': (40,)}
METHOD = 'mk.task_arithmetic(scale=0.7)'


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """A directory with a base, two experts, and the merge of them."""
  directory = tmp_path_factory.mktemp('local')
  checkpoints.save_set(directory, SHAPES, experts=2)
  merge(directory, directory / 'merged')
  return directory


@pytest.fixture(scope='module')
def server(local):
  with s3.serving() as proxy:
    proxy.upload(local, 'run')
    yield proxy


@pytest.fixture(autouse=True)
def store(server, monkeypatch):
  delays = {'initial_delay': '10ms', 'max_delay': '100ms'}
  monkeypatch.setattr(remote, '_RETRIES', {**remote._RETRIES, **delays})
  with server.used(monkeypatch):
    yield server


def job(directory, output, **more):
  return {
    'method': METHOD,
    'base': f'{directory}/base',
    'experts': [f'{directory}/expert0', f'{directory}/expert1'],
    'output': str(output),
    **more,
  }


def merge(directory, output, **more):
  arguments = job(directory, output, **more)
  method = eval(arguments.pop('method'), {'mk': mk})
  return mk.merge_checkpoints(method, **arguments)


def assert_same(one, other):
  """Two checkpoints hold the same bytes."""
  one, other = mk.open_checkpoint(one), mk.open_checkpoint(other)
  assert one.specs == other.specs and one.tree == other.tree
  for path in other.specs:
    read = [np.asarray(each.read(path)).tobytes() for each in (one, other)]
    assert read[0] == read[1], path


@pytest.mark.parametrize('sources', ['remote', 'local'])
def test_equals_the_local_merge(local, store, tmp_path, sources):
  output = f'out/from_{sources}'
  report = merge(
    local if sources == 'local' else f's3://{s3.BUCKET}/run',
    f's3://{s3.BUCKET}/{output}',
  )
  assert_same(f's3://{s3.BUCKET}/{output}', local / 'merged')
  assert report.output == f's3://{s3.BUCKET}/{output}'

  # The same to ordinary Orbax, once it is downloaded.
  copy = store.download(output, tmp_path / 'copy')
  expected = checkpoints.load(local / 'merged')
  for path, array in checkpoints.load(copy).items():
    assert array.tobytes() == expected[path].tobytes(), path
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpoints.leaves(checkpointer.restore(copy))
  assert restored.keys() == expected.keys()

  # The report beside it, and nothing else.
  keys = [k for k in store.keys('out') if k.startswith(f'from_{sources}')]
  beside = [key for key in keys if not key.startswith(f'from_{sources}/')]
  assert beside == [f'from_{sources}.report.json']
  written = (tmp_path / 'report.json').as_posix()
  store.client.download_file(s3.BUCKET, f'out/{beside[0]}', written)
  saved = json.loads((tmp_path / 'report.json').read_text())
  assert saved['units_done'] == report.units_done


@pytest.mark.parametrize('options', [{'zarr3': True}, {'compression': 'zstd'}])
def test_how_the_arrays_are_stored(local, store, options):
  output = f's3://{s3.BUCKET}/stored/{next(iter(options))}'
  merge(local, output, **options)
  assert_same(output, local / 'merged')
  opened = mk.open_checkpoint(output)
  assert opened.layout.use_zarr3 == ('zarr3' in options)
  assert opened.storage('params/a').compressed == ('compression' in options)


def test_as_checkpoint_manager_lays_it_out(local, store, tmp_path):
  """A step and an item, which CheckpointManager finds again."""
  with ocp.CheckpointManager(tmp_path / 'base', item_names=('items',)) as saver:
    handler = ocp.PyTreeCheckpointHandler()
    tree = ocp.Checkpointer(handler).restore(local / 'base')
    saver.save(7, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))
  output = f's3://{s3.BUCKET}/managed'
  arguments = {**job(local, output), 'base': str(tmp_path / 'base')}
  mk.merge_checkpoints(eval(arguments.pop('method')), **arguments)
  assert_same(output, local / 'merged')
  assert verify(output) == verify(f'{output}/7/items') == []
  copy = store.download('managed', tmp_path / 'copy')
  with ocp.CheckpointManager(copy, item_names=('items',)) as manager:
    assert manager.latest_step() == 7
    found = manager.restore(
      7, args=ocp.args.Composite(items=ocp.args.PyTreeRestore())
    )
  expected = checkpoints.load(local / 'merged')
  for path, array in checkpoints.leaves(found['items']).items():
    assert np.asarray(array).tobytes() == expected[path].tobytes(), path


def test_what_makes_it_a_checkpoint_comes_last(local, store):
  merge(local, f's3://{s3.BUCKET}/order')
  written = [
    path.removeprefix(f'/{s3.BUCKET}/')
    for method, path, status, _ in store.sent
    if method == 'PUT' and status == 200
  ]
  assert written[-2:] == ['order/_METADATA', 'order.report.json']


def test_failures_now_and_then_do_not_matter(local, store):
  store.fail_every = 4
  merge(f's3://{s3.BUCKET}/run', f's3://{s3.BUCKET}/shaky')
  assert {500, 503} <= {status for _, _, status, _ in store.sent}
  store.fail_every = 0
  assert_same(f's3://{s3.BUCKET}/shaky', local / 'merged')


def test_killed_and_resumed(local, store):
  """What a killed merge leaves is no checkpoint; a resume does the rest."""
  output = f's3://{s3.BUCKET}/killed/merged'
  codes, printed = launch.run_merge(
    job(local, output, kill=[0, 1]), devices=8, check=False
  )
  assert codes == [-9], printed
  assert any(key.endswith('/.zarray') for key in store.keys('killed/merged'))
  unfinished = f'unfinished merge lies in {output}.mergekit-tmp'
  with pytest.raises(ValueError, match=unfinished):
    mk.open_checkpoint(output)
  with pytest.raises(ValueError, match='seed: 0 then, 5 now'):
    merge(local, output, seed=5)
  report = merge(local, output)
  assert report.units_resumed == 1
  assert_same(output, local / 'merged')
  # The stage is gone.
  assert {key.partition('/')[0] for key in store.keys('killed')} == {
    'merged',
    'merged.report.json',
  }


def test_killed_and_thrown_away(local, store, monkeypatch):
  """Another merge leaves nothing of the one before it behind."""
  output = f's3://{s3.BUCKET}/thrown'

  record = stage.Stage.record
  recorded = []

  def fail(self, unit, facts):
    if recorded:
      raise OSError('the network is gone')
    recorded.append(unit)
    record(self, unit, facts)

  with monkeypatch.context() as patch:
    patch.setattr(stage.Stage, 'record', fail)
    with pytest.raises(OSError, match='the network is gone'):
      merge(local, output)
  store.client.put_object(Bucket=s3.BUCKET, Key='thrown/params.old/0', Body=b'')
  report = merge(local, output, resume=False)
  assert report.units_resumed == 0
  assert_same(output, local / 'merged')
  assert not [k for k in store.keys('thrown') if 'old' in k]


def test_a_failure_before_the_first_unit_leaves_nothing(
  local, store, monkeypatch
):
  def fail(self, unit, facts):
    raise OSError('the network is gone')

  monkeypatch.setattr(stage.Stage, 'record', fail)
  with pytest.raises(OSError, match='the network is gone'):
    merge(local, f's3://{s3.BUCKET}/early/merged')
  assert store.keys('early') == []


def test_the_newest_merge_into_an_output_wins(store):
  """There are no locks: an older one stops, and touches nothing any more."""
  output = f's3://{s3.BUCKET}/contested'
  options = {'overwrite': False, 'resume': True}
  with pytest.raises(ValueError, match=r'Another merge \(process .*taken over'):
    with stage.staged(output, {}, **options) as older:
      store.client.put_object(Bucket=s3.BUCKET, Key='contested/a/0', Body=b'')
      older.record(0, {'parts': []})
      with pytest.raises(RuntimeError, match='stop'):
        with stage.staged(output, {}, **options) as newer:
          assert list(newer.done) == [0]
          newer.record(1, {'parts': []})
          raise RuntimeError('stop')
      older.record(2, {'parts': []})
  with stage.staged(output, {}, **options) as again:
    assert list(again.done) == [0, 1]


def test_every_process_finds_out_that_a_newer_merge_has_it(monkeypatch):
  """Also if that has begun before it could look at the lock of its own."""
  directory = remote.as_path(f's3://{s3.BUCKET}/taken-over.mergekit-tmp')
  told = []
  with locks.held(directory) as demand_ours:
    demand_ours()
    told.append((directory / locks.NAME).read_text())
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    monkeypatch.setattr(processes, 'first_told', lambda said: said or told[0])
    with locks.held(directory) as demand_ours_too:
      demand_ours_too()
    (directory / locks.NAME).write_text('a newer merge')
    with locks.held(directory) as late:
      for demand in (demand_ours, demand_ours_too, late):
        with pytest.raises(ValueError, match='merge .a newer merge. has taken'):
          demand()


def test_what_appears_at_the_output_meanwhile(local, store, monkeypatch):
  """Is left alone; once it is deleted, the merge is made again."""
  output = f's3://{s3.BUCKET}/appeared/merged'
  records = stage.Stage.records

  def records_and_more(self):
    put('appeared/merged/_METADATA', b'of somebody else')
    return records(self)

  def put(key, data):
    store.client.put_object(Bucket=s3.BUCKET, Key=key, Body=data)

  with monkeypatch.context() as patch:
    patch.setattr(stage.Stage, 'records', records_and_more)
    with pytest.raises(FileExistsError, match='may be mixed .* delete it and'):
      merge(local, output)
  found = remote.as_path(output) / '_METADATA'
  assert found.read_text() == 'of somebody else'
  with pytest.raises(FileExistsError, match='merged exists'):
    merge(local, output)
  remote.as_path(output).rmtree()
  report = merge(local, output)
  # The journal still has all units, of which there is nothing any more.
  assert report.units_resumed == 0
  assert_same(output, local / 'merged')


@pytest.mark.parametrize('fails', [False, True])
def test_what_appears_before_the_stage_is_ours(
  local, store, monkeypatch, fails
):
  """Nothing there is deleted; neither if the merge fails at once."""
  key = f'late{fails}/merged/{"_METADATA" if fails else "thesis.tex"}'
  output = f's3://{s3.BUCKET}/late{fails}/merged'

  def put(*_):
    store.client.put_object(Bucket=s3.BUCKET, Key=key, Body=b'years of work')

  def fail(*_):
    put()
    raise OSError('the network is gone')

  claimed = locks.claimed
  if fails:
    monkeypatch.setattr(stage.Stage, 'record', fail)
  else:
    monkeypatch.setattr(locks, 'claimed', lambda d: put() or claimed(d))
  said = 'the network is gone' if fails else 'merged exists'
  with pytest.raises(OSError, match=said):
    merge(local, output)
  path = remote.as_path(f's3://{s3.BUCKET}/{key}')
  assert path.read_text() == 'years of work'


@pytest.mark.parametrize('uploaded', [True, False])
def test_killed_between_two_outputs(local, store, monkeypatch, uploaded):
  """After the first is a checkpoint, or when nothing but that is missing."""
  names, folder = 'ab', f'two{uploaded}'
  base, *experts = (f'{local}/{n}' for n in ('base', 'expert0', 'expert1'))

  def merge_both():
    return mk.merge_checkpoints(
      mk.task_arithmetic(scale=0.7),
      base=base,
      experts=experts,
      output={n: f's3://{s3.BUCKET}/{folder}/{n}' for n in names},
    )

  publish = replace.publish

  def stopping(new, path, overwrite):
    if not uploaded:
      (new / '_METADATA').unlink()
    publish(new, path, overwrite)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(replace, 'publish', stopping)
    with pytest.raises(KeyboardInterrupt):
      merge_both()
  assert ('a/_METADATA' in store.keys(folder)) == uploaded
  store.sent.clear()
  reports = merge_both()
  assert [reports[n].units_done for n in names] == [0, 0]
  put = [path for method, path, *_ in store.sent if method == 'PUT']
  assert any(f'{folder}/a/_METADATA' in path for path in put) != uploaded
  for name in names:
    assert_same(f's3://{s3.BUCKET}/{folder}/{name}', local / 'merged')
  assert not [key for key in store.keys(folder) if 'mergekit' in key]


def test_many_units_are_kept_in_few_objects(store):
  output = f's3://{s3.BUCKET}/long'
  options = {'overwrite': False, 'resume': True}
  with pytest.raises(RuntimeError, match='stop'):
    with stage.staged(output, {}, **options) as first:
      store.client.put_object(Bucket=s3.BUCKET, Key='long/a/0', Body=b'')
      for unit in range(130):
        first.record(unit, {'parts': [unit]})
      raise RuntimeError('stop')
  puts = [p for method, p, *_ in store.sent if method == 'PUT']
  assert 2 <= sum('journal.0.' in path for path in puts) < 10
  with stage.staged(output, {}, **options) as second:
    assert second.done == {u: {'unit': u, 'parts': [u]} for u in range(130)}
    second.record(130, {'parts': []})
    assert len(second.records()) == 131


def test_a_taken_output_is_refused(local, store):
  """Whether it is a checkpoint or not, and also with overwrite."""
  store.client.put_object(Bucket=s3.BUCKET, Key='taken/thesis.tex', Body=b'!')
  for name in ('taken', 'run/merged'):
    for overwrite in (False, True):
      with pytest.raises(FileExistsError, match=f'{name} exists'):
        merge(local, f's3://{s3.BUCKET}/{name}', overwrite=overwrite)
  assert store.keys('taken') == ['thesis.tex']


@pytest.mark.parametrize(
  'output, options, why',
  [
    ('out', {'format': 'safetensors'}, "Give format='orbax', or a local"),
    ('', {}, 'is a whole bucket'),
  ],
)
def test_an_impossible_output_is_refused(local, store, output, options, why):
  with pytest.raises(ValueError, match=why):
    merge(local, f's3://{s3.BUCKET}/{output}', **options)
  assert not store.sent


def test_an_output_in_a_checkpoint_is_refused(local, store):
  output = f's3://{s3.BUCKET}/run/merged/x'
  with pytest.raises(ValueError, match='run/merged, which is a checkpoint'):
    merge(local, output)
  sent = [(method, path) for method, path, *_ in store.sent]
  assert {method for method, _ in sent} <= {'GET', 'HEAD'}
  # A few looks are enough, and nothing is listed.
  assert len(sent) <= 3, sent
  assert not store.keys('run/merged/x')


def test_command_line(local, store, capsys):
  def run(*arguments):
    status = cli.main(cli.parse(['mergekit-jax', *map(str, arguments)]))
    return status, capsys.readouterr().out

  output = f's3://{s3.BUCKET}/by/hand'
  merging = ['--method', 'average', '--base', local / 'base']
  merging += ['--experts', local / 'expert0', '--output', output]
  assert run('merge', *merging)[0] == 0
  assert run('verify', output) == (0, f'{output} is as it was written.\n')
  status, printed = run('inspect', output)
  assert status == 0 and 'params/a  float32[64, 48]' in printed
  store.client.put_object(
    Bucket=s3.BUCKET, Key='by/hand/params.b/0', Body=bytes(160)
  )
  status, printed = run('verify', output)
  assert status == 1 and 'params/b: the part at [0]' in printed


def test_two_processes(local, store):
  """Each writes its own chunks; one makes a checkpoint of them."""
  output = f's3://{s3.BUCKET}/pair/merged'
  launch.run_merge(job(local, output), processes=2, devices=2)
  assert_same(output, local / 'merged')
  assert 'merged/_METADATA' in store.keys('pair')
  assert not [key for key in store.keys('pair') if 'mergekit-tmp' in key]
