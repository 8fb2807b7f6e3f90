"""From a folder to a repository on the Hub: checked first, then sent as one commit.

Everything is looked at before the first request: the card, secrets, local paths, pickled files, and whether the models
load again. One commit means that a reader sees the old repository or the new one, never half of it. Git knows who put a
file there: what a push of ours changed last and the run no longer has is taken out, everything else stays.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_mtcompress import artifacts
from hf_mtcompress.errors import PublishingError
from hf_mtcompress.publishing.card import PICTURES, is_untouched, render_card
from hf_mtcompress.publishing.figures import own_words_of
from hf_mtcompress.publishing.lint import lint_card_of_files
from hf_mtcompress.publishing.portable import (
    local_paths_in,
    places_of_this_machine,
    portable,
    portable_recipe,
    secrets_in,
    without_secrets,
)
from hf_mtcompress.publishing.repository import collect_repository, files_of, is_left_at_home, repository_layout
from hf_mtcompress.records import RunRecord, run_from_dict
from hf_mtcompress.records.forms import OPENVINO_MODEL, OPENVINO_SETTINGS, OPENVINO_WEIGHTS

PICKLES = frozenset(
    {".bin", ".ckpt", ".dill", ".h5", ".joblib", ".mar", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"}
)
"""Files that can run code when they are opened, or hold weights that nothing here writes."""
VOCABULARIES = frozenset(
    {
        "added_tokens.json",
        "bpe.codes",
        "merges.txt",
        "sentencepiece.bpe.model",
        "spiece.model",
        "spm.model",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.bpe",
        "vocab.json",
        "vocab.txt",
    }
)
"""Lists of words: what looks like a path in there mostly is a word."""
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd")
"""How packed files begin: zip, gzip, bzip2, xz, 7-Zip, Zstandard."""

COMMIT_TITLE = "Model, card and record by hf_mtcompress"
"""By its title a later push knows a commit of ours."""

Content = Path | bytes


@dataclass(frozen=True)
class PushedFile:
    """One file of the repository."""

    path: str
    bytes: int


@dataclass(frozen=True)
class PushResult:
    """What was pushed, or would be."""

    repo_id: str
    files: list[PushedFile]
    commit_url: str | None
    """None after a dry run."""
    made: dict[str, bytes] = field(default_factory=dict)
    """What is not the same as in the folder: card, recipe and record as readers see them."""
    other_card: str | None = None
    """A newer card that lies in the folder and is not pushed, since somebody worked on the other one."""
    removed: list[str] = field(default_factory=list)
    """Files of an earlier push that the run no longer has; they were taken out."""
    kept: list[str] = field(default_factory=list)
    """Files in the repository that others put there or changed; they stay."""
    replaced: list[str] = field(default_factory=list)
    """Files that others changed last and that now are as in the folder; the repository's history has theirs."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.bytes for file in self.files)


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    check: Callable[[list[Path]], list[str]],
    private: bool = True,
    dry_run: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> PushResult:
    """Push a run, or any folder with a model and a card, to the Hub as one commit.

    Of a run, the delivered artefacts go up as `collect_repository` lays them out, the recipe and the record without
    local paths, and the card with the repository's name in its snippets. An edited card goes up as it is. Files of an
    earlier push that the run no longer has are removed from the repository; files of others stay.

    Args:
        folder: the output folder of a run, or a folder with a model and its README.md.
        repo_id: `name` or `namespace/name`.
        check: given the model folders that are to be pushed, returns a line for each that does not load again.
        private: for a repository that has to be made; pushing to an existing public one then needs `private=False`.
        dry_run: do everything but send.
        token: access token; default: the saved one or HF_TOKEN. It is never shown.
        revision: branch, made where it is missing; default: main.

    Returns:
        The files with their sizes, the address of the commit, and what else became of the repository.

    Raises:
        PublishingError: something is wrong with the folder, or the Hub refused; nothing in the repository has changed,
            unless the message says that this could not be seen.
    """
    folder = Path(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishingError(
            f"expected a repository such as 'name' or 'namespace/name', found '{repo_id}'; {error}"
        ) from error
    if not folder.is_dir():
        raise PublishingError(f"expected a folder to push, found none at '{folder.name}'; check the path")
    record = read_record(folder)
    contents = repository_contents(folder, record, repo_id)
    problems = content_problems(contents, folder) + _card_problems(contents, record)
    if not problems:
        # Loading takes long, so it comes last and only for what is otherwise in order.
        models = (
            [folder] if record is None else [folder / found.folder for _, found in repository_layout(record).values()]
        )
        problems = check(models)
    other_card = artifacts.CARD_ASIDE if (folder / artifacts.CARD_ASIDE).is_file() else None
    if problems and other_card is not None:
        problems.append(f"{other_card}: a newer card, which is not pushed; move it over {artifacts.CARD} or delete it")
    if problems:
        raise PublishingError("\n".join([f"{folder.name} is not pushed:", *(f"  - {problem}" for problem in problems)]))
    files = [PushedFile(path, _length(content)) for path, content in contents.items()]
    made = {
        path: content
        for path, content in contents.items()
        if isinstance(content, bytes) and not ((folder / path).is_file() and (folder / path).read_bytes() == content)
    }
    result = PushResult(repo_id, files, None, made, other_card)
    if dry_run:
        return result
    return _send(contents, result, private=private, token=token, revision=revision)


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run folder, or None where the folder holds none.

    Raises:
        PublishingError: there is one that cannot be read.
    """
    path = Path(folder) / artifacts.RECORD
    if not path.is_file():
        return None
    try:
        return run_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PublishingError(
            f"expected the record of a run in {artifacts.RECORD}, found something else ({error}); run the recipe again"
        ) from error


def repository_contents(folder: Path, record: RunRecord | None, repo_id: str) -> dict[str, Content]:
    """What the repository will hold, by path: files as they are on disk, or bytes where they differ from those.

    Args:
        folder: the output folder of a run, or any other folder.
        record: the record of the run; None pushes the folder as it is.
        repo_id: the name that the card's snippets load.
    """
    if record is None:
        return dict(files_of(folder))
    contents: dict[str, Content] = dict(collect_repository(folder, record))
    recipe_text = None
    if artifacts.RECIPE in contents:
        recipe_text = (folder / artifacts.RECIPE).read_text(encoding="utf-8")
        try:
            contents[artifacts.RECIPE] = portable_recipe(recipe_text).encode()
        except yaml.YAMLError as error:
            raise PublishingError(f"expected YAML in {artifacts.RECIPE}, found a mistake: {error}") from error
    data = json.loads((folder / artifacts.RECORD).read_text(encoding="utf-8"))
    if (cleaned := portable(data)) != data:
        contents[artifacts.RECORD] = (json.dumps(cleaned, indent=2, allow_nan=False) + "\n").encode()
    contents[artifacts.CARD] = _card(folder, record, recipe_text, repo_id).encode()
    return dict(sorted(contents.items()))


def _card(folder: Path, record: RunRecord, recipe_text: str | None, repo_id: str) -> str:
    pictures = [name for name in PICTURES if (folder / artifacts.ASSETS / name).is_file()]
    path = folder / artifacts.CARD
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    own_words = own_words_of(existing) if existing is not None else None
    if existing is not None and not is_untouched(existing):
        # Somebody has worked on it, so it goes up as it is.
        return existing
    return render_card(
        record,
        recipe_text,
        repo_id,
        pictures=pictures,
        own_words=own_words,
    )


def content_problems(contents: Mapping[str, Content], folder: Path) -> list[str]:
    """Files that must not go up: pickles, archives, links out of the folder, and what holds secrets or local paths."""
    problems = [] if contents else ["expected files to push, found none; check the folder"]
    inside = folder.resolve()
    here = places_of_this_machine(folder)
    for name, content in contents.items():
        if isinstance(content, Path):
            if not content.resolve().is_relative_to(inside):
                problems.append(f"{name}: expected a file of the folder, found a link out of it; copy the file")
                continue
            suffix = content.suffix.lower()
        else:
            suffix = Path(name).suffix.lower()
        if suffix in PICKLES and Path(name).name == OPENVINO_WEIGHTS and _is_openvino(name, contents):
            continue  # bare numbers beside a graph
        if suffix in PICKLES or (suffix not in (".safetensors", ".onnx") and _is_pickle(content)):
            problems.append(f"{name}: expected safetensors or ONNX, found a pickled or binary file; save it anew")
        elif _head(content).startswith(_ARCHIVES):
            problems.append(f"{name}: expected a file that can be looked into, found an archive; unpack it")
        elif suffix == ".safetensors":
            problems += _leaks(name, _safetensors_header(content), here)
        else:
            problems += _leaks(name, _bytes(content), here)
    return problems


def _leaks(name: str, raw: bytes, here: list[bytes]) -> list[str]:
    """Secrets and local paths in any file: whatever its name says, it is read by everybody."""
    suffix = Path(name).suffix.lower()
    text = None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = raw.decode("utf-16", errors="replace")
        raw = text.encode("utf-8", errors="replace")
    elif suffix not in (".safetensors", ".onnx") and b"\0" not in raw[:8192]:
        text = raw.decode("utf-8", errors="replace")
    problems = [
        f"{name}: expected no secret, found what looks like {kind}; take it out and revoke it"
        for kind in secrets_in(raw)
    ]
    paths = [] if text is None or Path(name).name in VOCABULARIES else local_paths_in(text)
    if paths:
        return problems + [
            f"{name}: expected no path of a machine, found '{path}'; name the file or folder without it"
            for path in list(dict.fromkeys(paths))[:3]
        ]
    remedy = "strip the metadata of the file" if text is None else "name the file or folder without it"
    found = [place.decode(errors="replace") for place in here if place in raw][:1]
    return problems + [f"{name}: expected no path of this machine, found one ({place}...); {remedy}" for place in found]


def _is_openvino(name: str, contents: Mapping[str, Content]) -> bool:
    """Whether weights lie beside an OpenVINO graph that we wrote, and are no pickle under its name."""
    beside = (OPENVINO_MODEL, OPENVINO_SETTINGS)
    there = all(str(PurePosixPath(name).with_name(file)) in contents for file in beside)
    return there and not _is_pickle(contents[name])


def _card_problems(contents: Mapping[str, Content], record: RunRecord | None) -> list[str]:
    if artifacts.CARD not in contents:
        return [f"{artifacts.CARD}: expected a model card, found none; write one with `hf-mtcompress card`"]
    text = _bytes(contents[artifacts.CARD]).decode("utf-8", errors="replace")
    # Paths and secrets have been looked for in every text file, this one included.
    return [
        f"{artifacts.CARD}: {problem}"
        for problem in lint_card_of_files(text, set(contents), record)
        if "path of a machine" not in problem and "no secret" not in problem
    ]


def _bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _length(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _head(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content[:4096]
    with content.open("rb") as file:
        return file.read(4096)


def _is_pickle(content: Content) -> bool:
    head = _head(content)
    # Protocols 2 to 5 start like this; torch.save writes a zip with such a file inside.
    return (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1) or (
        head.startswith(b"PK") and b"data.pkl" in head
    )


def _safetensors_header(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content[8 : 8 + int.from_bytes(content[:8], "little")]
    with content.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), content.stat().st_size))


def _send(
    contents: Mapping[str, Content], result: PushResult, *, private: bool, token: str | None, revision: str | None
) -> PushResult:
    repo_id = result.repo_id
    api = HfApi(token=token)
    additions = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in contents.items()
    ]
    seen: str | None = None
    removed: list[str] = []
    kept: list[str] = []
    replaced: list[str] = []
    try:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.model_info(full_id)
        if private and not info.private:
            raise PublishingError(
                f"expected '{full_id}' to be private, found a public repository; push with private=False (--public) if "
                "everybody may see it, or make it private in its settings"
            )
        if revision is not None:
            api.create_branch(full_id, branch=revision, exist_ok=True)
            info = api.model_info(full_id, revision=revision)
        if info.sha is None:
            raise PublishingError(_odd_answer(repo_id, "no commit"))
        removed, kept, replaced = _differences(_files_there(api, full_id, info.sha), additions)
        seen = full_id
        # Not `upload_folder`: that one may split a large folder into several commits.
        commit = api.create_commit(
            full_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in removed)],
            commit_message=COMMIT_TITLE,
            revision=revision,
            # What is removed was chosen by a look at this one.
            parent_commit=info.sha,
        )
        url = str(commit.commit_url)
    except PublishingError:
        raise
    except Exception as error:
        # HTTP errors, OSError, ValueError and, around uploads, RuntimeError with the reason as its cause.
        message = _explain(error, repo_id, token)
        # An answer that is lost says nothing of what it answered.
        done = None if seen is None else _address_if_done(api, seen, revision, additions, removed)
        if done is None:
            raise PublishingError(message) from None
        if done == "":
            raise PublishingError(
                f"{message}; whether it was done could not be seen: look at '{repo_id}', or push again, which changes "
                "nothing where everything is there"
            ) from None
        url = done
    return dataclasses.replace(result, commit_url=url, removed=removed, kept=kept, replaced=replaced)


def _differences(
    there: Mapping[str, RepoFile], additions: Iterable[CommitOperationAdd]
) -> tuple[list[str], list[str], list[str]]:
    """What a push does to files that are there already, by whose commit changed them last.

    Returns:
        Files of ours to remove, files of others that stay, and files of others that are replaced.
    """
    foreign = {
        path for path, file in there.items() if file.last_commit is None or file.last_commit.title != COMMIT_TITLE
    }
    added = {addition.path_in_repo: addition for addition in additions}
    # The Hub itself writes this one in our commits.
    left = [path for path in sorted(there) if path not in added and path != ".gitattributes"]
    removed = [path for path in left if path not in foreign and not is_left_at_home(path)]
    replaced = [path for path in added if path in foreign and not _is_same(there[path], added[path])]
    return removed, [path for path in left if path not in removed], replaced


def _files_there(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    try:
        entries = list(api.list_repo_tree(repo_id, recursive=True, expand=True, revision=revision))
    except EntryNotFoundError:  # a repository without any file
        return {}
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_same(file: RepoFile, addition: CommitOperationAdd) -> bool:
    """Whether a file of the repository has the content that is to be added."""
    if file.lfs is not None:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    if file.size != addition.upload_info.size:
        return False
    with addition.as_file() as content:
        return file.blob_id == hashlib.sha1(b"blob %d\0" % file.size + content.read()).hexdigest()


def _address_if_done(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    additions: Iterable[CommitOperationAdd],
    removed: Iterable[str],
) -> str | None:
    """The address of the last commit if it holds what was to be pushed; None if not, empty where nobody can look."""
    try:
        now = api.model_info(repo_id, revision=revision).sha
        if now is None:
            return ""
        there = _files_there(api, repo_id, now)
        done = not any(path in there for path in removed) and all(
            addition.path_in_repo in there and _is_same(there[addition.path_in_repo], addition)
            for addition in additions
        )
    except Exception:
        return ""
    return f"{api.endpoint}/{repo_id}/commit/{now}" if done else None


def _explain(error: BaseException, repo_id: str, token: str | None) -> str:
    reasons = [error]
    while (cause := reasons[-1].__cause__ or reasons[-1].__context__) is not None and cause not in reasons:
        reasons.append(cause)
    answered = next((reason for reason in reasons if isinstance(reason, HfHubHTTPError)), None)
    message = _answer(answered, repo_id) if answered is not None else _no_answer(reasons, repo_id)
    # A server may send back what it was sent, and the token may have come from the environment or a file.
    for secret in (token, get_token()):
        message = message.replace(secret, "***") if secret else message
    return without_secrets(message)


def _answer(error: HfHubHTTPError, repo_id: str) -> str:
    status = int(error.response.status_code)
    said = " ".join((error.server_message or "").split())
    said = f" The Hub says: {said}" if said else ""
    match status:
        case 400:
            return f"expected the Hub to take the files for '{repo_id}', but it found a mistake in them (400).{said}"
        case 401:
            return (
                f"expected a token that the Hub knows, but it refused the one for '{repo_id}', or there was none "
                f"(401); log in with `hf auth login` or set HF_TOKEN.{said}"
            )
        case 403:
            return (
                f"expected a token that may write to '{repo_id}', but this one may not (403); use one with write "
                f"access to that namespace.{said}"
            )
        case 404:
            return (
                f"expected the repository '{repo_id}', but the Hub does not find it or does not show it to this token "
                f"(404); check the name and the token.{said}"
            )
        case 409:
            return (
                f"expected to write to '{repo_id}', but the name or another change is in the way (409); try again, or "
                f"choose another name.{said}"
            )
        case 412:
            return f"expected '{repo_id}' unchanged, but somebody else committed meanwhile (412); push again.{said}"
        case 429:
            return (
                f"expected to write to '{repo_id}', but the Hub wants fewer requests (429); push again in a few "
                f"minutes.{said}"
            )
        case _ if status >= 500:
            return (
                f"expected the Hub to take '{repo_id}', but it failed itself ({status}); push again later: files that "
                f"arrived are not sent twice.{said}"
            )
        case _:
            return f"expected the Hub to take '{repo_id}', but it answered {status}.{said}"


def _no_answer(reasons: list[BaseException], repo_id: str) -> str:
    kinds = [type(reason).__name__ for reason in reasons]
    if any(isinstance(reason, OfflineModeIsEnabled) for reason in reasons):
        return f"expected to reach the Hub for '{repo_id}', but HF_HUB_OFFLINE is set; unset it and push again"
    if any(isinstance(reason, LocalTokenNotFoundError) for reason in reasons):
        return f"expected a token for '{repo_id}', found none; log in with `hf auth login` or set HF_TOKEN"
    # By name: which HTTP library raises these depends on the version of huggingface_hub.
    if any("Timeout" in kind for kind in kinds):
        return (
            f"expected an answer of the Hub for '{repo_id}', but none came in time; push again: files that arrived are "
            "not sent twice"
        )
    if any("Connect" in kind or "Network" in kind or "Protocol" in kind or "ReadError" in kind for kind in kinds):
        return (
            f"expected to reach the Hub for '{repo_id}', but there was no connection; check the network and HF_ENDPOINT"
        )
    # A page of some network, or an answer that lacks what the client looks for; the client then fails in its own way.
    odd = (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError)
    for reason in reasons:
        if isinstance(reason, odd) or "improperly formatted" in str(reason) or "Malformed" in str(reason):
            return _odd_answer(repo_id, _first_line(reason))
    return f"expected the Hub to take '{repo_id}', but it came to this: {_first_line(reasons[0])}"


def _odd_answer(repo_id: str, found: str) -> str:
    return (
        f"expected an answer of the Hub for '{repo_id}', but found something else ({found}); check that the network "
        "lets you through and that HF_ENDPOINT is a Hub, then push again"
    )


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
