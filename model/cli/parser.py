"""A parser of flags: as absl writes them, from files too, with errors of one line."""

import argparse
import os
import shlex
import stat
import sys
from pathlib import Path

TRUE, FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")
DEEPEST, LARGEST = 16, 1 << 20  # of files of flags within each other, and bytes of one


class Boolean(argparse.Action):
    """--flag, --noflag, --no-flag, --flag=true, --flag=false: as absl flags are written, and as argparse's are."""

    def __init__(self, option_strings, dest, **kwargs):
        negated = [f"--{prefix}{option[2:]}" for option in option_strings for prefix in ("no", "no-")]
        self._negated = negated
        super().__init__([*option_strings, *negated], dest, nargs="?", metavar="BOOL", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        word = "true" if values is None else str(values).lower()
        if word not in TRUE + FALSE or (values is not None and option_string in self._negated):
            parser.error(f"{option_string}: expected true or false, got {values!r}")
        setattr(namespace, self.dest, (word in TRUE) != (option_string in self._negated))


class Parser(argparse.ArgumentParser):
    """Takes flags from files too, named as @FILE: any number a line, comments behind #. A name alone is that of a file
    in the folder `recipes`. Ends with status 2, and one line, where the flags cannot be."""

    def __init__(self, recipes: Path, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._recipes = recipes

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args([found for word in words for found in self._words(word, ())], namespace)

    def error(self, message: str):
        """One line, and not the usage: with a hundred flags, it hides the message."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help shows all flags)\n")

    def _words(self, word: str, within: tuple) -> list[str]:
        """The words that one stands for. within: (name, identity) of the files that are being read."""
        if not word.startswith("@"):
            return [word]
        name = word[1:]
        text, identity = self._read(name, within)
        found, within = [], (*within, (name, identity))
        for number, line in enumerate(text.splitlines(), 1):
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                self.error(f"@{name}, line {number}: {error}: {line[:80]!r}")
            found += [part for word in words for part in self._words(word, within)]
        return found

    def _read(self, name: str, within: tuple) -> tuple[str, tuple]:
        """A file of flags, and what tells it from all others."""
        try:
            with open(self._path(name), "rb") as file:
                found = os.fstat(file.fileno())
                identity = (found.st_dev, found.st_ino)
                again = stat.S_ISREG(found.st_mode) and identity in [known for _, known in within]
                if again or len(within) == DEEPEST:
                    chain = " -> ".join(f"@{name[:40]}" for name in [*(known for known, _ in within), name])
                    self.error(f"a file of flags that takes itself in: {chain}")
                data = file.read(LARGEST + 1)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            known = ", ".join(f"@{path.stem}" for path in sorted(self._recipes.glob("*.flags")))
            why = getattr(error, "strerror", None) or error
            self.error(f"@{name[:200]}: {why}: expected a file of flags, or one of {known}")
        if len(data) > LARGEST:
            self.error(f"@{name}: expected a file of flags, got more than {LARGEST:,} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.error(f"@{name}: expected a file of flags, got what is no text: {error}")
        if "\0" in text:
            self.error(f"@{name}: expected a file of flags, got what is no text: byte {text.index(chr(0))} is 0")
        return text, identity

    def _path(self, name: str) -> Path:
        recipe = self._recipes / f"{name}.flags"
        return recipe if os.path.isfile(recipe) and not os.path.exists(name) else Path(name)
