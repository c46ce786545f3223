import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxpref.train.workdir import Workdir
from jaxpref.train.writers import JsonLines, open_writers, read_metrics


@pytest.fixture
def workdir(tmp_path):
  return Workdir(tmp_path)


def steps(path):
  return [line['step'] for line in read_metrics(path)]


def test_lines_are_json_and_floats_come_back_exactly(workdir):
  third = np.float32(1) / np.float32(3)
  writers = open_writers(workdir, tensorboard=False)
  writers.write(1, {'loss': jnp.asarray(third), 'tiny': 5e-324, 'tokens': 2**60})
  writers.write(2, {'loss': float('nan'), 'up': math.inf, 'down': np.float32(-math.inf)})
  # Every line is on disk before the file is closed.
  first, second = workdir.metrics.read_text().splitlines()
  assert json.loads(first) == {'step': 1, 'loss': float(third), 'tiny': 5e-324, 'tokens': 2**60}
  strict = json.loads(second, parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
  assert strict == {'step': 2, 'loss': 'nan', 'up': 'inf', 'down': '-inf'}
  line = read_metrics(workdir.metrics)[1]
  assert math.isnan(line['loss']) and line['up'] == math.inf and line['down'] == -math.inf
  writers.close()


def test_what_a_resumed_run_repeats_is_removed(workdir):
  def write(start, stop):
    writer = JsonLines(workdir.metrics, start)
    for step in range(start + 1, stop + 1):
      writer.write(step, {'loss': 1 / step})
      if step % 2 == 0:
        writer.write(step, {'eval/loss': 2 / step})
    writer.close()

  write(0, 6)
  whole = workdir.metrics.read_text()
  write(4, 6)  # killed after step 6, with a checkpoint of step 4
  assert workdir.metrics.read_text() == whole
  write(0, 3)  # killed before the first checkpoint
  assert steps(workdir.metrics) == [1, 2, 2, 3]


@pytest.mark.parametrize('cut', range(1, 8))
def test_a_half_written_last_line_is_dropped(workdir, caplog, cut):
  writer = JsonLines(workdir.metrics)
  for step in (1, 2, 3):
    writer.write(step, {'loss': 0.5})
  writer.close()
  text = workdir.metrics.read_text()
  workdir.metrics.write_text(text[:-cut])
  writer = JsonLines(workdir.metrics, 5)
  writer.write(6, {'loss': 0.5})
  writer.close()
  whole = cut == 1  # only the newline was missing
  assert steps(workdir.metrics) == ([1, 2, 3, 6] if whole else [1, 2, 6])
  assert ('metrics.jsonl:3 is not a whole line' in caplog.text) == (not whole)


def read_events(folder):
  """TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
  events = []
  for file in sorted(folder.iterdir()):
    data = file.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      events.append(Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return events


def test_tensorboard_gets_scalars_and_forgets_what_is_repeated(workdir):
  for resume_step in (0, 3):
    writers = open_writers(workdir, resume_step)
    for step in range(resume_step + 1, 6):
      writers.write(step, {'rewards/margins': 0.5 * step, 'bad': float('nan')})
    writers.close()
  events = read_events(workdir.tensorboard)
  values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
  assert (5, 'rewards/margins', 2.5) in values
  assert [e.step for e in events if e.session_log.status == 1] == [1, 4]


def test_wandb_is_one_run_per_workdir(workdir, monkeypatch):
  calls = []
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append('finish')
  )
  fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  for _ in range(2):
    writers = open_writers(workdir, tensorboard=False, wandb='project', config={'seed': 1})
    writers.write(4, {'loss': jnp.asarray(0.5)})
    writers.close()
  first, *rest = calls[:3]
  assert (first['project'], first['config'], first['resume']) == ('project', {'seed': 1}, 'allow')
  assert rest == [(4, {'loss': 0.5}), 'finish']
  assert calls[3] == first


def test_a_missing_wandb_says_how_to_install_it(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r'pip install jaxpref\[wandb\]'):
    open_writers(workdir, tensorboard=False, wandb='project')


def test_only_process_0_writes(workdir, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  writers = open_writers(workdir)
  writers.write(1, {'loss': 0.5})
  writers.close()
  assert not list(workdir.path.iterdir())
