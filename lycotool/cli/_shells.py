"""The scripts themselves, one function per shell; see :mod:`lycotool.cli._completion`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lycotool.cli._describe import CommandLine, Kind, Parameter

#: Endings of the files a value of a kind may be; folders always count.
ENDINGS: Mapping[Kind, tuple[str, ...]] = {
    "model": (".safetensors", ".safetensors.index.json"),
    "config": (".toml", ".json", ".jsonl", ".txt"),
    "folder": (),
}

#: Options of `lycotool` itself.
ROOT: Mapping[str, str] = {
    "--version": "Show the version and exit",
    "--install-completion": "Install completion for the current shell",
    "--show-completion": "Print the completion script of the current shell",
    "--shell": "The shell that --install-completion and --show-completion are for",
    "--help": "Show help and exit",
}

HEADER = "# Completion for lycotool, made by `lycotool --show-completion --shell {}`. Do not edit."


def _short(text: str) -> str:
    """The first sentence of a help text, without what shells would read as code."""
    sentence = text.split(". ")[0].split("; ")[0].split(": ")[0].rstrip(".")
    plain = "".join(c for c in sentence if c not in '`"\\$')
    return plain if len(plain) <= 72 else plain[:71].rsplit(" ", 1)[0] + " …"


def _quoted(text: str, apostrophe: str) -> str:
    """The first sentence of a help text for a string in single quotes, where an apostrophe is written so."""
    return _short(text).replace("'", apostrophe)


def _flags(option: Parameter) -> tuple[str, ...]:
    return (*option.flags, *option.negative)


# bash ------------------------------------------------------------------------------------------


def bash(commands: Sequence[CommandLine]) -> str:
    """The script for bash."""
    values: list[str] = []
    options: list[str] = []
    positional: list[str] = []
    for command in commands:
        flags = [flag for option in command.options for flag in _flags(option)]
        options.append(f'    {command.name}) options="{" ".join((*flags, "--help"))}" ;;')
        positional += [f"    {command.name}) _lycotool_files {_pattern(command.arguments)} ;;"]
        groups: dict[str, list[str]] = {}
        for option in command.options:
            if not option.is_flag:
                action = _bash_action(option)
                groups.setdefault(action, []).extend(f"{command.name}:{flag}" for flag in option.flags)
        values += [f"    {'|'.join(names)}) {action}; return ;;" for action, names in groups.items()]
    values.append("    *:--shell) _lycotool_words bash zsh fish powershell; return ;;")
    line = "\n"
    return f"""{HEADER.format("bash")}

_lycotool_words() {{
  COMPREPLY=($(compgen -W "$*" -- "$cur"))
}}

# Folders, and files whose names match the pattern in $1.
_lycotool_files() {{
  local IFS=$'\\n' name word=${{cur//\\\\/}}
  word=${{word#[\\"\\']}}
  compopt -o filenames 2>/dev/null
  for name in $(compgen -d -- "$word") $([[ -n $1 ]] && compgen -f -- "$word"); do
    [[ -d ${{name/#\\~/$HOME}} || $name == $1 ]] && COMPREPLY+=("$name")
  done
  # Each folder was named twice.
  [[ ${{#COMPREPLY[@]}} -gt 0 ]] && COMPREPLY=($(printf '%s\\n' "${{COMPREPLY[@]}}" | sort -u))
}}

_lycotool() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command= options= i
  COMPREPLY=()
  # `--method=ties` arrives as three words.
  if [[ $cur == = ]]; then cur=
  elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD-2]}}
  elif [[ $prev == : ]]; then return
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in
      {"|".join(c.name for c in commands)}) command=${{COMP_WORDS[i]}}; break ;;
    esac
  done
  case $command:$prev in
{line.join(values)}
  esac
  case $command in
    "") if [[ $cur == -* ]]; then options="{" ".join(ROOT)}"
        else options="{" ".join(c.name for c in commands)}"; fi
        _lycotool_words "$options"; return ;;
{line.join(options)}
  esac
  if [[ $cur == -?* ]]; then _lycotool_words "$options"; return; fi
  case $command in
{line.join(positional)}
  esac
}}

complete -F _lycotool lycotool
"""


def _pattern(arguments: Sequence[Parameter]) -> str:
    endings = dict.fromkeys(ending for a in arguments for ending in ENDINGS.get(a.kind, ()))
    return f"'*@({'|'.join(endings)})'"


def _bash_action(option: Parameter) -> str:
    if option.kind == "none":
        return f"_lycotool_words {' '.join(option.words)}" if option.words else ":"
    files = {"any": "'*'", "folder": "''"}.get(option.kind) or _pattern([option])
    words = f"_lycotool_words {' '.join(option.words)}; " if option.words else ""
    return f"{words}_lycotool_files {files}"


# zsh -------------------------------------------------------------------------------------------


def zsh(commands: Sequence[CommandLine]) -> str:
    """The script for zsh."""
    names = "\n".join(f"    '{c.name}:{_zsh_text(c.summary)}'" for c in commands)
    root = " \\\n    ".join(
        f"'{flag}[{_zsh_text(text)}]{':shell:(bash zsh fish powershell)' if flag == '--shell' else ''}'"
        for flag, text in ROOT.items()
    )
    cases = "\n".join(_zsh_command(c) for c in commands)
    return f"""#compdef lycotool
{HEADER.format("zsh")}

# Folders, and files whose names match the pattern in $1.
_lycotool_files() {{
  _alternative "files:file:_path_files -g '$1'" 'folders:folder:_path_files -/'
}}

_lycotool_any() {{
  _alternative "words:value:($2)" "files:file:_lycotool_files '$1'"
}}

_lycotool_commands() {{
  local -a commands=(
{names}
  )
  _describe command commands
}}

_lycotool() {{
  local context state state_descr line
  typeset -A opt_args
  _arguments -C \\
    {root} \\
    '1:command:_lycotool_commands' \\
    '*::argument:->arguments'
  [[ $state == arguments ]] || return
  case $words[1] in
{cases}
  esac
}}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _lycotool "$@"; else compdef _lycotool lycotool; fi
"""


def _zsh_command(command: CommandLine) -> str:
    specs: list[str] = ["'(- *)'{-h,--help}'[Show help and exit]'"]
    for option in command.options:
        many = "*" if option.several else ""
        names = _flags(option)
        together = f"({' '.join(names)})" if len(names) > 1 and not option.several else ""
        value = "" if option.is_flag else f":{_zsh_text(option.metavar)}:{_zsh_action(option)}"
        # Without `=` after the name: zsh would insert it, and not expand `~` behind it.
        specs += [f"'{together}{many}{name}[{_zsh_text(option.help)}]{value}'" for name in names]
    for argument in command.arguments:
        specs.append(f"'{'*' if argument.several else ''}:{argument.name}:{_zsh_action(argument)}'")
    joined = " \\\n        ".join(specs)
    return f"    {command.name})\n      _arguments -s \\\n        {joined} ;;"


def _zsh_text(text: str) -> str:
    return "".join("\\" + c if c in "[]:" else c for c in _short(text)).replace("'", "'\\''")


def _zsh_action(option: Parameter) -> str:
    if option.kind == "none":
        return f"({' '.join(option.words)})" if option.words else " "
    if option.kind == "any":
        return "_files"
    if option.kind == "folder":
        return "_path_files -/"
    # The space keeps _arguments from putting its own options before these arguments.
    pattern = f"*.({'|'.join(e.removeprefix('.') for e in ENDINGS[option.kind])})"
    if option.words:
        return f' _lycotool_any "{pattern}" "{" ".join(option.words)}"'
    return f' _lycotool_files "{pattern}"'


# fish ------------------------------------------------------------------------------------------


def fish(commands: Sequence[CommandLine]) -> str:
    """The script for fish."""
    lines = [
        HEADER.format("fish"),
        "",
        "function __lycotool_files --description 'Folders, and files with one of the endings'",
        "    set -l ending (string join '|' -- (string escape --style=regex -- $argv) /)",
        '    __fish_complete_path (commandline -ct) | string match -r "^.*(?:$ending)(?:\\t.*)?\\$"',
        "end",
        "",
        "complete -c lycotool -f",
    ]
    top = "-n __fish_use_subcommand"
    for flag, text in ROOT.items():
        value = " -x -a 'bash zsh fish powershell'" if flag == "--shell" else ""
        lines.append(f"complete -c lycotool {top} -l {flag[2:]} -d {_fish_text(text)}{value}")
    lines += [f"complete -c lycotool {top} -a {c.name} -d {_fish_text(c.summary)}" for c in commands]
    for command in commands:
        here = f"-n '__fish_seen_subcommand_from {command.name}'"
        lines += ["", f"complete -c lycotool {here} -s h -l help -d 'Show help and exit'"]
        for option in command.options:
            names = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in _flags(option))
            lines.append(
                f"complete -c lycotool {here} {names} -d {_fish_text(option.help)}{_fish_value(option)}"
            )
        endings = dict.fromkeys(e for a in command.arguments for e in ENDINGS.get(a.kind, ()))
        lines.append(f"complete -c lycotool {here} -a '(__lycotool_files {' '.join(endings)})'")
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    return "'" + _quoted(text, "\\'") + "'"


def _fish_value(option: Parameter) -> str:
    if option.is_flag:
        return ""
    if option.kind == "any":
        return " -r -F"
    if option.kind == "folder":
        return " -x -a '(__fish_complete_directories)'"
    words = " ".join(option.words)
    if option.kind != "none":
        words = f"{words} (__lycotool_files {' '.join(ENDINGS[option.kind])})".strip()
    return f" -x -a '{words}'" if words else " -x"


# PowerShell ------------------------------------------------------------------------------------


def powershell(commands: Sequence[CommandLine]) -> str:
    """The script for powershell."""
    tables = []
    for command in commands:
        rows = ["      '--help' = @{ Help = 'Show help and exit'; Value = $null }"]
        for option in command.options:
            if option.is_flag:
                value = "$null"
            elif option.kind == "none":
                value = f"@{{ Words = @({_ps_list(option.words)}); Endings = $null; Path = $false }}"
            else:
                accepted = "$null" if option.kind == "any" else f"@({_ps_list(ENDINGS[option.kind])})"
                value = f"@{{ Words = @({_ps_list(option.words)}); Endings = {accepted}; Path = $true }}"
            rows += [
                f"      '{flag}' = @{{ Help = {_ps_text(option.help)}; Value = {value} }}"
                for flag in _flags(option)
            ]
        endings = dict.fromkeys(e for a in command.arguments for e in ENDINGS.get(a.kind, ()))
        body = "\n".join(rows)
        tables.append(
            f"    '{command.name}' = @{{ Help = {_ps_text(command.summary)}; Endings = @({_ps_list(tuple(endings))}); "
            f"Options = [ordered]@{{\n{body}\n    }} }}"
        )
    root = "\n".join(f"    '{flag}' = {_ps_text(text)}" for flag, text in ROOT.items())
    joined = "\n".join(tables)
    return f"""{HEADER.format("powershell")}

Register-ArgumentCompleter -Native -CommandName lycotool -ScriptBlock {{
  param($wordToComplete, $commandAst, $cursorPosition)

  $root = [ordered]@{{
{root}
  }}
  $commands = [ordered]@{{
{joined}
  }}

  function Offer($text, $help) {{
    if ($text -like "$wordToComplete*") {{ [System.Management.Automation.CompletionResult]::new($text, $text, 'ParameterValue', $help) }}
  }}
  # Folders, and files with one of the endings ($null: every file).
  function OfferFiles($endings) {{
    foreach ($found in [System.Management.Automation.CompletionCompleters]::CompleteFilename($wordToComplete)) {{
      $name = $found.ListItemText
      if ($found.ResultType -eq 'ProviderContainer' -or $null -eq $endings) {{ $found }}
      elseif ($endings | Where-Object {{ $name.EndsWith($_) }}) {{ $found }}
    }}
  }}

  $words = @($commandAst.CommandElements | Where-Object {{ $_.Extent.EndOffset -lt $cursorPosition }} |
    ForEach-Object {{ $_.Extent.Text }})
  $command = $words | Select-Object -Skip 1 | Where-Object {{ $commands.Contains($_) }} | Select-Object -First 1
  $previous = $words[-1]
  if ($null -eq $command) {{
    if ($previous -eq '--shell') {{ 'bash', 'zsh', 'fish', 'powershell' | ForEach-Object {{ Offer $_ $_ }} }}
    elseif ($wordToComplete -like '-*') {{ foreach ($flag in $root.Keys) {{ Offer $flag $root[$flag] }} }}
    else {{ foreach ($name in $commands.Keys) {{ Offer $name $commands[$name].Help }} }}
    return
  }}
  $options = $commands[$command].Options
  if ($options.Contains($previous) -and $null -ne $options[$previous].Value) {{
    $value = $options[$previous].Value
    foreach ($word in $value.Words) {{ Offer $word $word }}
    if ($value.Path) {{ OfferFiles $value.Endings }}
  }}
  elseif ($wordToComplete -like '-*') {{ foreach ($flag in $options.Keys) {{ Offer $flag $options[$flag].Help }} }}
  else {{ OfferFiles $commands[$command].Endings }}
}}
"""


def _ps_text(text: str) -> str:
    """A help text as a string that is ASCII: Windows PowerShell reads files in the system's encoding."""
    if _short(text).isascii():
        return "'" + _quoted(text, "''") + "'"
    return '"' + "".join(c if c.isascii() else f"$([char]0x{ord(c):04X})" for c in _short(text)) + '"'


def _ps_list(words: Sequence[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)
