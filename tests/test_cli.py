"""The command line: what it reads, prints and returns."""

import argparse
import ast
import ctypes
import logging as standard_logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

from absl import flags as absl_flags
from absl import logging
import jax
import numpy as np
import orbax
import orbax.checkpoint  # which `orbax` alone does not import
import pytest
from safetensors.numpy import save_file

import mergekit_jax as mk
from mergekit_jax import cli, streamed
from mergekit_jax.command import flags
from mergekit_jax.verify import verify
from tests import checkpoints, models
from tests.launch import free_port

FORCED = '--xla_force_host_platform_device_count'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(base, experts) as paths."""
  directory = tmp_path_factory.mktemp('saved')
  return checkpoints.save_set(directory, models.SMALL, experts=2)


def read(*arguments):
  """The arguments of `merge_checkpoints` that a command line stands for."""
  return flags.what_to_merge(
    cli.parse(['mergekit-jax', 'plan', '--experts', 'e', *arguments])
  )


class TestParse:
  def test_defaults(self):
    arguments = cli.parse(
      ['', 'merge', '--method=ties', '--experts', 'a', 'b', '--output', 'out']
    )
    what = flags.what_to_merge(arguments)
    assert what.pop('methods') == {'': mk.ties()}
    assert dict(what.pop('mesh').shape) == {'fsdp': 8}
    assert what == {
      'experts': ['a', 'b'],
      'base': None,
      'memory_budget': '4GiB',
      'stacked_axes': None,
      'overrides': None,
      'dtype': None,
      'partition_rules': None,
    }
    assert arguments.output == 'out'
    assert flags.seeded(arguments, {'': mk.dare()}, 2) == {'': (mk.dare(), 0)}
    assert arguments.format is None
    assert arguments.zarr3 is None and arguments.compression is None
    assert not arguments.overwrite and not arguments.allow_nonfinite

  @pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
      (['average'], mk.average()),
      (['average', '--weights', '0.5', '2'], mk.average([0.5, 2])),
      (
        ['task_arithmetic', '--set', 'scale=0.4', '--weights', '1', '-0.5'],
        mk.task_arithmetic(0.4, [1, -0.5]),
      ),
      (
        ['task_arithmetic', '--weights', '-0.5,1', '-1e-1', '-.25,-3'],
        mk.task_arithmetic(weights=[-0.5, 1, -0.1, -0.25, -3]),
      ),
      (
        ['ties', '--set', 'density=0.3', '--set', 'scope=tensor,scale=2'],
        mk.ties(0.3, 2.0, scope='tensor'),
      ),
      (
        ['ties', '--set=election=count', '--set=zero_mass=majority'],
        mk.ties(election='count', zero_mass='majority'),
      ),
      (['dare', '--set', 'drop_rate=0.75'], mk.dare(0.75)),
      (['dare_ties', '--set', 'density=none'], mk.dare_ties()),
      (['dare_ties', '--set', 'density=1e-1'], mk.dare_ties(density=0.1)),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
  )
  def test_method(self, arguments, expected):
    """Equal in structure and numbers: they compile to one program."""
    assert read('--method', *arguments)['methods'] == {'': expected}

  def test_several_words_for_a_flag(self):
    what = read(
      *('--method', 'ties', '--set', 'density=0.3', 'scope=tensor'),
      *('--override', 'a:base', 'b:base', '--set', 'election=count'),
      *('--stacked_axes', 'c=0', 'd=1', '--dtype', 'bf16'),
    )
    rule = mk.ties(0.3, scope='tensor', election='count')
    assert what['methods'] == {'': rule}
    assert list(what['overrides']) == ['a', 'b']
    assert what['stacked_axes'] == {'c': (0,), 'd': (1,)}
    assert what['dtype'] == 'bf16'
    swept = read('--method=ties', '--sweep', 'scale=1,2', 'density=0.1,0.2')
    assert len(swept['methods']) == 4

  @pytest.mark.parametrize(
    'arguments,warned',
    [
      (['dare_ties', '--set', 'density=0.5'], True),
      (['dare_ties', '--sweep', 'density=0.5,0.6'], True),
      (['dare_ties', '--set', 'density=0.5', 'drop_rate=0.1'], False),
      (['dare_ties', '--set', 'density=0.5', '--sweep=drop_rate=0,0.1'], False),
      (['dare_ties'], False),
      (['ties', '--set', 'density=0.5'], False),
    ],
  )
  def test_warns_of_a_density_of_dare(self, arguments, warned, caplog):
    with caplog.at_level('WARNING', logger='absl'):
      read('--method', *arguments)
    assert ('density is 1 - drop_rate' in caplog.text) == warned

  def test_many_merges(self):
    """Every method with every value, called by what tells them apart."""
    what = read(
      *('--method', 'ties', 'dare_ties', '--set', 'scope=tensor'),
      *('--sweep', 'scale=0.5,1', '--sweep', 'density=0.1'),
    )
    assert what['methods'] == {
      'ties-scale=0.5-density=0.1': mk.ties(0.1, 0.5, scope='tensor'),
      'ties-scale=1-density=0.1': mk.ties(0.1, 1.0, scope='tensor'),
      'dare_ties-scale=0.5-density=0.1': mk.dare_ties(
        density=0.1, scale=0.5, scope='tensor'
      ),
      'dare_ties-scale=1-density=0.1': mk.dare_ties(
        density=0.1, scale=1.0, scope='tensor'
      ),
    }
    swept = read('--method', 'dare', '--sweep=drop_rate=0.5,0.9')['methods']
    assert list(swept) == ['drop_rate=0.5', 'drop_rate=0.9']

  def test_options_are_for_the_methods_that_have_them(self):
    what = read(
      *('--method', 'average', 'dare', 'ties', '--set', 'density=0.1'),
      *('--sweep', 'scale=0.5,1', 'election=mass,count', '--weights', '1', '2'),
    )
    weights = (1.0, 2.0)
    assert what['methods'] == {
      'average': mk.average(weights),
      'dare-scale=0.5': mk.dare(scale=0.5, weights=weights),
      'dare-scale=1': mk.dare(scale=1.0, weights=weights),
      **{
        f'ties-scale={scale:g}-election={election}': mk.ties(
          0.1, scale, weights, election=election
        )
        for scale in (0.5, 1.0)
        for election in ('mass', 'count')
      },
    }

  def test_outputs_of_many_merges(self):
    arguments = cli.parse(
      [
        *('', 'merge', '--experts', 'e', '--output', 'o'),
        *('--method', 'dare', 'average', '--seed', '1', '2'),
      ]
    )
    rules = {'dare': mk.dare(), 'average': mk.average()}
    assert flags.outputs(arguments, rules) == {
      'method': {
        'dare-seed=1': mk.dare(),
        'dare-seed=2': mk.dare(),
        'average': mk.average(),  # draws nothing: once is enough
      },
      'output': {
        'dare-seed=1': 'o/dare-seed=1',
        'dare-seed=2': 'o/dare-seed=2',
        'average': 'o/average',
      },
      'seed': {'dare-seed=1': 1, 'dare-seed=2': 2, 'average': 1},
    }
    assert flags.outputs(arguments, {'': mk.ties()})['output'] == 'o'
    arguments.seed = [3]
    assert flags.outputs(arguments, {'': mk.dare()}) == {
      'method': mk.dare(),
      'output': 'o',
      'seed': 3,
    }

  @pytest.mark.parametrize(
    ('arguments', 'message'),
    [
      (['dare', 'dare'], 'names the same merge twice'),
      (['dare', '--sweep', 'scale=1,1'], 'names the same merge twice'),
      (['dare', '--seed', '1', '1'], 'names the same merge twice'),
      (['dare', '--sweep', 'scale'], "write it as 'scale=0.3,0.5,1'"),
      (['average', '--sweep', 'scale=1'], 'average has no option'),
      (
        ['average', 'dare', '--sweep', 'election=mass'],
        'average and dare have no option',
      ),
      (['average', 'dare', '--set', 'densiti=1'], 'no option .densiti.'),
      (
        ['ties', '--sweep', 'scale=1', '--sweep', 'scale=2'],
        'scale was given twice',
      ),
      (
        ['dare', '--sweep', 'scale=1,2', '--override', 'a:scale=3'],
        'with --sweep or several methods',
      ),
      (
        ['dare', '--sweep', 'scale=1', '--override', 'a:drop_rate=0.3'],
        'with --sweep or several methods',
      ),
    ],
  )
  def test_many_merges_that_cannot_be_told_apart(self, arguments, message):
    with pytest.raises(ValueError, match=message):
      read('--method', *arguments)

  @pytest.mark.parametrize(
    ('text', 'regex', 'expected'),
    [
      ('.*/embedding:base', '.*/embedding', 'base'),
      ('.*/mlp/.*:density=0.5', '.*/mlp/.*', mk.ties(0.5, 3.0)),
      ('a.*:density=0.5,scale=1', 'a.*', mk.ties(0.5, 1.0)),
      ('(?:a|b)/.*:base', '(?:a|b)/.*', 'base'),
      ('(?:a|b)/.*:density=0.5', '(?:a|b)/.*', mk.ties(0.5, 3.0)),
      ('x=1/(?!b):base', 'x=1/(?!b)', 'base'),
      ('a:base/b:base', 'a:base/b', 'base'),
      ('a:b=1/.*:base', 'a:b=1/.*', 'base'),
      ('(?:x=1|y):density=0.5', '(?:x=1|y)', mk.ties(0.5, 3.0)),
    ],
  )
  def test_override(self, text, regex, expected):
    """An expression may hold ':' and '='; other options stay as `--set`."""
    what = read('--method=ties', '--set=scale=3', '--override', text)
    assert what['overrides'] == {regex: expected}

  def test_overrides_keep_their_order(self):
    what = read(
      *('--method', 'ties', '--override', 'b:base', '--override', 'a:base')
    )
    assert list(what['overrides']) == ['b', 'a']

  def test_stacked_axes(self):
    what = read(
      *('--method', 'average', '--stacked_axes', '.*/layers/.*=1'),
      *('--stacked_axes', 'a=b:.*=0,2', '--stacked_axes', 'c=-1'),
    )
    expected = {'.*/layers/.*': (1,), 'a=b:.*': (0, 2), 'c': (-1,)}
    assert what['stacked_axes'] == expected

  def test_partition_rules(self):
    what = read(
      *('--method', 'average', '--mesh', 'fsdp=4,tensor=2'),
      *('--partition_rules', '.*/kernel=fsdp,-,tensor'),
      *('--partition_rules', 'a=.*=fsdp+tensor'),
    )
    assert dict(what['mesh'].shape) == {'fsdp': 4, 'tensor': 2}
    assert what['partition_rules'] == {
      '.*/kernel': jax.P(('fsdp',), None, ('tensor',)),
      'a=.*': jax.P(('fsdp', 'tensor')),
    }

  @pytest.mark.parametrize(
    ('arguments', 'message'),
    [
      ([], 'required: command'),
      (['mrge'], "invalid choice: 'mrge'"),
      (['merge', '--experts', 'a', '--output', 'b'], 'required: --method'),
      (['merge', '--method', 'ties', '--output', 'b'], 'required: --experts'),
      (['merge', '--method', 'ties', '--experts', 'a'], 'required: --output'),
      (['merge', '--seed', 'one'], "invalid int value: 'one'"),
      (['inspect'], 'required: checkpoint'),
      (
        ['merge', '--methods', 'ties', '--experts', 'a', '--output', 'b'],
        "there is no flag --methods. Did you mean '--method'",
      ),
      (['plan', '--method=ties', '--expert=a'], "mean '--experts'"),
      (
        ['merge', '--method=ties', '--experts=a', '--output=b', '--dtyp=fp16'],
        "there is no flag --dtyp. Did you mean '--dtype'",
      ),
      (['merge', '--out-shard-size', '5GB'], "mean '--shard_size'"),
      (['merge', '--models=a'], 'mergekit calls models is --experts here'),
      (['plan', '--base-model=a'], 'mergekit calls base_model is --base here'),
      (['verify', '--quiet', 'a'], 'there is no flag --quiet.'),
      (['--verbosit=1', 'methods'], 'unrecognized arguments: --verbosit=1'),
    ],
  )
  def test_usage(self, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
      cli.parse(['mergekit-jax', *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

  def test_what_is_called_like_a_flag(self):
    assert cli.parse(['', 'inspect', '--', '--a']).checkpoint == '--a'

  def test_flags_of_the_process(self, monkeypatch):
    """Flags that other modules gave to absl do not collide with ours."""
    process = absl_flags.FlagValues()
    for flag in ('output', 'seed'):
      absl_flags.DEFINE_string(flag, '', 'Not ours.', flag_values=process)
    monkeypatch.setattr(absl_flags, 'FLAGS', process)
    arguments = cli.parse(
      ['', 'merge', '--method=ties', '--experts=a', '--output=b', '--seed=3']
    )
    assert (arguments.output, arguments.seed) == ('b', [3])


class TestMain:
  @pytest.fixture(autouse=True)
  def _verbosity(self):
    """`main` sets the verbosity and a filter of the log; both are undone."""
    verbosity = logging.get_verbosity()
    handler = logging.get_absl_handler()
    filters = list(handler.filters)
    yield
    logging.set_verbosity(verbosity)
    handler.filters[:] = filters

  def run(self, *arguments):
    return cli.main(cli.parse(['mergekit-jax', *map(str, arguments)]))

  def plan_arguments(self, saved):
    base, experts = saved
    return ['--method=ties', '--base', base, '--experts', *experts]

  def test_plan(self, saved, tmp_path, capsys, monkeypatch):
    """Prints reads, bytes and memory; writes nothing."""
    monkeypatch.chdir(tmp_path)
    directory = saved[0].parent
    before = checkpoints.digest(directory)
    assert self.run('plan', *self.plan_arguments(saved)) == 0
    assert checkpoints.digest(directory) == before
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    rows = {
      line.split()[0]: line
      for line in printed.splitlines()
      if 'params/' in line
    }
    assert rows.keys() == {
      'params/dense/kernel',
      'params/odd',
      'params/steps',
    }
    kernel = rows['params/dense/kernel']
    assert re.search(r'\[16, 24\] +- +1 +3 ', kernel)
    assert (
      '2 tensors merged, 1 copied, in 3 boxes and 7 reads of a box' in printed
    )
    assert 'rounds: 2\n' in printed
    # Two leaves of three models three times, and the copied one once.
    bytes_read = 3 * 3 * 4 * (16 * 24 + 7 * 5) + 12
    assert f'bytes read: {bytes_read / 1024:.1f} KiB' in printed
    bytes_written = 4 * (16 * 24 + 7 * 5) + 12
    assert f'bytes written: {bytes_written / 1024:.1f} KiB' in printed
    assert 'of a budget of 4.0 GiB' in printed

  def test_plan_warns_of_what_is_left_out(self, tmp_path, capsys):
    tree = {'params': {'w': np.ones(3)}, 'statistics': np.ones(2)}
    path = checkpoints.save(tmp_path / 'one', tree)
    assert self.run('plan', '--method=average', '--experts', path) == 0
    assert 'warning: 1 leaf of the base lies beside' in capsys.readouterr().out

  def test_plan_warns_of_what_merge_refuses(self, saved, tmp_path, capsys):
    """If an output is given, which a plan does not need."""

    def warned(*flags_):
      assert self.run('plan', *self.plan_arguments(saved), *flags_) == 0
      *_, last = capsys.readouterr().out.splitlines()
      return last.partition('warning: merge would refuse this: ')[2]

    output = tmp_path / 'out'
    assert warned() == warned('--output', output) == ''
    assert warned('--output', output, '--shard_size=5GB').startswith(
      "shard_size='5GB' was given, which is an option of safetensors"
    )
    checkpoints.save(output, {'w': np.ones(3)})
    assert warned('--output', output).startswith(f'{output} exists.')
    assert warned('--output', output, '--overwrite') == ''
    assert 'lie in each other' in warned('--output', saved[0], '--overwrite')

  @pytest.mark.parametrize('number', ['0', '-1'])
  def test_no_devices(self, saved, capsys, number):
    arguments = ('--method=average', '--experts', saved[0])
    assert self.run('plan', *arguments, f'--devices={number}') == 1
    assert f'--devices={number} was given' in capsys.readouterr().err

  @pytest.mark.parametrize(
    ('environment', 'flags', 'devices'),
    [
      ({'JAX_NUM_CPU_DEVICES': '3'}, [], 3),
      ({'JAX_NUM_CPU_DEVICES': '3'}, ['--devices=5'], 5),
      ({'XLA_FLAGS': f'{FORCED}=3'}, [], 3),
      ({'XLA_FLAGS': f'{FORCED}=3'}, ['--devices=3'], 3),
      ({}, [], 1),
    ],
  )
  def test_devices(self, environment, flags, devices, saved):
    """On one core: as many as the user says, or one."""
    code = (
      'import os, runpy; '
      'os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); '
      "runpy.run_module('mergekit_jax', run_name='__main__')"
    )
    cleared = {'JAX_NUM_CPU_DEVICES', 'XLA_FLAGS'}
    inherited = {k: v for k, v in os.environ.items() if k not in cleared}
    printed = subprocess.run(
      [sys.executable, '-c', code, 'plan', '--method=average', *flags]
      + ['--experts', str(saved[0])],
      env=inherited | environment,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    assert f'mesh: fsdp={devices}' in printed

  def test_devices_that_contradict_each_other(self, saved, capsys, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', f'{FORCED}=3')
    arguments = ('--method=average', '--experts', saved[0], '--devices=5')
    assert self.run('plan', *arguments) == 1
    assert '5 CPU devices are wanted, but' in capsys.readouterr().err

  @pytest.mark.parametrize('flag', ['--num_processes=2', '--process_id=0'])
  def test_processes_that_cannot_meet(self, saved, tmp_path, capsys, flag):
    arguments = ('--method=average', '--experts', saved[0])
    output = tmp_path / 'out'
    assert self.run('merge', *arguments, '--output', output, flag) == 1
    assert 'nothing says where the processes meet' in capsys.readouterr().err
    assert not output.exists()

  @pytest.mark.parametrize(
    ('given', 'message'),
    [
      (['--coordinator_address='], 'write it as HOST:PORT'),
      (['--coordinator_address=host'], 'write it as HOST:PORT'),
      (['--coordinator_address=:1'], 'write it as HOST:PORT'),
      (['--coordinator_address=host:65536'], 'write it as HOST:PORT'),
      (['--coordinator_address=host:1'], 'without --num_processes or'),
      (
        ['--coordinator_address=host:1', '--num_processes=2'],
        'without --num_processes or --process_id',
      ),
      (
        ['--coordinator_address=host:1', '--num_processes=2', '--process_id=2'],
        '--process_id 2 was given with --num_processes 2',
      ),
    ],
  )
  def test_where_processes_meet(
    self, saved, tmp_path, capsys, monkeypatch, given, message
  ):
    """Refused before JAX is asked, which would wait, or name none of these."""
    monkeypatch.setattr(jax.distributed, 'initialize', pytest.fail)
    arguments = ('--method=average', '--experts', saved[0])
    assert (
      self.run('merge', *arguments, '--output', tmp_path / 'o', *given) == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('mergekit-jax: --') and message in line

  @pytest.mark.parametrize(
    'given', [['--distributed'], ['--distributed', '--coordinator_address=h:1']]
  )
  def test_no_cluster(self, saved, tmp_path, capsys, monkeypatch, given):
    """The cluster is to say what the flags do not."""

    def initialize(*arguments, **options):
      raise ValueError('Number of processes must be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    arguments = ('--method=average', '--experts', saved[0])
    assert (
      self.run('merge', *arguments, '--output', tmp_path / 'o', *given) == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert '--num_processes and --process_id; or --distributed' in line
    assert line.endswith(': Number of processes must be defined.')

  def test_a_port_in_use(self, saved, tmp_path, capsys, monkeypatch):
    """Of process 0 alone: for the others it is to be in use."""

    def initialize(*arguments, **options):
      raise RuntimeError('asked')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    monkeypatch.delenv('JAX_COORDINATOR_BIND_ADDRESS', raising=False)
    merge = ['merge', '--method=average', '--experts', saved[0]]
    merge += ['--output', tmp_path / 'out', '--num_processes=2']
    with socket.create_server(('', 0)) as server:
      address = f'localhost:{server.getsockname()[1]}'
      merge.append(f'--coordinator_address={address}')
      assert self.run(*merge, '--process_id=0') == 1
      (line,) = capsys.readouterr().err.splitlines()
      assert f'{address} was given, but process 0 cannot have the port' in line
      assert self.run(*merge, '--process_id=1') == 1
      assert 'could not join the others' in capsys.readouterr().err
    assert self.run(*merge, '--process_id=0') == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith('a cluster that says so itself: asked')

  def test_inspect(self, saved, capsys):
    assert self.run('inspect', saved[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'params/dense/kernel  float32[16, 24]  chunks [16, 24]'
    assert lines[2] == 'params/steps  int32[3]  chunks [3]'
    assert lines[3] == (
      f"orbax at {saved[0]}: 3 leaves, 1.6 KiB; parameter root 'params' with "
      '422 parameters'
    )

  def test_repr_of_a_checkpoint(self, saved):
    expected = f'<orbax checkpoint at {saved[0]}, 3 leaves>'
    assert repr(mk.open_checkpoint(saved[0])) == expected

  def test_inspect_compressed(self, tmp_path, capsys):
    path = checkpoints.save(tmp_path / 'a', {'w': np.ones(3)}, compress=True)
    assert self.run('inspect', path) == 0
    printed = capsys.readouterr().out
    assert 'chunks [3], compressed' in printed
    assert '(the whole tree)' in printed

  def test_interrupted(self, saved, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
      raise KeyboardInterrupt

    monkeypatch.setattr(streamed, '_write', interrupt)
    arguments = ('--method=average', '--experts', saved[0])
    assert self.run('merge', *arguments, '--output', tmp_path / 'out') == 130
    assert capsys.readouterr().err == 'mergekit-jax: interrupted\n'

  def test_a_reader_that_has_seen_enough(self, tmp_path):
    """As in `mergekit-jax inspect base | head -1`."""
    tree = {f'w{i}': np.ones(1, np.float32) for i in range(3000)}
    save_file(tree, tmp_path / 'model.safetensors')
    command = [sys.executable, '-m', 'mergekit_jax', 'inspect', str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
      assert process.stdout and process.stderr
      assert b'w0' in process.stdout.readline()
      process.stdout.close()
      assert process.wait(60) == 0
      assert process.stderr.read() == b''

  def test_methods(self, capsys):
    assert self.run('methods') == 0
    printed = capsys.readouterr().out
    for name in ('average', 'task_arithmetic', 'ties', 'dare', 'dare_ties'):
      assert re.search(rf'^{name}\(', printed, re.MULTILINE)
      summary = getattr(mk, name).__doc__.splitlines()[0]
      assert f'    {summary}\n' in printed
    assert "ties(density=0.2, scale=1.0, weights=None, scope='model'" in printed

  @pytest.mark.parametrize(
    'change',
    [
      ['--method=tise'],
      ['--set=density=2'],
      ['--base=/nowhere'],
      ['--memory_budget=little'],
      ['--memory_budget=10'],
      ['--dtype=float31'],
      ['--override=x:base'],
      ['--stacked_axes=(=1'],
      ['--weights', '1'],
      ['--mesh=fsdp=99'],
      ['--partition_rules=.*=tensor'],
    ],
    ids=str,
  )
  def test_mistakes(self, saved, capsys, change):
    """Exit code 1, one line on stderr, nothing on stdout, no traceback."""
    assert self.run('plan', *self.plan_arguments(saved), *change) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    (line,) = captured.err.splitlines()
    assert line.startswith('mergekit-jax: ')

  def test_how_orbax_stores_the_output(self, saved, tmp_path):
    """--zarr3, --nozarr3, --compression; without them as ever."""
    base, experts = saved
    merge = ['merge', '--method=average', '--base', base, '--experts', *experts]
    stored = {}
    for flags_ in ([], ['--zarr3'], ['--nozarr3', '--compression=zstd']):
      output = tmp_path / '_'.join(['out', *flags_])
      assert self.run(*merge, '--output', output, *flags_) == 0
      written = mk.open_checkpoint(output)
      compressed = written.storage('params/odd').compressed
      stored[' '.join(flags_)] = written.layout.use_zarr3, compressed
    assert stored == {
      '': (False, False),
      '--zarr3': (True, False),
      '--nozarr3 --compression=zstd': (False, True),
    }
    base = tmp_path / 'out_--zarr3'
    merge[3] = base
    assert self.run(*merge, '--output', tmp_path / 'as_the_base') == 0
    assert mk.open_checkpoint(tmp_path / 'as_the_base').layout.use_zarr3


def run_program(*arguments):
  return subprocess.run(
    [sys.executable, '-B', '-m', 'mergekit_jax', *map(str, arguments)],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    timeout=100,
  )


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), 'mallinfo2'), reason='not glibc 2.33 or later'
)
@pytest.mark.parametrize('given,expected', [(None, 1), ('33554432', 0)])
def test_what_is_as_large_as_a_chunk_is_mapped_again(given, expected):
  """Also when such memory was freed, unless the user has chosen otherwise."""
  program = """
import ctypes
from mergekit_jax import cli

names = 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks k'
class Info(ctypes.Structure):
  _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
cli._keep_heaps_small()
for _ in range(2):
  before = libc.mallinfo2().hblks
  memory = libc.malloc(2**23)
  mapped = libc.mallinfo2().hblks - before
  libc.free(memory)
print(mapped)
"""
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  environment.pop('MALLOC_MMAP_THRESHOLD_', None)
  if given:
    environment['MALLOC_MMAP_THRESHOLD_'] = given
  done = subprocess.run(
    [sys.executable, '-c', program],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert int(done.stdout) == expected


@pytest.mark.parametrize(
  ('told', 'given', 'expected'),
  [
    ({}, None, 'home/mergekit_jax'),
    ({}, 'there', None),
    # The first process alone writes, and a GPU's programs need all of them.
    ({'distributed': True}, None, None),
    ({'coordinator_address': 'host:1'}, None, None),
    ({'coordinator_address': None, 'distributed': False}, None, 'home/merge'),
  ],
)
def test_where_compiled_programs_are_kept(monkeypatch, told, given, expected):
  monkeypatch.setenv('XDG_CACHE_HOME', 'home')
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  if given:
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', given)
  updates = {}
  monkeypatch.setattr(jax.config, 'update', updates.__setitem__)
  cli._keep_compiled_programs(argparse.Namespace(**told))
  kept = updates.get('jax_compilation_cache_dir')
  assert kept.startswith(expected) if expected else kept is None


def test_a_process_that_has_joined_others_can_be_ended():
  """JAX's own handler of the signal would wait for a checkpoint of all."""
  program = """
import os, signal, sys, time
from mergekit_jax.command import joining, parser

joining.join(parser.parse(['mergekit-jax', *sys.argv[1:]]))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
  given = ['merge', '--method=average', '--experts=a', '--output=b']
  given += [f'--coordinator_address=127.0.0.1:{free_port()}']
  given += ['--num_processes=1', '--process_id=0']
  done = subprocess.run([sys.executable, '-c', program, *given], env=os.environ)
  assert done.returncode == -signal.SIGTERM


class TestProgram:
  """`python -m mergekit_jax` in a process of its own."""

  def test_merge(self, saved, tmp_path):
    base, experts = saved
    output = tmp_path / 'out'
    finished = run_program(
      *('merge', '--method', 'task_arithmetic', '--set', 'scale=0.5'),
      *('--base', base, '--experts', *experts, '--output', output),
      *('--override', '.*/odd:base', '--memory_budget', '1GiB'),
    )
    assert finished.returncode == 0, finished.stderr
    # Only our own lines of progress, nothing of Orbax and JAX.
    size = r'[1-9][\d.]* [KM]?i?B'
    progress = rf'merged \d+ % \({size} of {size}, {size}/s, \d+ s left\)'
    for line in finished.stderr.splitlines():
      assert re.match(rf'I\d{{4}} .* progress\.py:\d+\] {progress}', line), line
    assert '1 tensors merged, 2 copied' in finished.stdout
    assert f'merged checkpoint: {output}\n' in finished.stdout
    base, experts = models.trees(models.SMALL, experts=2)
    merged = checkpoints.load(output)
    expected = mk.merge(mk.task_arithmetic(0.5), experts, base)['params']
    np.testing.assert_array_equal(
      merged['params/dense/kernel'], expected['dense']['kernel']
    )
    np.testing.assert_array_equal(merged['params/odd'], base['params']['odd'])
    assert checkpoints.report_of(output)['rounds'] == 0

  def test_safetensors_need_no_orbax(self, tmp_path):
    """Which takes half as long to import as JAX."""
    models = [tmp_path / name for name in ('base', 'one', 'two')]
    for path in models:
      path.mkdir()
      save_file({'w': np.ones((4, 8), np.float32)}, path / 'model.safetensors')
    code = (
      'import sys, mergekit_jax as mk\n'
      'base, *experts, output = sys.argv[1:]\n'
      'mk.merge_checkpoints(\n'
      '  mk.ties(), experts=experts, base=base, output=output)\n'
      "print({name.partition('.')[0] for name in sys.modules})"
    )
    finished = subprocess.run(
      [sys.executable, '-c', code, *models, tmp_path / 'out'],
      capture_output=True,
      text=True,
    )
    assert finished.returncode == 0, finished.stderr
    imported = ast.literal_eval(finished.stdout)
    assert 'jax' in imported and 'orbax' not in imported

  def test_many_merges(self, saved, tmp_path):
    """A line for each, and how to restore the first."""
    base, experts = saved
    output = tmp_path / 'out'
    finished = run_program(
      *('merge', '--method', 'average', 'dare', '--sweep', 'scale=0.5,1'),
      *('--base', base, '--experts', *experts, '--output', output),
    )
    assert finished.returncode == 0, finished.stderr
    head, *lines, end = finished.stdout.splitlines()
    assert head == '3 merges of 2 tensors, 1 copied'
    names = ['average', 'dare-scale=0.5', 'dare-scale=1']
    assert [x.split()[0] for x in lines if x.split()[0] in names] == names
    assert end == f'merged checkpoints: {output}/<merge>'
    (call,) = [x for x in lines if x.startswith('restore average: ')]
    restored = eval(call.partition(': ')[2], {'orbax': orbax})
    base, experts = models.trees(models.SMALL, experts=2)
    expected = mk.merge(mk.average(), experts, base)['params']
    np.testing.assert_array_equal(
      restored['params']['dense']['kernel'], expected['dense']['kernel']
    )
    # All of one read: of floats in each model, of the rest in the base.
    leaves = jax.tree.leaves(base['params'])
    size = sum(x.nbytes * (3 if x.dtype == np.float32 else 1) for x in leaves)
    for name in names:
      assert checkpoints.report_of(output / name)['bytes_read'] == size

  def test_closed_streams(self, saved, tmp_path):
    """A merge needs none of them, and nothing else may get their numbers."""
    output = tmp_path / 'out'
    command = [sys.executable, '-m', 'mergekit_jax', 'merge']
    command += ['--method=average', '--experts', saved[0], '--output', output]
    closing = ['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh']
    finished = subprocess.run([*closing, *command], timeout=100)
    assert finished.returncode == 0
    assert verify(output) == []

  def test_what_cannot_be_encoded(self, saved, tmp_path, monkeypatch):
    (tmp_path / 'ü').symlink_to(saved[0])
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    finished = run_program('inspect', tmp_path / 'ü')
    assert (finished.returncode, finished.stderr) == (0, '')
    assert rf'orbax at {tmp_path}/\xfc: 3 leaves' in finished.stdout

  def test_mistake(self, saved, tmp_path):
    base, experts = saved
    finished = run_program(
      *('merge', '--method', 'ties', '--base', base, '--experts', *experts),
      *('--output', base / 'inside'),
    )
    assert finished.returncode == 1
    assert finished.stdout == ''
    (line,) = finished.stderr.splitlines()
    assert line.startswith('mergekit-jax: ') and 'lie in each other' in line


def test_other_logging_is_kept_off():
  """Warnings of others pass, their information does not; ours does."""
  record = lambda level, path: standard_logging.LogRecord(
    'absl', level, path, 1, '', (), None
  )
  info, warning = standard_logging.INFO, standard_logging.WARNING
  ours = pathlib.Path(mk.__file__).parent / 'streamed.py'
  assert cli._is_ours_or_a_warning(record(info, str(ours)))
  assert cli._is_ours_or_a_warning(record(warning, '/orbax/checkpointer.py'))
  assert not cli._is_ours_or_a_warning(record(info, '/orbax/checkpointer.py'))
