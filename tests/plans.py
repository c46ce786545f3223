"""What plans of tests are made of: a model and a batch small enough to compile in seconds."""

TINY = {
  'model': 'preset:tiny',
  'attention': 'blocked',
  'batch.size': 16,
  'batch.row_lengths': (96,),
}
LENGTHS = (32, 32, 32)
