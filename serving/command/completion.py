"""jaxserve completion bash | zsh | fish: words, and the flags of each, as the shell's completion.

eval "$(jaxserve completion bash)"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SHELLS = ("bash", "zsh", "fish")


def words_and_flags() -> dict[str, list[str]]:
    """Word -> its flags, from the parsers themselves; those whose parser is made when they run have none."""
    from serving.boot.flags.launch import build_parser
    from serving.command.__main__ import _ORDER, is_there

    flags: dict[str, list[str]] = {word: [] for word in _ORDER if is_there(word)}
    flags["serve"] = _flags(build_parser())
    flags["completion"] = list(SHELLS)
    return flags


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    return sorted({flag for action in shown for flag in action.option_strings if flag.startswith("--")})


def script(shell: str) -> str:
    """The completion's script."""
    table = words_and_flags()
    words = " ".join(table)
    if shell == "fish":
        lines = [f"complete -c jaxserve -f -n __fish_use_subcommand -a '{words}'"]
        for word, flags in table.items():
            for flag in flags:
                option = f"-l {flag[2:]}" if flag.startswith("--") else f"-a {flag}"
                lines.append(f"complete -c jaxserve -n '__fish_seen_subcommand_from {word}' {option}")
        return "\n".join(lines)
    cases = "\n".join(f'    {word}) flags="{" ".join(flags)}" ;;' for word, flags in table.items() if flags)
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{head}_jaxserve() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" flags=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{words}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$flags" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _jaxserve jaxserve"""


def main(argv: Sequence[str], word: str = "completion") -> int:
    """Prints the script."""
    parser = argparse.ArgumentParser(prog="jaxserve completion", description=__doc__)
    parser.add_argument("shell", choices=SHELLS)
    print(script(parser.parse_args(argv).shell))
    return 0
