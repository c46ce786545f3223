"""Files of every format, compressed or not, hold the same records; broken ones say where."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from jaxpref.data import files
from jaxpref.data.sources import DataError, open_source

RECORDS = [{'prompt': f'Zwölf, {i}\n"mal"', 'completion': str(i * i)} for i in range(5)]


def write_csv(path):
  with open(path, 'w', newline='') as file:
    rows = csv.DictWriter(file, RECORDS[0])
    rows.writeheader()
    rows.writerows(RECORDS)


def write_stream(path):
  table = pa.Table.from_pylist(RECORDS)
  with pa.ipc.new_stream(path, table.schema) as out:
    out.write_table(table, max_chunksize=2)


def write_file(path):
  table = pa.Table.from_pylist(RECORDS)
  with pa.ipc.new_file(path, table.schema) as out:
    out.write_table(table, max_chunksize=2)


def write_zst(path):
  with pa.output_stream(path, compression='zstd') as out:
    out.write('\n'.join(map(json.dumps, RECORDS)).encode())


WRITERS = {
  'a.jsonl': lambda path: path.write_text('\n'.join(map(json.dumps, RECORDS))),
  'a.jsonl.gz': lambda path: path.write_bytes(
    gzip.compress('\n'.join(map(json.dumps, RECORDS)).encode())
  ),
  'a.jsonl.zst': write_zst,
  'lines.json': lambda path: path.write_text('\n'.join(map(json.dumps, RECORDS))),
  'a.json': lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
  'a.csv': write_csv,
  'a.parquet': lambda path: pa.parquet.write_table(
    pa.Table.from_pylist(RECORDS), path, row_group_size=2
  ),
  'stream.arrow': write_stream,
  'file.arrow': write_file,
}


@pytest.mark.parametrize('name', WRITERS)
def test_every_format_gives_the_same_records(name, tmp_path):
  path = tmp_path / name
  WRITERS[name](path)
  read = list(open_source(str(path)).records())
  assert [record for _, record in read] == RECORDS
  assert all(origin.startswith(str(path)) for origin, _ in read)
  assert len({origin for origin, _ in read}) == len(RECORDS)


def test_tsv_knows_no_quotes_and_a_header_can_be_given(tmp_path):
  path = tmp_path / 'a.tsv'
  path.write_text('say "hi\t1\n"x"\t2\n')
  read = [record for _, record in open_source(f'{path}?names=text,id').records()]
  assert read == [{'text': 'say "hi', 'id': '1'}, {'text': '"x"', 'id': '2'}]


def test_text_is_cut_at_lines_or_paragraphs(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one\n\n\ntwo\nthree\n\nfour')
  read = {
    by: [(o.rpartition(':')[2], r['text']) for o, r in open_source(f'{path}?by={by}').records()]
    for by in ('line', 'paragraph', 'file')
  }
  assert read['line'] == [('1', 'one'), ('4', 'two'), ('5', 'three'), ('7', 'four')]
  assert read['paragraph'] == [('1', 'one'), ('4', 'two\nthree'), ('7', 'four')]
  assert read['file'] == [('1', 'one\n\n\ntwo\nthree\n\nfour')]
  with pytest.raises(DataError, match="by should be 'line', 'paragraph' or 'file', got 'page'"):
    list(open_source(f'{path}?by=page').records())


BROKEN = {
  'deep.jsonl': (
    b'{}\n' + b'[' * 100_000 + b'\n',
    r'deep.jsonl:2: not JSON: .*recursion',
  ),
  'digits.jsonl': (b'{"n": ' + b'9' * 5000 + b'}\n', r'digits.jsonl:1: not JSON'),
  'deep.json': (b'[' * 100_000, r'deep.json: not JSON'),
  'a.parquet': (b'PAR1 nothing of the kind', r'a.parquet: not Parquet'),
  'empty.parquet': (b'', r'empty.parquet: not Parquet'),
  'a.arrow': (b'nothing of the kind', r'a.arrow: not Arrow'),
  'a.jsonl.zst': (b'not zstd at all', r'a.jsonl.zst: cannot be read after line 0'),
  'a.jsonl.gz': (b'not gzip at all', r'a.jsonl.gz: broken gzip after line 0'),
  'wide.csv': (b'a,b\n1,2\n1,2,3\n', r"wide.csv:3: expected 2 columns \['a', 'b'\], got 3"),
  'open.csv': (b'a,b\n1,"2\n3,4\n', r'open.csv:2: not CSV: unexpected end'),
  'latin.csv': ('a,b\nü,2\n'.encode('latin-1'), r'latin.csv:2: not UTF-8 at byte 0'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_files_say_where(name, tmp_path):
  content, message = BROKEN[name]
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(DataError, match=message) as error:
    list(open_source(str(path)).records())
  assert len(str(error.value)) < 500


def test_a_giant_line_is_refused_without_reading_it_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MAX_LINE', 2 << 20)
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'{"text": "a"}\n{"text": "' + b'x' * (5 << 20) + b'"}\n{"text": "b"}\n')
  with pytest.raises(DataError, match=r'a.jsonl:2: a line of more than 2 MiB'):
    list(open_source(str(path)).records())
  bad = []
  read = [(o[-1], r['text']) for o, r in open_source(str(path)).records(bad)]
  assert read == [('1', 'a'), ('3', 'b')] and len(bad) == 1
  array = tmp_path / 'a.json'  # here one line is the whole file, as json.dump writes it
  array.write_text(json.dumps([{'text': 'x' * 999}] * 3000))
  assert len(list(open_source(str(array)).records())) == 3000


def test_urls_are_read_through_epath(tmp_path, monkeypatch):
  from etils import epath

  for name in ('b', 'a'):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps({'text': name}))
  monkeypatch.setattr(
    files, 'open_url', lambda url: epath.Path(url.replace('gs://bucket', str(tmp_path)))
  )
  monkeypatch.setattr(files, 'is_url', lambda path: path.startswith(('gs://', str(tmp_path))))
  source = open_source('gs://bucket/*.jsonl')
  assert [record['text'] for _, record in source.records()] == ['a', 'b']
  before = source.content
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': 'longer'}))
  assert open_source('gs://bucket/*.jsonl').content != before
  with pytest.raises(DataError, match=r"no file matches 'gs://bucket/c\*.jsonl'"):
    open_source('gs://bucket/c*.jsonl')
  with pytest.raises(DataError, match='is a folder'):
    open_source('jsonl:gs://bucket')


def test_an_unreachable_bucket_says_what_is_needed(monkeypatch):
  def no_backend(url):
    raise ImportError('gcsfs is not installed')

  monkeypatch.setattr(files, 'open_url', no_backend)
  with pytest.raises(DataError, match=r"cannot read 'gs://bucket/a.jsonl'.*pip install gcsfs"):
    open_source('gs://bucket/a.jsonl')
