"""Programs are compiled once a machine, with nothing said about it."""

import os
import pathlib
import subprocess
import sys

from tests import checkpoints, models

# What the tests of this repository, or a user, may have set.
SETTINGS = ('JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE')


def test_programs_are_kept_below_the_home_of_caches(tmp_path):
  """The first merge leaves what it compiled, the second has nothing to add."""
  base, experts = checkpoints.save_set(tmp_path, models.SMALL, experts=2)
  variables = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(SETTINGS)
  }
  home = tmp_path / 'home'
  variables['XDG_CACHE_HOME'] = str(home)

  def kept_after_a_merge(output):
    command = [sys.executable, '-m', 'mergekit_jax', 'merge', '--method=ties']
    command += ['--base', base, '--experts', *experts, '--output', output]
    subprocess.run(
      command, env=variables, cwd=pathlib.Path(__file__).parents[1], check=True
    )
    return {
      file.relative_to(home)
      for file in home.rglob('*')
      # When a program was used last.
      if file.is_file() and not file.name.endswith('-atime')
    }

  first = kept_after_a_merge(tmp_path / 'first')
  assert len(first) >= 3  # two rounds and the merge itself
  assert {file.parts[0] for file in first} == {'mergekit_jax'}
  assert kept_after_a_merge(tmp_path / 'second') == first
