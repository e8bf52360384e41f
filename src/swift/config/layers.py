"""Layers of values (files, Python, flags) laid over one another, each value parsed and with its source."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from swift.config import rules
from swift.config.aliases import Unsupported, alias_table
from swift.config.commands import COMMANDS, TRAIN_TYPES, Command
from swift.config.flags import Flag
from swift.config.kinds import coerce, is_none_word, parse_bool
from swift.config.names import Name, Names, UnknownOptionError, unknown_options
from swift.config.read import Written
from swift.config.schema import SECTIONS, Config, Resolved, Source, options
from swift.core.errors import ConfigError

__all__ = ["Binder", "Layer"]


_RAY_GROUPS = ("train", "rollout", "teacher")
"""Mappings of ms-swift's Ray files: one per role, with the number of its devices (``gpus``) and its options."""

_RAY_KEYS = ("gpus", "nnodes")


@dataclass
class _Entry:
    """A value on its way: parsed, with its source and the key as the user spelled it."""

    value: Any
    source: Source
    key: str
    where: str


@dataclass
class Layer:
    """One file, the Python values, or all flags."""

    kind: str
    entries: dict[str, _Entry] = field(default_factory=dict)
    explicit: frozenset[str] | None = None


@dataclass(frozen=True)
class _Refused:
    """What a run refuses and a plan only names."""

    where: str
    say: str
    fix: str | None
    prefix: str = "not in this version: "


class Binder:
    """Collects the layers of one resolution."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.names = Names(command)
        self.options = self.names.options
        self.layers: list[Layer] = []
        self.fallbacks: dict[str, _Entry] = {}
        self.planned: dict[str, _Entry] = {}
        self.refused: list[_Refused] = []
        self.unknown: list[UnknownOptionError] = []
        self.needs: list[tuple[str, str, str, list[str]]] = []
        self.unneeded: dict[str, list[str]] = {}
        self.warnings: list[str] = []
        self.switches: dict[str, bool] = {}
        self.environment: dict[str, str] = {}

    def new_layer(self, kind: str) -> Layer:
        """Start a layer (``file``, ``python`` or ``flag``) that wins over the earlier ones."""
        layer = Layer(kind)
        self.layers.append(layer)
        return layer

    def arity(self, spelling: str, key: str) -> str:
        """What may follow a flag, for `read_flags`. An unknown flag takes all words; `finish` tells of it."""
        try:
            return self.names.arity(spelling, key)
        except UnknownOptionError as error:
            self._remember(error)
            return "any"

    def _remember(self, error: UnknownOptionError) -> None:
        if all(error.where != other.where for other in self.unknown):
            self.unknown.append(error)

    # Values

    def take_mapping(self, layer: Layer, mapping: Written) -> None:
        """Everything in a file or a Python dict."""
        items = dict(mapping.items or {})
        explicit = items.pop("explicit", None)
        if explicit is not None:
            if not isinstance(explicit.value, list):
                raise ConfigError("needs a list of option names", where=self._where(explicit, "explicit"))
            layer.explicit = frozenset(map(str, explicit.value))
        for key, written in items.items():
            section = alias_table().sections.get(key, key)
            if key == "command":
                self._take_command(written)
            elif key == "ENV":
                self._take_environment(written)
            elif written.items is not None and key in _RAY_GROUPS and "gpus" in written.items:
                self._take_ray_group(layer, key, written.items, self._where(written, key))
            elif written.items is not None and section in SECTIONS:
                for inner, value in written.items.items():
                    self._take_written(layer, section, inner, value)
            else:
                self._take_written(layer, None, key, written)

    def _take_ray_group(self, layer: Layer, key: str, items: dict[str, Written], where: str) -> None:
        """The options of one role of ms-swift's Ray files: those of training count, the others must be known."""
        ray = alias_table().unsupported["use_ray"]
        self.refused.append(_Refused(where, ray.say, ray.fix))
        for inner, written in items.items():
            if inner in _RAY_KEYS:
                continue
            if key == "train":
                self._take_written(layer, None, inner, written)
                continue
            try:
                self.names.find(None, inner, self._where(written, f"{key}.{inner}"))
            except UnknownOptionError as error:
                self._remember(error)

    @staticmethod
    def _where(written: Written, key: str) -> str:
        return f"{written.place}: {key}" if written.place else key

    def _take_written(self, layer: Layer, section: str | None, key: str, written: Written) -> None:
        where = self._where(written, f"{section}.{key}" if section else key)
        source = Source("file", written.place) if layer.kind == "file" else Source("python", "python")
        try:
            name = self.names.find(section, key, where, is_mapping=written.items is not None)
        except UnknownOptionError as error:
            self._remember(error)
            return
        self._take(layer, name, key, written.value, written.text, where, source)

    def take_flag(self, layer: Layer, flag: Flag) -> None:
        """One flag with its words."""
        source = Source("flag", flag.spelling)
        try:
            name = self.names.find(None, flag.key, flag.spelling, "--")
        except UnknownOptionError as error:
            self._remember(error)
            return
        value: Any = flag.words
        if value is None:
            value = True
        elif len(value) == 1 and not (name.option and name.option.kind.base == "list"):
            value = value[0]
        self._take(layer, name, flag.key, value, value, flag.spelling, source)

    def _take(
        self, layer: Layer, name: Name, key: str, value: Any, text: Any, where: str, source: Source
    ) -> None:
        if name.negated:
            flag = self._bool(value, where)
            value = text = not flag
        if name.switch:
            self.switches[name.switch] = self._bool(value, where)
        elif name.known:
            self._take_known(name.known, value, text, key, where, source)
        elif name.option:
            self._assign(layer, name.option.name, value, text, key, where, source)
        elif name.alias and name.alias.choices is not None:
            for target, chosen in name.alias.choices[self._bool(value, where)].items():
                self._assign(layer, target, chosen, chosen, key, where, source)
        elif name.alias and name.alias.transform == "fallback":
            entry = self._parse(self.names.target(name.alias, where), value, text, key, where, source)
            if entry:
                self.fallbacks[self.names.target(name.alias, where)] = entry
        elif name.alias:
            self._assign(layer, self.names.target(name.alias, where), value, text, key, where, source)

    @staticmethod
    def _bool(value: Any, where: str) -> bool:
        flag = parse_bool(value)
        if flag is None:
            raise ConfigError(f"{value!r} is not true or false", where=where)
        return flag

    def _take_known(
        self, known: Unsupported, value: Any, text: Any, key: str, where: str, source: Source
    ) -> None:
        if known.fix is None:
            self.unneeded.setdefault(known.say, []).append(where)
        elif not known.is_off(text):
            self.refused.append(_Refused(where, known.say, known.fix))
            entry = self._parse(known.plan_as, value, text, key, where, source) if known.plan_as else None
            if entry is not None and known.plan_as is not None:
                self.planned[known.plan_as] = entry

    def _parse(self, name: str, value: Any, text: Any, key: str, where: str, source: Source) -> _Entry | None:
        """The value as the option's type; None when this version cannot do it (remembered for the end)."""
        option = self.options.get(name)
        if option is None:
            if self.command.instead is not None:
                self.warnings.append(f"{where}: a plan of swift {self.command.name} does not use it yet")
                return None
            users = [command.name for command in COMMANDS.values() if name in command.options()]
            error = self.names.not_used(name, where, users)
            self.refused.append(_Refused(where, error.message, error.fix, prefix=""))
            return None
        raw = _without_paths(text if option.kind.is_textual else value)
        # Where none is one of the values (scale_rewards none), it does not mean the default.
        is_value = (
            option.kind.base == "choice" and isinstance(raw, str) and raw.lower() in option.kind.choices
        )
        may_be_nothing = option.kind.optional or option.kind.base == "choice"
        if may_be_nothing and is_none_word(raw) and not is_value:
            return _Entry(None, source, key, where)
        raw = self._translate(name, raw, where)
        if raw is _REFUSED:
            return None
        return _Entry(coerce(option.kind, option.info, raw, where), source, key, where)

    def _translate(self, name: str, raw: Any, where: str) -> Any:
        """Other words for values, and known words this version cannot do."""
        words = alias_table().values.get(name, {})
        if isinstance(raw, list | tuple):
            taken = [item for item in raw if not self._is_refused(name, item, where)]
            if raw and not taken:
                return _REFUSED
            return [words.get(item, item) if isinstance(item, str) else item for item in taken]
        if isinstance(raw, bool):
            return words.get(str(raw).lower(), raw)  # scale_rewards: false
        if not isinstance(raw, str):
            return raw
        if name == "tuner_type" and TRAIN_TYPES.get(raw.lower()) == self.command.name:
            return _REFUSED  # it repeats what the command says
        if self._is_refused(name, raw, where):
            return _REFUSED
        needed = alias_table().value_needs.get((name, raw))
        if needed:
            self.needs.append((name, where, raw, needed))
        return words.get(raw, words.get(raw.lower(), raw))

    def _is_refused(self, name: str, word: Any, where: str) -> bool:
        """Remember a known value that this version cannot do. ``last_round+hermes`` is several of one option."""
        if not isinstance(word, str):
            return False
        for part in word.split("+"):
            refused = alias_table().unsupported_values.get((name, part.lower()))
            if refused and self.command.name not in refused.able:
                self.refused.append(_Refused(where, f"{word}: {refused.say}", refused.fix))
                return True
        return False

    def _assign(
        self, layer: Layer, name: str, value: Any, text: Any, key: str, where: str, source: Source
    ) -> None:
        if name == "tuner_type" and self.command.name == "rlhf" and _names_method(value):
            name = "rlhf_type"  # train_type: dpo
        entry = self._parse(name, value, text, key, where, source)
        if entry is None:
            return
        before = layer.entries.get(name)
        # A flag may be repeated (scripts append "$@"); in a file a second mention is a mistake.
        repeated = (
            layer.kind == "flag"
            and before is not None
            and before.key.replace("-", "_") == key.replace("-", "_")
        )
        repeated = repeated or (before is not None and _is_cached(before.key) != _is_cached(key))
        if before is not None and not repeated:
            if before.value != entry.value:
                raise ConfigError(
                    f"contradicts {before.where}",
                    where=where,
                    why=f"both set {name}: {entry.value} and {before.value}",
                )
        elif before is not None and before.value is not None and isinstance(entry.value, list):
            # --dataset a --dataset b is the same as --dataset a b.
            entry.value = before.value + entry.value
        if layer.explicit is not None and name not in layer.explicit:
            entry.source = Source("recorded", source.detail)
        layer.entries[name] = entry

    def _take_command(self, written: Written) -> None:
        if written.value != self.command.name:
            fix = f"use swift {written.value}" if written.value in COMMANDS else "remove the line"
            raise ConfigError(
                f"this file is for swift {written.value}", where=self._where(written, "command"), fix=fix
            )

    def _take_environment(self, written: Written) -> None:
        if written.items is None:
            raise ConfigError("needs a mapping of variables", where=self._where(written, "ENV"))
        for name, entry in written.items.items():
            if entry.items is not None or isinstance(entry.value, list):
                raise ConfigError("needs one value", where=self._where(entry, f"ENV.{name}"))
            wanted = "" if entry.text is None else str(entry.text)
            current = os.environ.setdefault(name, wanted)
            if current != wanted:
                self.warnings.append(
                    f"{self._where(entry, f'ENV.{name}')}: the environment's own value {current!r} is kept"
                )
            self.environment[name] = current

    # The end

    def refuse_unknown(self) -> None:
        """Raise ConfigError when there were unknown keys; it names them all."""
        if self.unknown:
            raise unknown_options(self.unknown)

    def finish(self, files: list[str], planning: bool, partial: bool, recorded: bool = False) -> Resolved:
        """Lay the layers over one another, derive what nobody set, check what belongs together."""
        self.refuse_unknown()
        switches = frozenset(name for name, on in self.switches.items() if on)
        planning = planning or "dry_run" in switches
        if self.command.instead is not None:
            self.warnings.append(
                f"swift {self.command.name} comes with a later version; {self.command.instead}"
            )
        if self.refused and not planning:
            refused = self.refused[0]
            raise ConfigError(f"{refused.prefix}{refused.say}", where=refused.where, fix=refused.fix)
        for prefix, say in dict.fromkeys((refused.prefix, refused.say) for refused in self.refused):
            where = ", ".join(dict.fromkeys(refused.where for refused in self.refused if refused.say == say))
            verb = "refuses it" if ", " not in where else "refuses them"
            self.warnings.append(f"{where}: {prefix}{say}; a run {verb}")
        for say, places in self.unneeded.items():
            self.warnings.append(f"{', '.join(places)}: not needed: {say}")
        if "json" in switches and not planning:
            raise ConfigError("prints a plan, so it needs --dry_run", where="--json", fix="add --dry_run")
        merged: dict[str, _Entry] = dict(self.planned)
        for layer in self.layers:
            merged.update(layer.entries)
        for name, entry in self.fallbacks.items():
            if name in merged and merged[name].value != entry.value:
                self.warnings.append(f"{entry.where}: not needed: {name} says which model")
            else:
                merged[name] = entry
        for name, where, raw, needed in self.needs:
            if not merged.keys() & set(needed) and merged[name].where == where:
                self.warnings.append(
                    f"{where}: {raw} is {merged[name].value} with a --{needed[0]}, which is not given"
                )
        # An explicit none is "as if not given": the default or the derived value applies.
        merged = {name: entry for name, entry in merged.items() if entry.value is not None}
        nested: dict[str, dict[str, Any]] = {}
        for name, entry in merged.items():
            nested.setdefault(options()[name].section, {})[name] = entry.value
        sources = {
            name: merged[name].source if name in merged else Source("default", "default")
            for name in options()
        }
        resolved = Resolved(
            self.command.name,
            Config.model_validate(nested),
            sources,
            self.warnings,
            switches,
            self.environment,
            list(files),
            planning,
        )
        rules.apply(resolved, self.command, partial=partial, recorded=recorded)
        return resolved


_REFUSED: Any = object()
"""Stands for a value that is not taken."""


def _names_method(value: Any) -> bool:
    word = value.lower() if isinstance(value, str) else ""
    return word != "rlhf" and TRAIN_TYPES.get(word) == "rlhf"


def _is_cached(key: str) -> bool:
    """ms-swift trains on ``cached_dataset`` and ``dataset`` together; so for ``cached_val_dataset``."""
    return key.replace("-", "_").rpartition(".")[2] in ("cached_dataset", "cached_val_dataset")


def _without_paths(raw: Any) -> Any:
    """pathlib paths (from Python) as texts."""
    if isinstance(raw, list | tuple):
        return [_without_paths(item) for item in raw]
    return os.fspath(raw) if isinstance(raw, os.PathLike) else raw
