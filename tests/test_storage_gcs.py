"""Runs at gs://, against a stand-in of Google Cloud Storage."""

import json
from pathlib import Path

import jax
import pytest
from etils import epath

from jaxpref import models
from jaxpref.cli.main import main
from jaxpref.data.tokenizer import load_tokenizer
from jaxpref.storage import Growing, before, check_writable, open_path
from jaxpref.train.checkpoint import Checkpoints
from jaxpref.train.writers import read_metrics
from tests import gcs
from tests.states import assert_equal, make_state


@pytest.fixture(scope='module')
def bucket():
  with gcs.stand_in() as bucket:
    yield bucket


def test_small_files(bucket):
  folder = open_path('gs://bucket/small')
  assert isinstance(folder, epath.Path) and not folder.is_dir()
  check_writable(folder)
  assert not bucket.names('small')
  growing = Growing(folder / 'a.jsonl', before('n', 0))
  for n in range(4):
    growing.write(json.dumps({'n': n}) + '\n')
  assert not bucket.names('small')  # nothing can be appended to an object
  growing.flush()
  growing.flush()
  assert bucket.text('small/a.jsonl').count('\n') == 4
  growing = Growing(folder / 'a.jsonl', before('n', 2))
  growing.write('{"n": 2, "é": 1}\n')
  growing.flush()
  assert bucket.text('small/a.jsonl') == '{"n": 0}\n{"n": 1}\n{"n": 2, "é": 1}\n'
  assert bucket.log.count('write small/a.jsonl') == 3


def test_a_bucket_that_may_not_be_written_is_named(bucket):
  bucket.refuse = 'locked/'
  with pytest.raises(OSError, match=r'cannot write to gs://bucket/locked: .*credentials that may'):
    check_writable(open_path('gs://bucket/locked'))
  bucket.refuse = ''


def test_checkpoints(bucket, caplog):
  """Whole ones come back; half a one is never seen, a damaged one named, its step saved again."""
  checkpoints = Checkpoints('gs://bucket/run', keep_last=2)
  for step in (1, 2, 3):
    assert checkpoints.save(step, make_state(step), {'position': step})
  checkpoints.save_reference(make_state(7).params)
  checkpoints.close()
  assert not bucket.names('run/checkpoints/1')
  del bucket.objects['run/checkpoints/3/commit_success.txt']
  watcher = Checkpoints('gs://bucket/run', read_only=True)
  assert watcher.steps() == [2] and bucket.names('run/checkpoints/3')
  assert_equal(watcher.restore_reference(), make_state(7).params)
  checkpoints = Checkpoints('gs://bucket/run')
  assert checkpoints.steps() == [2]
  assert checkpoints.save(3, make_state(3), {'position': 3})
  checkpoints.wait()
  assert watcher.steps() == [2, 3]
  bucket.write('run/checkpoints/3/state/manifest.ocdbt', b'')
  state, meta = checkpoints.restore(make_state())
  assert_equal(state, make_state(2))
  assert meta['position'] == 2
  assert 'gs://bucket/run/checkpoints/3 is damaged' in caplog.text
  assert checkpoints.steps() == [2] == watcher.steps()
  assert checkpoints.save(3, make_state(3))
  assert_equal(checkpoints.restore(make_state())[0], make_state(3))
  checkpoints.close()
  watcher.close()


@pytest.mark.slow
def test_a_run_at_gs_is_one_on_a_disk(bucket, tmp_path):
  """Killed while it saves, too; and every command reads it there, as the next run does."""
  words = ('red', 'green', 'blue', 'white')
  pairs = tmp_path / 'pairs.jsonl'
  pairs.write_text(
    ''.join(
      json.dumps({'prompt': f'{a} {b}', 'chosen': f' {a}', 'rejected': ' no'}) + '\n'
      for a in words
      for b in words
    )
  )
  base = tmp_path / 'base'
  config = models.preset('tiny', width=16, mlp_width=32, num_layers=1)
  models.save_hf(base, *models.init(config, jax.random.key(0)), load_tokenizer('byte'))

  def jaxpref(*arguments):
    assert main(arguments) == 0

  def train(workdir, *more):
    jaxpref(
      'train', '--config=dpo:tiny', f'--config.data.train=jsonl:{pairs}', '--config.steps=4',
      '--config.batch.size=8', '--config.data.max_length=48', '--config.log.tensorboard=False',
      '--config.checkpoint.every=2', '--config.eval.every=2', *more, f'--workdir={workdir}',
    )  # fmt: skip

  def found(workdir):
    clock = ('seconds', '_per_second', 'data_wait')
    lines = read_metrics(open_path(workdir) / 'metrics.jsonl')
    checkpoints = Checkpoints(workdir, read_only=True)
    return (
      [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines],
      checkpoints.restore_params(),
    )

  def same(one, other):
    assert one[0] == other[0]
    assert_equal(one[1], other[1])

  here, there = tmp_path / 'run', 'gs://bucket/dpo'
  for workdir in (here, there):
    train(workdir, f'--config.model={base}')
  same(found(here), found(there))
  assert bucket.log.count('write dpo/metrics.jsonl') == 2  # before each checkpoint
  assert not [name for name in bucket.names() if name.endswith('.tmp')]
  kept = {str(file.relative_to(here)) for file in (here / 'base').rglob('*') if file.is_file()}
  assert kept == {name.removeprefix('dpo/') for name in bucket.names('dpo/base/')}
  assert not Path('gs:').exists()

  del bucket.objects['dpo/checkpoints/4/commit_success.txt']
  bucket.log.clear()
  train(there, f'--config.model={base}')
  same(found(here), found(there))
  metrics, marker = 'write dpo/metrics.jsonl', 'write dpo/checkpoints/4/commit_success.txt'
  assert bucket.log.index(metrics) < bucket.log.index(marker)

  written = {}
  for model in (here, there):
    out = tmp_path / f'of-{Path(model).parent.name}'
    out.mkdir()
    jaxpref('eval', f'--model={model}', f'--json={out}/eval.json')
    jaxpref('export', f'--model={model}', f'--output={out}/hf')
    jaxpref(
      'generate', f'--model={model}', '--prompt=red', '--max_new_tokens=4', f'--output={out}/texts'
    )
    train(out / 'next', f'--config.model={model}')
    files = {file.name: file.read_bytes() for file in (out / 'hf').iterdir()}
    measured = json.loads((out / 'eval.json').read_text())['metrics']
    written[model] = files, (out / 'texts').read_text(), measured, found(out / 'next')[0]
  assert written[here] == written[there]
