"""Sources: files and TFDS splits, and errors that point at the line."""

import gzip
import json
import subprocess
import sys

import pytest

from jaxpref.data.sources import DataError, open_source


def write_lines(path, lines):
  data = ''.join(f'{line}\n' for line in lines).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz'])
@pytest.mark.parametrize('scheme', ['jsonl:', ''])
def test_lines_are_records_with_their_origin(name, scheme, tmp_path):
  path = write_lines(tmp_path / name, ['\ufeff{"text": "é"}', '', ' {"text": "b"}'])
  records = list(open_source(f'{scheme}{path}').records())
  assert records == [(f'{path}:1', {'text': 'é'}), (f'{path}:3', {'text': 'b'})]


def test_a_glob_reads_its_files_in_order(tmp_path):
  for name in ('b', 'a', 'c'):
    write_lines(tmp_path / f'{name}.jsonl', [json.dumps({'text': name})])
  records = open_source(f'jsonl:{tmp_path}/*.jsonl').records()
  assert [record['text'] for _, record in records] == ['a', 'b', 'c']


def test_a_json_file_is_one_array(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text('[{"text": "a"},\n {"text": "b"}, 3]')
  bad = []
  assert [origin for origin, _ in open_source(str(path)).records(bad)] == [
    f'{path}[0]',
    f'{path}[1]',
  ]
  assert bad == [f'{path}[2]: expected a JSON object, got int: 3']
  path.write_text('{"text":\n "a"}')
  with pytest.raises(DataError, match=r"expected a JSON array of records.*got dict \['text'\]"):
    list(open_source(str(path)).records())


def test_bad_lines_raise_or_are_noted(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "a"}\n{"text": }\n[1]\n"\xff"\n{"text": "b"}\n')
  with pytest.raises(DataError, match=r'a.jsonl:2: not JSON: .*: \{"text": \}'):
    list(open_source(f'jsonl:{path}').records())
  bad = []
  assert len(list(open_source(f'jsonl:{path}').records(bad))) == 2
  assert [line.split(':')[1] for line in bad] == ['2', '3', '4']
  assert 'expected a JSON object, got list: [1]' in bad[1]
  assert 'not UTF-8 at byte 1' in bad[2]


def test_a_broken_gzip_says_where(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl.gz', ['{"text": "a"}'] * 1000)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(DataError, match=r'a.jsonl.gz: broken gzip after line \d+'):
    list(open_source(str(path)).records())


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('jsonl:{}/none-*.jsonl', 'no file matches'),
    ('jsonl:{}/pair.jsonl', "no such file.*did you mean '.*pairs.jsonl'"),
    ('{}/nothing.jsonl', 'no such file'),
    ('jsnl:{}/pairs.jsonl', "did you mean 'jsonl'"),
    ('{}/pairs.doc', 'cannot tell what data source.*Expected'),
    ('tfds:name', r"expected 'tfds:NAME/CONFIG:SPLIT\[\?data_dir=DIR\]', got 'tfds:name'"),
    ('tfds:name:train?dir=x', "unknown option 'dir'.*known: data_dir"),
    ('tfds:no_such_set:train?data_dir={}', "TFDS knows no data set 'no_such_set'"),
  ],
)
def test_a_source_that_cannot_be_opened_says_why(spec, message, tmp_path):
  write_lines(tmp_path / 'pairs.jsonl', ['{}'])
  with pytest.raises(DataError, match=message):
    open_source(spec.format(tmp_path))


def test_content_follows_the_bytes_not_the_names(tmp_path):
  one = write_lines(tmp_path / 'one.jsonl', ['{"text": "a"}'])
  two = write_lines(tmp_path / 'two.jsonl', ['{"text": "a"}'])
  before = open_source(str(one)).content
  assert before == open_source(str(two)).content
  write_lines(one, ['{"text": "b"}'])
  assert before != open_source(str(one)).content


@pytest.mark.parametrize(
  ('part', 'expected'),
  [
    ('[:3]', [0, 1, 2]),
    ('[2:4]', [2, 3]),
    ('[8:99]', [8, 9]),
    ('[-2:]', [8, 9]),
    ('[:-8]', [0, 1]),
    ('[:25%]', [0, 1]),
    ('[25%:50%]', [2, 3, 4]),
    ('[50%:]', [5, 6, 7, 8, 9]),
    ('[:]', list(range(10))),
  ],
)
def test_parts_of_a_source(part, expected, tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', [json.dumps({'n': n}) for n in range(10)])
  source = open_source(f'jsonl:{path}{part}')
  assert [record['n'] for _, record in source.records()] == expected
  assert [origin for origin, _ in source.records()] == [f'{path}:{n + 1}' for n in expected]
  assert source.content != open_source(f'jsonl:{path}').content
  assert source.name == f'jsonl:{path}{part}'


@pytest.mark.parametrize('cut', ['10%', '33%', '50%', '66.7%', '99%'])
def test_parts_meet_without_gap_or_overlap(cut, tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', [json.dumps({'n': n}) for n in range(7)])
  halves = [open_source(f'{path}{part}').records() for part in (f'[:{cut}]', f'[{cut}:]')]
  assert [record['n'] for half in halves for _, record in half] == list(range(7))


def test_a_class_of_characters_in_a_glob_is_no_part(tmp_path):
  for name in 'abc':
    write_lines(tmp_path / f'{name}.jsonl', [json.dumps({'text': name})])
  records = open_source(f'jsonl:{tmp_path}/[ab].jsonl[1:]').records()
  assert [record['text'] for _, record in records] == ['b']


def test_columns_in_the_source(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', ['{"q": "Q", "a": "A"}', '{"q": "R"}'])
  source = open_source(f'jsonl:{path}[:1]?prompt={{q}}:\\n&completion=a')
  assert [r for _, r in source.records()] == [{'prompt': 'Q:\n', 'completion': 'A'}]
  whole = open_source(f'jsonl:{path}?prompt={{q}}&completion=a')
  with pytest.raises(DataError, match=r"a.jsonl:2: no key 'a' \(columns: 'completion'\)"):
    list(whole.records())
  bad = []
  assert len(list(whole.records(bad))) == 1 and len(bad) == 1
  with pytest.raises(DataError, match=r"unknown option 'promt'.*did you mean 'prompt'"):
    open_source(f'jsonl:{path}?promt=q')


TFDS_SCRIPT = """
import sys, warnings
warnings.simplefilter('error')
sys.path.insert(0, {tests!r})
from tiny_pairs import tiny_pairs_dataset_builder as tiny
for config in ('text', 'chat'):
  builder = tiny.Builder(config=config, data_dir={folder!r}, file_format='array_record')
  builder.download_and_prepare()
from jaxpref.data.sources import DataError, open_source
whole = open_source('tfds:tiny_pairs/text:train?data_dir={folder}')
records = list(whole.records())
assert len(records) == 6
assert records[0][0] == 'tfds:tiny_pairs/text:train[0]', records[0]
assert sorted(r['prompt'] for _, r in records) == [f'Ça va? {{i}}' for i in range(6)]
part = open_source('tfds:tiny_pairs/text:train[:50%]?data_dir={folder}')
assert [r for _, r in part.records()] == [r for _, r in records[:3]]
assert part.content != whole.content
_, talk = next(open_source('tfds:tiny_pairs/chat:train?data_dir={folder}').records())
assert talk['prompt'][0]['role'] == 'user' and talk['chosen'][0]['content'].startswith(' Yes')
try:
  open_source('tfds:tiny_pairs/text:test?data_dir={folder}')
except DataError as error:
  assert "no split 'test'; it has ['train']" in str(error), error
else:
  raise AssertionError('no error for an unknown split')
assert 'tensorflow' not in sys.modules
"""


def test_tfds_splits_are_read_without_tensorflow(tmp_path, request):
  # In a process of its own: what other tests import must not decide what is found imported.
  script = TFDS_SCRIPT.format(tests=str(request.path.parent), folder=str(tmp_path))
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
