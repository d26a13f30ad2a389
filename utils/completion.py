"""
`mlx_grpo.py completion {bash,zsh,fish}`: a script that completes commands, their options and, after --set, the names of
options and their values. It is made from the parsers and the declarations, so it knows what this version knows.
"""

import argparse
from dataclasses import dataclass

from mlx_grpo import COMMANDS, OPTIONS, make_parser

PROGRAM = "mlx-grpo"           # `python mlx_grpo.py` belongs to python, and is left alone
PATHS = ("PATH", "FILE", "DIR", "RUN", "run")          # what a metavar of a path says


@dataclass(frozen=True)
class Argument:
    """names: ("-o", "--output"), or () for a positional one. takes: "nothing", "choice", "path", "set" or "value"."""

    names: tuple
    help: str
    takes: str
    choices: tuple


def add_arguments(parser):
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that is to load it")


def commands():
    """{command: (help, [Argument])}, as the parsers say."""
    found = {}
    for command, (_, words) in COMMANDS.items():
        subparsers = next(a for a in make_parser(command)._actions if isinstance(a, argparse._SubParsersAction))
        found[command] = words, [argument(action) for action in subparsers.choices[command]._actions]
    return found


def argument(action):
    choices = tuple(map(str, action.choices or ()))
    told = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or action.dest
    if action.nargs == 0:
        takes = "nothing"
    elif "--set" in action.option_strings:
        takes = "set"
    else:
        takes = "choice" if choices else "path" if any(word in told for word in PATHS) else "value"
    return Argument(tuple(action.option_strings), " ".join((action.help or "").replace("%%", "%").split()), takes, choices)


def values_of(name):
    """The values that an option is known to take, as --set writes them."""
    from mlx_grpo.make_docs import REGISTRIES

    kind, choices = OPTIONS[name].type, OPTIONS[name].metadata["choices"]
    known = REGISTRIES.get(name, ()) if kind == "str" else ()
    known = known or choices or ((True, False) if kind == "bool" else ())
    return [str(v).lower() if isinstance(v, bool) else str(v) for v in known if v != ""]


def quoted(text):
    """Text in single quotes, for every one of the three shells."""
    return "'" + text.replace("'", "’") + "'"


# ---- bash (3.2 or newer)

BASH = """\
# bash completion of mlx-grpo: source <(mlx-grpo completion bash), for good in ~/.bashrc
_mlx_grpo_values() {{       # the values of an option
  case $1 in
{values}
  esac
}}
_mlx_grpo() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} at=$COMP_CWORD option key word
  COMPREPLY=()
  case $command in
    {names}) ;;
    *) command=train ;;
  esac
  # --set KEY=VALUE is one word, or three where "=" breaks words
  [ "$cur" = "=" ] && {{ cur=; at=$((at + 1)); }}
  if [ "$at" -ge 3 ] && [ "${{COMP_WORDS[at - 1]}}" = "=" ] && [ "${{COMP_WORDS[at - 3]}}" = "--set" ]; then
    COMPREPLY=($(compgen -W "$(_mlx_grpo_values "${{COMP_WORDS[at - 2]}}")" -- "$cur"))
    return
  fi
  option=${{COMP_WORDS[at - 1]}}
  if [ "$option" = "--set" ]; then
    case $cur in
      *=*) key=${{cur%%=*}}
        for word in $(compgen -W "$(_mlx_grpo_values "$key")" -- "${{cur#*=}}"); do COMPREPLY+=("$key=$word"); done ;;
      *) COMPREPLY=($(compgen -W "{keys}" -S = -- "$cur"))
        type compopt >/dev/null 2>&1 && compopt -o nospace 2>/dev/null ;;
    esac
    return
  fi
  case "$command $option" in
{choices}
  esac
  if [ "$at" -eq 1 ] && [ "${{cur#-}}" = "$cur" ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
    return
  fi
  case $command in
{options}
  esac
  case $cur in
    -*) COMPREPLY=($(compgen -W "$option" -- "$cur")) ;;
    *) COMPREPLY=($(compgen -W "$word" -- "$cur")) ;;
  esac
}}
complete -o default -F _mlx_grpo {program}
"""


def bash(found):
    values = [f"    {name}) echo {quoted(' '.join(known))} ;;" for name in OPTIONS if (known := values_of(name))]
    choices, options = [], []
    for command, (_, arguments) in found.items():
        free = [f'"{command} {name}"' for a in arguments if a.takes in ("path", "value") for name in a.names]
        choices += [f"    {'|'.join(free)}) return ;;      # readline completes file names"] if free else []
        for a in arguments:
            patterns = "|".join(f'"{command} {name}"' for name in a.names)
            if a.takes == "choice" and a.names:
                choices.append(f'    {patterns}) COMPREPLY=($(compgen -W "{" ".join(a.choices)}" -- "$cur")); return ;;')
        names = " ".join(name for a in arguments for name in a.names)
        words = " ".join(word for a in arguments if not a.names for word in a.choices)
        options.append(f'    {command}) option="{names}" word="{words}" ;;')
    return BASH.format(values="\n".join(values), names="|".join(found), keys=" ".join(OPTIONS), choices="\n".join(choices),
                       commands=" ".join(found), options="\n".join(options), program=PROGRAM)


# ---- zsh

ZSH = """\
#compdef {program}
# zsh completion of mlx-grpo: mlx-grpo completion zsh > DIR/_mlx-grpo, for a DIR in $fpath, or source it after compinit
_mlx_grpo_set() {{
  if compset -P '*='; then
    case ${{IPREFIX%=}} in
{values}
    esac
  else
    compadd -S = -- {keys}
  fi
}}
_mlx_grpo() {{
  local -a known
  known=(
{commands}
  )
  local command=train
  if [[ $words[2] != -* ]]; then
    if (( CURRENT == 2 )); then
      _describe command known
      return
    fi
    command=$words[2]
    shift words
    (( CURRENT-- ))
  fi
  case $command in
{options}
  esac
}}
if [[ $funcstack[1] == _mlx_grpo || $funcstack[1] == _mlx-grpo ]]; then _mlx_grpo "$@"; else compdef _mlx_grpo {program}; fi
"""


def zsh_argument(a):
    """One specification for _arguments; [ ] : in a help text have a meaning there."""
    told = "".join(" " if c in "[]:\\" else c for c in a.help)
    action = {"nothing": "", "choice": f":value:({' '.join(a.choices)})", "path": ":file:_files",
              "set": ":option:_mlx_grpo_set", "value": ":value: "}[a.takes]
    if not a.names:
        return [quoted(f"*{action or ':file:_files'}" if a.takes == "path" else f"1{action}")]
    star = "*" if a.takes == "set" else ""
    return [quoted(f"{star}{name}[{told}]{action}") for name in a.names]


def zsh(found):
    values = [f"      {name}) compadd -- {' '.join(map(quoted, known))} ;;" for name in OPTIONS
              if (known := values_of(name))]
    options = [f"    {command}) _arguments " + " \\\n      ".join(spec for a in arguments for spec in zsh_argument(a))
               + " ;;" for command, (_, arguments) in found.items()]
    return ZSH.format(program=PROGRAM, values="\n".join(values), keys=" ".join(OPTIONS), options="\n".join(options),
                      commands="\n".join(f"    {quoted(f'{command}:{words}')}" for command, (words, _) in found.items()))


# ---- fish

FISH = """\
# fish completion of mlx-grpo: mlx-grpo completion fish > ~/.config/fish/completions/mlx-grpo.fish
function __mlx_grpo_is
    set -l words (commandline -opc)
    set -l command train
    test (count $words) -gt 1; and not string match -q -- '-*' $words[2]; and set command $words[2]
    test $command = $argv[1]
end
function __mlx_grpo_first
    test (count (commandline -opc)) -eq 1
end
function __mlx_grpo_set
{values}
end
"""


def fish(found):
    choices = {name: values_of(name) for name in OPTIONS}
    values = [f"    printf '%s\\n' {name}={{{','.join(known)}}}" if known else f"    echo {name}="
              for name, known in choices.items()]
    lines = []
    for command, (words, arguments) in found.items():
        lines.append(f"complete -c {PROGRAM} -n __mlx_grpo_first -f -a {command} -d {quoted(words)}")
        lines += [f"complete -c {PROGRAM} -n '__mlx_grpo_is {command}'" + fish_argument(a) for a in arguments]
    return FISH.format(values="\n".join(values)) + "\n".join(lines) + "\n"


def fish_argument(a):
    names = "".join(f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}" for name in a.names)
    told = f" -d {quoted(a.help)}" if a.help and a.names else ""
    listed = f" -a {quoted(' '.join(a.choices))}"
    if a.names:
        takes = {"nothing": "", "choice": " -x" + listed, "path": " -r", "set": " -x -a '(__mlx_grpo_set)'", "value": " -x"}
    else:
        takes = {"nothing": " -f", "choice": " -f" + listed, "path": " -F", "value": ""}
    return names + takes[a.takes] + told


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def run(args):
    """A script that completes commands, their options, and option names and values after --set, for the
    installed `mlx-grpo` (not `python mlx_grpo.py`, which belongs to python).

    examples:
      source <(mlx-grpo completion bash)                           # for good: in ~/.bashrc
      mlx-grpo completion zsh > "${fpath[1]}/_mlx-grpo"
      mlx-grpo completion fish > ~/.config/fish/completions/mlx-grpo.fish
    """
    print(SHELLS[args.shell](commands()), end="")
    return 0
