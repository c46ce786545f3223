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
from jaxpref.objectives.diagnostics import diagnostics
from jaxpref.objectives.heads import joined, mean_over_heads
from jaxpref.objectives.loss import Loss, Metric, per_example, reduce_metrics
from jaxpref.objectives.registry import register, suggestion
from jaxpref.objectives.schedules import Schedule, is_one, levels, resolve, times
from jaxpref.objectives.signature import Signature
from jaxpref.typing import Array, Fields

Memory = dict[str, dict[str, Any]]  # part -> what it remembers -> a float32 scalar
Update = Callable[..., dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Builder:
  """What `@objective` makes of a loss: called with hyper-parameters it gives an `Objective`.

  `loss` is the bare function; `signature` says what it reads and which numbers it accepts; `memory`
  and `update` are those of `objective`.
  """

  loss: Callable[..., Loss]
  signature: Signature
  coupled: bool
  memory: Mapping[str, float]
  update: Update | None

  @property
  def fields(self) -> tuple[str, ...]:
    """The batch fields that the loss reads."""
    return tuple(name for name in self.signature.fields if name not in self.memory)

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
  memory: Mapping[str, float] | None = None,
  update: Update | None = None,
) -> Any:
  """Registers a loss and returns its `Builder`; used as `@objective` or `@objective(...)`.

  Args:
    loss: a function of batch fields (positional) and hyper-parameters (keyword-only).
    coupled: whether the loss mixes examples, or its weights or norm depend on model outputs; the
      step then takes it over the whole batch at once.
    ranges: hyper-parameter -> interval such as '(0, inf)', checked when an objective is built.
    memory: positional argument -> its first value, for a loss with running statistics. They reach
      the loss as scalars, without a gradient, and train steps carry and checkpoint them.
    update: `update(memory, metrics, numbers) -> memory` after a step; `metrics` are the loss's own,
      reduced over the global batch, and `numbers` its hyper-parameters.

  Raises:
    TypeError: the signature cannot be read, or memory and update do not belong together.
  """
  if loss is None:
    return lambda loss: objective(
      loss, coupled=coupled, ranges=ranges, memory=memory, update=update
    )
  memory, signature = dict(memory or {}), Signature.of(loss, ranges or {})
  if bool(memory) != bool(update) or not memory.keys() <= set(signature.fields):
    raise TypeError(
      f'{loss.__name__}: memory names positional arguments of the loss and comes with an update'
    )
  builder = Builder(loss, signature, coupled, memory, update)
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

  def loss(self, fields: Fields, step: Array | int, memory: Memory | None = None) -> Loss:
    """The loss of this part, unscaled; without `memory`, as at a run's beginning."""
    mask = fields['mask']
    remembered = (memory or {}).get(self.name, self.builder.memory)

    # What stands under a False mask may be anything; zeros keep NaN out of values and gradients.
    def argument(name: str) -> Array:
      if name in remembered:
        return jax.lax.stop_gradient(jnp.asarray(remembered[name], jnp.float32))
      array = jnp.asarray(fields[name])
      hidden = name != 'mask' and array.shape == mask.shape
      return jnp.where(mask, array, jnp.zeros_like(array)) if hidden else array

    arrays = map(argument, self.builder.signature.fields)
    loss = self.builder.loss(*arrays, **self.at(step), **dict(self.static))
    if loss.terms.shape != loss.weights.shape or loss.terms.shape[:1] != mask.shape[:1]:
      raise ValueError(
        f'{self.name}: terms and weights must share a shape that starts with B={mask.shape[0]}, '
        f'got {loss.terms.shape} and {loss.weights.shape}'
      )
    return loss

  def at(self, step: Array | int) -> dict[str, Any]:
    """The hyper-parameters that are numbers, as they are at a step."""
    return {key: resolve(value, step) for key, value in self.numbers.items()}

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
    return frozenset({'mask'}).union(*(part.builder.fields for part in self.parts))

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
    for level in levels(scale):
      scalars.check_finite(level, 'the scale of an objective')
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
      askers = ', '.join(part.name for part in self.parts if name in part.builder.fields)
      hint = suggestion(name, available)
      raise ValueError(
        f'nothing supplies the field {name!r}, which {askers or "every objective"} reads; {hint}'
      )

  def init(self) -> Memory:
    """What the parts remember at a run's beginning; empty for parts without memory."""
    return {
      part.name: {key: jnp.float32(value) for key, value in part.builder.memory.items()}
      for part in self.parts
      if part.builder.memory
    }

  def update(self, memory: Memory, metrics: Mapping[str, Array], step: Array | int = 0) -> Memory:
    """What they remember after a step with these metrics, reduced over the global batch."""
    new = {}
    for part in self.parts:
      if part.builder.update is not None:
        prefix = f'{part.name}/'  # metrics that several parts report are there under their names
        own = {key.removeprefix(prefix): metrics[key] for key in metrics if key.startswith(prefix)}
        found = part.builder.update(memory[part.name], {**metrics, **own}, part.at(step))
        new[part.name] = {key: jnp.asarray(value, jnp.float32) for key, value in found.items()}
    return new

  def norms(self, fields: Fields, step: Array | int = 0) -> tuple[Array, ...]:
    """One norm per part; norms of microbatches add up to the norm of the batch.

    Fields that are not passed are taken to be model outputs [B, K, T], on which no norm depends
    unless the objective is coupled.

    Raises:
      ValueError: the mask is missing or, for a coupled objective, any field.
    """
    self.require(fields if self.coupled else {*fields, *self.fields - {'mask'}})
    zeros = jnp.zeros(fields['mask'].shape, jnp.float32)
    filled = joined({name: fields.get(name, zeros) for name in self.fields})
    return tuple(part.loss(filled, step).norm for part in self.parts)

  def partial(
    self,
    fields: Fields,
    norms: tuple[Array, ...],
    step: Array | int = 0,
    memory: Memory | None = None,
  ) -> tuple[Array, dict[str, Metric]]:
    """This microbatch's share of the loss under the norms of the whole batch; shares add up.

    Where the fields hold `weight` [B], an example's share is multiplied by it; norms are not, so
    weights of mean 1 keep the loss's size.

    The metrics hold, beside those of the parts, `loss`: the share of every example [B], which
    reduces to the loss and whose largest or non-finite entries point at the worst examples. A sum
    has `loss/<name>` for each part, unscaled; a metric that several parts report is there as
    `<name>/<metric>` for each. Pairs bring what `diagnostics` finds, several heads what
    `mean_over_heads` does.

    Raises:
      ValueError: a field is missing.
    """
    self.require(fields)

    def share(fields: Fields) -> tuple[Array, dict[str, Metric]]:
      losses = [part.loss(fields, step, memory) for part in self.parts]
      return self._share(fields, losses, norms, step)

    return mean_over_heads(share, fields)

  def __call__(
    self, fields: Fields, step: Array | int = 0, memory: Memory | None = None
  ) -> tuple[Array, dict[str, Array]]:
    """The loss of a whole batch, a scalar, and its metrics, scalars."""
    self.require(fields)  # `norms` would take it for a model output
    loss, metrics = self.partial(fields, self.norms(fields, step), step, memory)
    return loss, reduce_metrics(metrics)

  def _share(self, fields, losses, norms, step):
    shares = [per_example(*each) for each in zip(losses, norms, strict=True)]
    if 'weight' in fields:
      shares = [share * fields['weight'] for share in shares]
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
    return jnp.sum(examples), metrics | diagnostics(fields, metrics)
