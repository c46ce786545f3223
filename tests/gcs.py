"""A stand-in for Google Cloud Storage: as much of its JSON API as runs use, over a dict.

TensorStore finds it by TENSORSTORE_GCS_HTTP_URL. Paths of etils come to it by gcsfs (the extra
`gcs`), or, where that is not installed, by `Objects`, which asks for the same over HTTP.
"""

import base64
import contextlib
import email
import email.policy
import hashlib
import http.server
import importlib.util
import io
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

import fsspec
import pytest
from orbax.checkpoint._src.path import gcs_utils

BUCKET = 'bucket'


class Bucket(http.server.ThreadingHTTPServer):
  """Objects by name, their writes and deletions in the order in which they came."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Request)
    self.lock, self.count = threading.RLock(), 0
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.parts: dict[str, bytes] = {}  # of uploads in several requests
    self.log: list[str] = []
    self.refuse = ''  # uploads whose names hold this are forbidden
    self.url = f'http://127.0.0.1:{self.server_port}'

  def write(self, name, data):
    with self.lock:
      self.count += 1
      self.objects[name] = self.count, data
      self.log.append(f'write {name}')

  def text(self, name):
    return self.objects[name][1].decode()

  def names(self, prefix=''):
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))


class _Request(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # an answer is one packet
  server: Bucket

  def handle_one_request(self):
    with contextlib.suppress(ConnectionError):
      super().handle_one_request()

  def answer(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    with self.server.lock:
      self.reply(*self.result(self.command, url.path, query, body))

  do_GET = do_POST = do_DELETE = answer

  def log_message(self, *args):
    pass

  def reply(self, code, data=b'', headers=()):
    self.send_response(code)
    for name, value in {**dict(headers), 'Content-Length': len(data)}.items():
      self.send_header(name, str(value))
    self.end_headers()
    self.wfile.write(data)

  def result(self, method, path, query, body):
    """(status, content[, headers])."""
    if not (found := re.fullmatch(r'(?P<how>.*)/storage/v1/b/[^/]+(/o(/(?P<name>.*))?)?', path)):
      return 400, b''
    name = urllib.parse.unquote(found['name'] or '')
    if found['how'] == '/upload':
      return self.upload(query, body)
    if method == 'POST':
      name, target = map(urllib.parse.unquote, found['name'].split('/moveTo/o/'))
      self.server.write(target, self.server.objects.pop(name)[1])
      return 200, json.dumps(self.described(target)).encode()
    if not name:
      listed = self.listed(query) if path.endswith('/o') else {'name': BUCKET}
      return 200, json.dumps(listed).encode()
    if name not in self.server.objects:
      return 404, b'{"error": {"code": 404, "message": "No such object"}}'
    generation, data = self.server.objects[name]
    if method == 'DELETE':
      del self.server.objects[name]
      self.server.log.append(f'delete {name}')
      return 204, b''
    if query.get('alt') != 'media':
      return 200, json.dumps(self.described(name)).encode()
    return self.read(generation, data)

  def read(self, generation, data):
    headers = {'x-goog-generation': generation, 'x-goog-stored-content-length': len(data)}
    if part := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or ''):
      first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
      if first > last:
        return 416, b''
      headers['Content-Range'] = f'bytes {first}-{last}/{len(data)}'
      return 206, data[first : last + 1], headers
    return 200, data, headers

  def upload(self, query, body):
    how, name = query.get('uploadType'), query.get('name', '')
    if how == 'multipart':
      message = email.message_from_bytes(
        b'Content-Type: ' + self.headers['Content-Type'].encode() + b'\r\n\r\n' + body,
        policy=email.policy.HTTP,
      )
      about, content = message.get_payload()
      name, body = json.loads(about.get_payload())['name'], content.get_payload(decode=True)
    if how == 'resumable' and 'upload_id' not in query:
      self.server.parts[name] = b''
      where = f'{self.server.url}{self.path}&upload_id={urllib.parse.quote(name, safe="")}'
      return 200, b'', {'Location': where}
    if how == 'resumable':
      self.server.parts[name] += body
      if self.headers['Content-Range'].endswith('/*'):
        return 308, b'', {'Range': f'bytes=0-{len(self.server.parts[name]) - 1}'}
      body = self.server.parts.pop(name)
    if self.server.refuse and self.server.refuse in name:
      return 403, b'{"error": {"code": 403, "message": "may not create objects"}}'
    wanted = query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != self.server.objects.get(name, (0,))[0]:
      return 412, b'{"error": {"code": 412, "message": "Precondition Failed"}}'
    self.server.write(name, body)
    return 200, json.dumps(self.described(name)).encode()

  def listed(self, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], set()
    for name in self.server.names(prefix):
      if name < query.get('startOffset', '') or name >= query.get('endOffset', '\U0010ffff'):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
      else:
        items.append(self.described(name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}

  def described(self, name):
    generation, data = self.server.objects[name]
    return {
      'kind': 'storage#object', 'bucket': BUCKET, 'name': name, 'size': str(len(data)),
      'generation': str(generation), 'metageneration': '1', 'storageClass': 'STANDARD',
      'md5Hash': base64.b64encode(hashlib.md5(data).digest()).decode(),
      'timeCreated': '2026-01-01T00:00:00.000Z', 'updated': '2026-01-01T00:00:00.000Z',
    }  # fmt: skip


class Objects(fsspec.AbstractFileSystem):
  """What etils asks of gcsfs, without it."""

  protocol = ('gs', 'gcs')
  cachable = False
  url = ''

  def ask(self, method, path, query='', data=None):
    bucket, _, name = self._strip_protocol(path).partition('/')
    name = '' if 'prefix' in query or 'name' in query else f'/{urllib.parse.quote(name, safe="")}'
    upload = '/upload' if data is not None else ''
    url = f'{self.url}{upload}/storage/v1/b/{bucket}/o{name}?{urllib.parse.urlencode(query)}'
    try:
      request = urllib.request.Request(url, data, method=method)
      with urllib.request.urlopen(request) as answer:
        return answer.read()
    except urllib.error.HTTPError as error:
      with error:
        if error.code == 404:
          raise FileNotFoundError(path) from None
        raise OSError(f'{error.code}: {error.read().decode()}') from None

  def listed(self, path):
    bucket, _, name = self._strip_protocol(path).partition('/')
    query = {'delimiter': '/', 'prefix': f'{name}/' if name else ''}
    found = json.loads(self.ask('GET', path, query))
    files = [
      {'name': f'{bucket}/{one["name"]}', 'size': int(one['size']), 'type': 'file'}
      for one in found['items']
    ]
    folders = [
      {'name': f'{bucket}/{one[:-1]}', 'size': 0, 'type': 'directory'} for one in found['prefixes']
    ]
    return files + folders

  def ls(self, path, detail=True, **options):
    found = self.listed(path) or [self.info(path)]
    return found if detail else [one['name'] for one in found]

  def info(self, path, **options):
    name = self._strip_protocol(path)
    if '/' not in name or self.listed(path):
      return {'name': name, 'size': 0, 'type': 'directory'}
    about = json.loads(self.ask('GET', path))
    return {'name': name, 'size': int(about['size']), 'type': 'file'}

  def rm_file(self, path):
    with contextlib.suppress(FileNotFoundError):  # a folder
      self.ask('DELETE', path)

  def _open(self, path, mode='rb', **options):
    if mode == 'rb':
      return io.BytesIO(self.ask('GET', path, {'alt': 'media'}))
    return _Upload(self, path)

  def mkdir(self, path, **options):
    pass

  makedirs = rmdir = mkdir


class _Upload(io.BytesIO):
  def __init__(self, objects, path):
    super().__init__()
    self.objects, self.path = objects, path

  def close(self):
    if not self.closed:
      name = self.objects._strip_protocol(self.path).partition('/')[2]
      query = {'uploadType': 'media', 'name': name}
      self.objects.ask('POST', self.path, query, self.getvalue())
    super().close()


@contextlib.contextmanager
def stand_in():
  """A `Bucket` that answers as gs://bucket, to this process and to those that it starts."""
  bucket = Bucket()
  threading.Thread(target=bucket.serve_forever, daemon=True).start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', bucket.url)
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'none')
    patch.setenv('STORAGE_EMULATOR_HOST', bucket.url)
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')  # it would look for credentials
    if importlib.util.find_spec('gcsfs') is None:
      patch.setattr(Objects, 'url', bucket.url)
      for name in Objects.protocol:
        fsspec.register_implementation(name, Objects, clobber=True)
      patch.setattr(gcs_utils, 'get_bucket', lambda name: None)  # it asks google-cloud-storage
    yield bucket
  bucket.shutdown()
  bucket.server_close()
