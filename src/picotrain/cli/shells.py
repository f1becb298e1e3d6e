"""What teaches a shell to complete: a function that hands `picotrain __complete` the line up to the cursor and takes words from it."""

from __future__ import annotations

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """The lines for the start-up file of one of SHELLS."""
    return {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}[shell]


# bash 3.2 (macOS) has no compopt and no mapfile: a finished word brings its space along, and lines are read one by one. $2 is what
# bash replaces: the word from its last = or : on.
_BASH = r"""# picotrain completion for bash: eval "$(picotrain completion bash)"
_picotrain() {
    local word
    COMPREPLY=()
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <("${1/#\~/$HOME}" __complete -- bash "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null)
}
complete -o nospace -F _picotrain picotrain
"""

_ZSH = r"""#compdef picotrain
# picotrain completion for zsh: eval "$(picotrain completion zsh)", after compinit
_picotrain() {
    local -a found
    local line="${(j: :)words[1,CURRENT-1]} ${compstate[quote]}$PREFIX"
    found=(${(f)"$("${(Q)words[1]/#\~/$HOME}" __complete -- zsh "$line" "" 2>/dev/null)"})
    if [[ -n ${compstate[quote]} ]]; then
        compadd -S '' -- $found
    else
        compadd -Q -S '' -- ${(M)found:#*[=./]}
        compadd -Q -- ${found:#*[=./]}
    fi
}
compdef _picotrain picotrain
"""

# fish escapes what it inserts, and puts no space after = . /
_FISH = r"""# picotrain completion for fish: picotrain completion fish | source
function __picotrain_words
    set -l program (string replace -r '^~' $HOME -- (commandline -opc)[1])
    $program __complete -- fish (commandline -cp | string collect) "" 2>/dev/null
end
complete -c picotrain -f -a '(__picotrain_words)'
"""
