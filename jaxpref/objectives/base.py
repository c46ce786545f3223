"""The objective algebra: losses become objectives, objectives add and scale.

A loss is a function of batch fields (positional arguments, named as in the batch) and
hyper-parameters (keyword-only). `@objective` turns it into a builder: calling the builder with
hyper-parameters gives an `Objective`, a pytree whose leaves are the numbers, so that one compiled
step can be swept or `vmap`ped over them. Sums are exact under microbatching, because every part
says its `norm` apart from its terms, and norms add.
"""

import collections
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxpref import masked
from jaxpref.objectives import scalars
from jaxpref.objectives.loss import Loss, Metric, per_example, reduce_metrics
from jaxpref.objectives.registry import register, suggestion
from jaxpref.objectives.schedules import Schedule, is_one, resolve, times
from jaxpref.objectives.signature import Signature
from jaxpref.typing import Array, Fields


@dataclass(frozen=True, eq=False)
class Builder:
  """What `@objective` makes of a loss: called with hyper-parameters it gives an `Objective`.

  `loss` is the bare function; `signature` says what it reads and which numbers it accepts.
  """

  loss: Callable[..., Loss]
  signature: Signature
  coupled: bool

  @property
  def __name__(self) -> str:
    return self.loss.__name__

  def __call__(self, *, name: str | None = None, **given: Any) -> 'Objective':
    """The objective with these hyper-parameters; `name` tells equal losses in a sum apart.

    Raises:
      TypeError: an unknown or missing hyper-parameter, or one of the wrong kind.
      ValueError: a number out of range.
    """
    numbers, static = self.signature.bind(given)
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
      raise ValueError(f'{self.__name__}(name) must be an identifier, got {name!r}')
    return Objective((Part(1.0, numbers, static, self, name or self.__name__),))


def objective(
  loss: Callable[..., Loss] | None = None,
  *,
  coupled: bool = False,
  ranges: Mapping[str, str] | None = None,
) -> Any:
  """Registers a loss and returns its `Builder`; used as `@objective` or `@objective(...)`.

  Args:
    loss: a function of batch fields (positional) and hyper-parameters (keyword-only).
    coupled: whether the loss mixes examples, or its weights or norm depend on model outputs; the
      step then takes it over the whole batch at once.
    ranges: hyper-parameter -> interval such as '(0, inf)', checked when an objective is built.
  """
  if loss is None:
    return lambda loss: objective(loss, coupled=coupled, ranges=ranges)
  builder = Builder(loss, Signature.of(loss, ranges or {}), coupled)
  for key, value in (('__doc__', loss.__doc__), ('__module__', loss.__module__)):
    object.__setattr__(builder, key, value)
  return register(builder)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
  """One loss of a sum, with its hyper-parameters and its scale."""

  scale: Any  # a number or a schedule
  numbers: dict[str, Any]  # numbers, schedules or None
  static: tuple[tuple[str, Any], ...] = field(metadata={'static': True})
  builder: Builder = field(metadata={'static': True})
  name: str = field(metadata={'static': True})

  def loss(self, fields: Fields, step: Array | int) -> Loss:
    """The loss of this part, unscaled."""
    mask = fields['mask']

    # What stands under a False mask may be anything; zeros keep NaN out of values and gradients.
    def argument(name: str) -> Array:
      array = jnp.asarray(fields[name])
      hidden = name != 'mask' and array.shape == mask.shape
      return jnp.where(mask, array, jnp.zeros_like(array)) if hidden else array

    numbers = {key: resolve(value, step) for key, value in self.numbers.items()}
    arrays = map(argument, self.builder.signature.fields)
    loss = self.builder.loss(*arrays, **numbers, **dict(self.static))
    if loss.terms.shape != loss.weights.shape or loss.terms.shape[:1] != mask.shape[:1]:
      raise ValueError(
        f'{self.name}: terms and weights must share a shape that starts with B={mask.shape[0]}, '
        f'got {loss.terms.shape} and {loss.weights.shape}'
      )
    return loss

  def __str__(self) -> str:
    given = {key: _value_text(value) for key, value in self.numbers.items()}
    given |= {key: scalars.name(value) for key, value in self.static}
    if self.name != self.builder.__name__:
      given['name'] = repr(self.name)
    order = (key for key in (*self.builder.signature.defaults, 'name') if key in given)
    inside = ', '.join(f'{key}={given[key]}' for key in order)
    scale = '' if is_one(self.scale) else f'{_value_text(self.scale)}*'
    return f'{scale}{self.builder.__name__}({inside})'


def _value_text(value: Any) -> str:
  return str(value) if value is None or isinstance(value, Schedule) else scalars.text(value)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Objective:
  """A weighted sum of losses; a pytree, closed under `+` and `*` by numbers and schedules.

  `str(objective)` is the text that `parse` reads. Equal names in a sum are refused: metrics go by
  name, so give one part another by `name='...'`.
  """

  parts: tuple[Part, ...]

  __array_ufunc__ = None  # numpy scalars then leave `*` to us

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(part.name for part in self.parts)

  @property
  def fields(self) -> frozenset[str]:
    """The batch fields that the parts read; the mask always."""
    return frozenset({'mask'}).union(*(part.builder.signature.fields for part in self.parts))

  @property
  def coupled(self) -> bool:
    """Whether some part needs the fields of the whole batch at once."""
    return any(part.builder.coupled for part in self.parts)

  def __add__(self, other: 'Objective') -> 'Objective':
    if not isinstance(other, Objective):
      return NotImplemented
    for name in other.names:
      if name in self.names:
        raise ValueError(f"two parts are called {name!r}; tell them apart by name='...'")
    return Objective(self.parts + other.parts)

  def __mul__(self, scale: Any) -> 'Objective':
    if not (isinstance(scale, Schedule) or scalars.is_number(scale)):
      return NotImplemented
    return Objective(tuple(replace(part, scale=times(scale, part.scale)) for part in self.parts))

  __rmul__ = __mul__

  def __neg__(self) -> 'Objective':
    return -1.0 * self

  def __str__(self) -> str:
    return ' + '.join(map(str, self.parts))

  __repr__ = __str__

  def require(self, available: Collection[str]) -> None:
    """Raises ValueError, naming who asks, if a field is not among those that can be had."""
    for name in sorted(self.fields - set(available)):
      askers = ', '.join(part.name for part in self.parts if name in part.builder.signature.fields)
      hint = suggestion(name, available)
      raise ValueError(
        f'nothing supplies the field {name!r}, which {askers or "every objective"} reads; {hint}'
      )

  def norms(self, fields: Fields, step: Array | int = 0) -> tuple[Array, ...]:
    """One norm per part; norms of microbatches add up to the norm of the batch.

    Fields that are not passed are taken to be model outputs [B, K, T], on which no norm depends
    unless the objective is coupled.

    Raises:
      ValueError: the mask is missing or, for a coupled objective, any field.
    """
    self.require(fields if self.coupled else {*fields, *self.fields - {'mask'}})
    zeros = jnp.zeros(fields['mask'].shape, jnp.float32)
    filled = {name: fields.get(name, zeros) for name in self.fields}
    return tuple(part.loss(filled, step).norm for part in self.parts)

  def partial(
    self, fields: Fields, norms: tuple[Array, ...], step: Array | int = 0
  ) -> tuple[Array, dict[str, Metric]]:
    """This microbatch's share of the loss under the norms of the whole batch; shares add up.

    The metrics hold, beside those of the parts, `loss`: the share of every example [B], which
    reduces to the loss and whose largest or non-finite entries point at the worst examples. A sum
    has `loss/<name>` for each part, unscaled; a metric that several parts report is there as
    `<name>/<metric>` for each.

    Raises:
      ValueError: a field is missing.
    """
    self.require(fields)
    return self._share([part.loss(fields, step) for part in self.parts], norms, step)

  def __call__(self, fields: Fields, step: Array | int = 0) -> tuple[Array, dict[str, Array]]:
    """The loss of a whole batch, a scalar, and its metrics, scalars."""
    self.require(fields)
    losses = [part.loss(fields, step) for part in self.parts]
    loss, metrics = self._share(losses, tuple(loss.norm for loss in losses), step)
    return loss, reduce_metrics(metrics)

  def _share(self, losses, norms, step):
    shares = [per_example(*each) for each in zip(losses, norms, strict=True)]
    scaled = [resolve(part.scale, step) * s for part, s in zip(self.parts, shares, strict=True)]
    examples = sum(scaled[1:], scaled[0])
    every = jnp.ones_like(examples)
    metrics = {'loss': Metric(examples, every, masked.sum)}
    if len(self.parts) > 1:
      for name, share in zip(self.names, shares, strict=True):
        metrics[f'loss/{name}'] = Metric(share, every, masked.sum)
    uses = collections.Counter([*metrics, *(key for loss in losses for key in loss.metrics)])
    for name, loss in zip(self.names, losses, strict=True):
      for key, metric in loss.metrics.items():
        metrics[key if uses[key] == 1 else f'{name}/{key}'] = metric
    return jnp.sum(examples), metrics
