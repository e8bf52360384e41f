"""Completion scripts for shells: static text from the tables, so that pressing Tab starts no Python."""

from __future__ import annotations

from collections.abc import Callable

from swift.config.commands import COMMANDS, Command

__all__ = ["SHELLS", "completion_script"]

_SUBCOMMANDS = {
    "data": ("show", "check"),
    "config": ("show", "alias", "schema", "reference", "completion"),
    "plan": tuple(name for name, command in COMMANDS.items() if not command.own_arguments),
}


def completion_script(shell: str) -> str:
    """The script for ``bash``, ``zsh`` or ``fish``; KeyError for others."""
    return SHELLS[shell]()


def _flags(command: Command) -> list[str]:
    return [f"--{name}" for name in (*command.options(), *command.switches)] + ["--help"]


def _choices(command: Command) -> dict[str, tuple[str, ...]]:
    """Flag -> the words it can take, for options with a fixed set."""
    table: dict[str, tuple[str, ...]] = {}
    for name, option in command.options().items():
        kind = option.kind.item or option.kind
        if kind.base == "choice":
            table[f"--{name}"] = kind.choices
        elif kind.base == "bool":
            table[f"--{name}"] = ("true", "false")
    return table


def _all_choices() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for command in COMMANDS.values():
        table |= _choices(command)
    return table


def _bash() -> str:
    lines = [
        '# swift completion for bash. Use it: eval "$(swift config completion bash)"',
        "_swift() {",
        '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    words="{" ".join(COMMANDS)} --help --version"',
        '    COMPREPLY=($(compgen -W "$words" -- "$current") $(compgen -f -X "!*.yaml" -- "$current"))',
        "    return",
        "  fi",
        '  case "$previous" in',
    ]
    for flag, choices in _all_choices().items():
        lines.append(f'    {flag}) COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$current")); return;;')
    lines += ["  esac", '  case "${COMP_WORDS[1]}" in']
    for name, command in COMMANDS.items():
        words = [*_SUBCOMMANDS.get(name, ()), *_flags(command)]
        lines.append(f'    {name}) words="{" ".join(words)}";;')
    lines += [
        "  esac",
        '  if [[ "$current" == -* || "$COMP_CWORD" -eq 2 ]]; then',
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "  fi",
        '  COMPREPLY+=($(compgen -f -- "$current"))',
        "}",
        "complete -o filenames -F _swift swift",
    ]
    return "\n".join(lines) + "\n"


def _zsh() -> str:
    lines = [
        "#compdef swift",
        "# swift completion for zsh. Use it: swift config completion zsh > a folder of $fpath, named _swift",
        "_swift() {",
        "  local -a words_here",
        "  if (( CURRENT == 2 )); then",
        "    words_here=(",
        *(f"      {_quoted(f'{name}:{command.help}')}" for name, command in COMMANDS.items()),
        "    )",
        "    _describe command words_here",
        "    _files -g '*.(yaml|yml|json)'",
        "    return",
        "  fi",
        '  case "${words[CURRENT-1]}" in',
    ]
    for flag, choices in _all_choices().items():
        lines.append(f"    {flag}) compadd -- {' '.join(choices)}; return;;")
    lines += ["  esac", '  case "${words[2]}" in']
    for name, command in COMMANDS.items():
        lines.append(
            f"    {name}) words_here=({' '.join([*_SUBCOMMANDS.get(name, ()), *_flags(command)])});;"
        )
    lines += ["  esac", "  compadd -- $words_here", "  _files", "}", '_swift "$@"']
    return "\n".join(lines) + "\n"


def _fish() -> str:
    lines = ["# swift completion for fish. Use it: swift config completion fish | source"]
    first = "__fish_use_subcommand"
    for name, command in COMMANDS.items():
        lines.append(f"complete -c swift -n {first} -f -a {name} -d {_quoted(command.help)}")
    for name, command in COMMANDS.items():
        seen = f"-n {_quoted(f'__fish_seen_subcommand_from {name}')}"
        for word in _SUBCOMMANDS.get(name, ()):
            lines.append(f"complete -c swift {seen} -a {word}")
        choices = _choices(command)
        for option_name, option in command.options().items():
            words = choices.get(f"--{option_name}")
            values = f" -x -a {_quoted(' '.join(words))}" if words else " -r"
            lines.append(f"complete -c swift {seen} -l {option_name}{values} -d {_quoted(option.help)}")
        for switch, text in command.switches.items():
            lines.append(f"complete -c swift {seen} -l {switch} -d {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


SHELLS: dict[str, Callable[[], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
