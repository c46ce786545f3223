"""What tests of the train step share: the meshes of eight devices, and an optimizer's numbers."""

import numpy as np

MESHES = {
  '8x1x1x1': (8, 1, 1, 1),
  '1x8x1x1': (1, 8, 1, 1),
  '2x2x1x2': (2, 2, 1, 2),
  '1x4x1x2': (1, 4, 1, 2),
  '2x1x4x1': (2, 1, 4, 1),
}


def scalars(learning_rate, **changes):
  """Of plain gradient descent under SGD, unless `changes` say otherwise."""
  plain = {'weight_decay': 0.0, 'b1': 0.0, 'b2': 0.95, 'eps': 1e-8, 'clip': np.inf}
  return {'learning_rate': learning_rate} | plain | changes
