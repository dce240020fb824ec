"""Find a network's weights in what other people's training codes save, whatever they nest and call them.

A *reading* says where in the file the weights stand and which prefix their names have. It fits if names and
shapes are exactly those of the network; a file is used if just one reading fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softdefend.core.errors import SettingError

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DataParallel (and DDP), torch.compile and FSDP put into the names of all weights that they wrap."""

_DEPTH = 6
"""Of nested mappings, and of the prefixes that are tried."""
_MOST_NAMED = 4
_EXTRA = "_extra_state"
_COUNTER = "num_batches_tracked"
"""Of batch normalization; no forward in eval mode uses it, and codes before torch 0.4.1 saved none."""
_MEAN_AND_STD = (("mean", "std"), ("mu", "sigma"), ("mean", "sigma"))
"""Endings of the names of an image normalization's buffers, such as ``normalizer.new_mean``."""
_STATISTICS = ("running_mean", "running_var", _COUNTER)


@dataclass(frozen=True)
class Reading:
    """One way to take a network's weights from a file.

    Attributes:
        keys: of the mapping in the file that holds them.
        prefix: of their names.
        beside: the mapping.
        state: values by the network's names.
        kept: names of the network that the file does not have and need not have.
        unwrapped: whether the names differ by :data:`WRAPPERS` inside.
        missing, unexpected, shapes: what does not fit.
    """

    keys: tuple[str, ...]
    prefix: str
    beside: Mapping[str, Any]
    state: dict[str, Any]
    kept: list[str]
    unwrapped: bool
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def fits(self) -> bool:
        """Whether names and shapes are the network's."""
        return not (self.missing or self.unexpected or self.shapes)

    @property
    def key(self) -> str:
        """Where the weights stand in the file, such as ``state_dict.model``; empty for the file itself."""
        return ".".join([*self.keys, *self.prefix.split(".")[:-1]])

    @property
    def left_out(self) -> list[str]:
        """Tensors beside the weights; of the file itself everything."""
        return [
            name
            for name, value in self.beside.items()
            if not name.startswith(self.prefix) or not (_is_weight(name, value) or self.keys)
        ]

    @property
    def notes(self) -> list[str]:
        """What it does, in words."""
        notes = [f"took {key!r} from the file" for key in self.keys]
        notes += [f"removed the prefix {part + '.'!r}" for part in self.prefix.split(".")[:-1]]
        if self.unwrapped:
            notes.append(f"matched names without {' and '.join(map(repr, WRAPPERS[:2]))} inside")
        if self.left_out:
            notes.append(f"left out {some(self.left_out)}")
        if self.kept:
            notes.append(f"kept the network's own {some(self.kept)}")
        return notes

    @property
    def problems(self) -> str:
        """What does not fit, in words."""
        found = (
            ("no ", self.missing),
            ("unexpected ", self.unexpected),
            ("other shapes: ", self.shapes),
        )
        return "; ".join(word + some(names) for word, names in found if names)


@dataclass(frozen=True)
class _Target:
    """The names that a file may give the network's weights, all with the same prefix left out."""

    names: dict[str, str]
    """The network's name by the file's."""
    constants: list[str]
    """Names of the network outside: buffers that its code sets."""


def find_weights(
    path: Path,
    content: Mapping[str, Any],
    net: nn.Module,
    key: str = "",
    names: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The network's state in what a file holds.

    Args:
        path: of the file, for messages.
        content: of the file, perhaps nested.
        net: whose names and shapes are wanted.
        key: the :attr:`Reading.key` of the reading to take, where several fit.
        names: what the file calls the network's tensors where their names differ, by the network's name.

    Returns:
        A full state of ``net``, and what was done to get it, in words.

    Raises:
        SettingError: no reading fits, or several that differ.
    """
    names = names or {}
    wanted = {names.get(name, name): value for name, value in net.state_dict().items()}
    parameters = {names.get(name, name) for name, _ in net.named_parameters(remove_duplicate=False)}
    readings = list(_readings(content, parameters, wanted))
    fitting = _distinct([one for one in readings if one.fits])
    if key:
        fitting = [one for one in fitting if one.key == key]
    if len(fitting) > 1:
        given = f"{len(fitting)} sets of weights that fit: {some([repr(one.key) for one in fitting])}"
        accepted = "a file with one of them (softdefend evaluate chooses by --weights_key)"
        raise SettingError(str(path), given, accepted)
    if not fitting:
        raise _refusal(path, readings, len(wanted), key)
    (reading,) = fitting
    _refuse_lost_normalization(path, reading, wanted)
    state = {**{name: wanted[name] for name in reading.kept}, **reading.state}
    own = {names.get(name, name): name for name in net.state_dict()}
    return {own[name]: value for name, value in state.items()}, reading.notes


def _refusal(path: Path, readings: list[Reading], count: int, key: str) -> SettingError:
    """Says what the best reading lacks."""
    if not readings:
        accepted = "tensors by name, alone or nested (such as under state_dict or model)"
        return SettingError(str(path), "a file without weights", accepted)
    if key:
        readings = [one for one in readings if one.key == key] or readings
    best = max(readings, key=lambda one: (len(one.state), -len(one.unexpected), -len(one.key)))
    where = f" (under {best.key!r})" if best.key else ""
    given = f"weights that do not fit{where}: {best.problems}"
    if not best.problems:
        given = f"no weights under {key!r}"
    return SettingError(str(path), given, f"the network's {count} weights by name")


def _refuse_lost_normalization(path: Path, reading: Reading, wanted: Mapping[str, Any]) -> None:
    """Weights that were trained behind a normalization are others without it, and behind another one."""
    own = list(_normalizations(reading.kept))
    for mean, std in _normalizations(reading.left_out):
        given = [reading.beside[mean], reading.beside[std]]
        if not any(_same_numbers(given, [wanted[name] for name in pair]) for pair in own):
            lacking = f"where the network has {' and '.join(own[0])}" if own else "which the network lacks"
            raise SettingError(
                str(path),
                f"weights trained behind {mean} and {std}, {lacking}",
                "a network that normalizes its input so: softdefend.normalize(net, mean, std)",
            )


def _normalizations(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that say by which mean and standard deviation images are normalized."""
    for name in names:
        for mean, std in _MEAN_AND_STD:
            other = name.removesuffix(mean) + std
            if name.endswith(mean) and other in names:
                yield name, other


def _same_numbers(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether tensors hold the same numbers up to float32's rounding, in whatever shape."""
    if not all(isinstance(value, Tensor) for value in [*one, *other]):
        return False
    here, there = (torch.cat([value.flatten().double() for value in values]) for values in (one, other))
    return here.shape == there.shape and torch.allclose(here, there, rtol=1e-5, atol=1e-6)


def _readings(
    content: Mapping[str, Any], parameters: set[str], wanted: Mapping[str, Any]
) -> Iterator[Reading]:
    targets = list(_targets(parameters, wanted))
    for keys, mapping in mappings(content):
        for prefix, names in _groups([n for n, v in mapping.items() if _is_weight(n, v)]).items():
            under = {name.removeprefix(prefix): mapping[name] for name in names}
            bare = _unwrap(under)
            for target in targets:
                yield _read(keys, prefix, mapping, under, target, wanted)
                ours = _unwrap(target.names)
                if bare and ours and (bare.keys() != under.keys() or ours.keys() != target.names.keys()):
                    unwrapped = _Target(ours, target.constants)
                    yield _read(keys, prefix, mapping, bare, unwrapped, wanted, unwrapped=True)


def _read(
    keys: tuple[str, ...],
    prefix: str,
    beside: Mapping[str, Any],
    values: Mapping[str, Any],
    target: _Target,
    wanted: Mapping[str, Any],
    *,
    unwrapped: bool = False,
) -> Reading:
    state = {ours: values[name] for name, ours in target.names.items() if name in values}
    absent = [ours for name, ours in target.names.items() if name not in values]
    counters = [name for name in absent if name.endswith(_COUNTER)]
    return Reading(
        keys,
        prefix,
        beside,
        state,
        kept=target.constants + counters,
        unwrapped=unwrapped,
        missing=[name for name in absent if not name.endswith(_COUNTER)],
        unexpected=[prefix + name for name in values if name not in target.names],
        shapes=[
            f"{name} {_form(value)} for {_form(wanted[name])}"
            for name, value in state.items()
            if _form(value) != _form(wanted[name])
        ],
    )


def _form(value: Any) -> Any:
    """What a value must share with the one whose place it takes: numbers of any precision do."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    usual = value.layout is torch.strided and not value.is_meta and not value.is_quantized
    kind = "" if usual and not value.is_complex() else f" {value.dtype} {value.layout} {value.device}"
    return f"{list(value.shape)}{kind}"


def mappings(content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """All mappings by name, from what a file holds inwards, each once, to a bounded depth; their keys."""
    seen = {id(content)}
    level: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), content)]
    for _ in range(_DEPTH):
        inner: list[tuple[tuple[str, ...], Mapping[str, Any]]] = []
        for keys, mapping in level:
            yield keys, mapping
            for key, value in mapping.items():
                if isinstance(value, Mapping) and id(value) not in seen and _by_name(value):
                    seen.add(id(value))
                    inner.append(((*keys, key), value))
        level = inner


def _is_weight(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or name.endswith(_EXTRA)


def _by_name(mapping: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) for key in mapping)


def _groups(names: Sequence[str]) -> dict[str, list[str]]:
    """The names that begin with each prefix; with the empty one all."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[""].append(name)
        end = -1
        for _ in range(_DEPTH):
            end = name.find(".", end + 1)
            if end < 0:
                break
            groups[name[: end + 1]].append(name)
    return groups


def _targets(parameters: set[str], wanted: Mapping[str, Any]) -> Iterator[_Target]:
    """The network's own names; and those without a prefix outside of which nothing was trained."""
    trained = [name for name in wanted if name in parameters or name.endswith((*_STATISTICS, _EXTRA))]
    yield _Target({name: name for name in wanted}, [])
    for prefix in list(_groups(trained[:1]))[1:]:
        if all(name.startswith(prefix) for name in trained):
            names = {name.removeprefix(prefix): name for name in wanted if name.startswith(prefix)}
            yield _Target(names, [name for name in wanted if not name.startswith(prefix)])


def _unwrap(names: Mapping[str, Any]) -> dict[str, Any] | None:
    """By names without :data:`WRAPPERS`; None where two become the same."""
    bare = {".".join(p for p in name.split(".") if p not in WRAPPERS): v for name, v in names.items()}
    return bare if len(bare) == len(names) else None


def _distinct(readings: list[Reading]) -> list[Reading]:
    """Those that take something else from the file than all others; of equal ones the plainest."""
    found: list[Reading] = []
    for one in sorted(readings, key=lambda r: (-len(r.state), r.unwrapped, len(r.notes))):
        if len(found) < _DEPTH and not any(_within(one, other) for other in found):
            found.append(one)
    return found


def _within(one: Reading, other: Reading) -> bool:
    """Whether another reading takes the same values, and perhaps more."""
    return all(name in other.state and _equal(value, other.state[name]) for name, value in one.state.items())


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return False


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
