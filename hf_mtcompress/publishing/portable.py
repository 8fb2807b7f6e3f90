"""Local paths and secrets stay at home: finding them in text, and taking them out of recipes and records."""

import os
import re
import socket
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

_ROOTS = (
    "Users|Volumes|content|data|dbfs|etc|home|kaggle|lscratch|media|mnt|opt|private|projects?|root|scratch|srv|tmp|usr|"
    "var|work|workspace"
)
_LOCAL_PATH = re.compile(
    rf"(?<![\w/.:\-])(?:/(?:{_ROOTS})/[\w.+-]|~[\w.-]*/[\w.+-])[^\s\"'`,;)<>]*|\b[A-Za-z]:\\+\w[^\s\"'`,;)<>]*|\bfile://\S+"
)
_SECRETS = {
    "a Hugging Face token": re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    "a cloud access key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a Slack token": re.compile(rb"\bxox[abpr]-[\w-]{20,}"),
}


def local_paths_in(text: str) -> list[str]:
    """Every absolute path of somebody's machine that `text` names."""
    return [match.group() for match in _LOCAL_PATH.finditer(text)]


def secrets_in(text: str | bytes) -> list[str]:
    """What kinds of secrets a text, or any file, seems to hold; never the secrets themselves."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", errors="replace")
    return [name for name, pattern in _SECRETS.items() if pattern.search(raw)]


def without_secrets(text: str) -> str:
    """The same text with *** in place of whatever looks like a secret."""
    raw = text.encode("utf-8", errors="replace")
    for pattern in _SECRETS.values():
        raw = pattern.sub(b"***", raw)
    return raw.decode("utf-8")


def host_names_in(text: str) -> list[str]:
    """The names of this machine that `text` holds as a word."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]} - {"localhost"}
    return sorted(name for name in names if len(name) > 3 and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text))


def places_of_this_machine(*folders: Path) -> list[bytes]:
    """Folders of this machine as they would stand in a binary file: home, current, temporary, Python's, `folders`."""
    places = {Path.home(), Path.cwd(), Path(sys.prefix), Path(tempfile.gettempdir()), *folders}
    resolved = {os.fspath(place.resolve()) for place in places}
    # Very short ones (such as the root) would be found in any weights by chance.
    return sorted(f"{place}{os.sep}".encode() for place in resolved if len(place) > 3)


def portable(value: Any) -> Any:
    """The same recipe or record with every local path cut down to its last part; everything else is untouched.

    A path that leaves the folder of the recipe (`../shared/snips`) counts as local, one below it does not.
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return _portable_string(value) if isinstance(value, str) else value


def _portable_string(text: str) -> str:
    if re.match(r"[A-Za-z]:\\", text):
        return PureWindowsPath(text).name or "local"
    if text.startswith(("../", "file://")) or _LOCAL_PATH.fullmatch(text):
        return PurePosixPath(text).name or "local"
    # A path inside a longer sentence, such as a message in the record.
    return _LOCAL_PATH.sub(lambda match: PurePosixPath(match.group().replace("\\", "/")).name or "local", text)


def portable_recipe(text: str) -> str:
    """A recipe as others can read it: no local paths, and the encoder by its Hub id where it has one.

    Args:
        text: YAML of a resolved recipe; the comment lines at its head are kept.

    Raises:
        yaml.YAMLError: `text` is no YAML.
    """
    recipe = yaml.safe_load(text)
    if not isinstance(recipe, dict):
        return text
    result = portable(recipe)
    encoder = result.get("encoder")
    if isinstance(encoder, dict) and encoder.get("hub_id") and encoder.get("path") != recipe["encoder"].get("path"):
        encoder["path"] = encoder["hub_id"]
    if result == recipe:
        return text
    head = [line for line in text.splitlines() if line.startswith("#")]
    return "\n".join([*head, yaml.safe_dump(result, sort_keys=False, allow_unicode=True, width=120)])
