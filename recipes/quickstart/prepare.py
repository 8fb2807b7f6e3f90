"""Fetch and split the human-rated sentences of Hutto & Gilbert (2014) for the quickstart.

What it does: downloads the source distribution of vaderSentiment 3.3.2 with pip, checks its SHA-256, reads the rated
sentences inside it and writes train.jsonl, validation.jsonl and test.jsonl with the columns

    text        a sentence from a tweet, a product review, a film review or a newspaper editorial
    intensity   mean rating of about 20 people, from -4 (extremely negative) to 4 (extremely positive)
    polarity    negative, neutral or positive, see `polarity`
    source      tweet, product_review, film_review or editorial

What it needs: Python with pip, and a package index (2.5 MB; the file is kept in the user's cache folder).
Command:    python recipes/quickstart/prepare.py [--train 6400] [--validation 500] [--test 2000] [--seed 13]

Each split holds as many sentences of each source as there are, up to an equal share. Sentences of one review or one
article stay in one split, and a text that occurs twice is used once. A second call with the same settings does nothing.

References:
    Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014.
    The package and its data are under the MIT licence.
"""

import argparse
import hashlib
import html
import importlib.util
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "tweet": "tweets_GroundTruth.txt",
    "product_review": "amazonReviewSnippets_GroundTruth.txt",
    "film_review": "movieReviewSnippets_GroundTruth.txt",
    "editorial": "nytEditorialSnippets_GroundTruth.txt",
}
SPLITS = ("train", "validation", "test")
SETTINGS = "prepared.json"

# The authors call a compound score (-1 to 1) neutral between -0.05 and 0.05; ratings run from -4 to 4.
NEUTRAL = 0.05 * 4


class PrepareError(Exception):
    """The data could not be prepared; the message says what to do."""


@dataclass(frozen=True)
class Sentence:
    """One rated sentence; those with one `group` come from one review or article."""

    text: str
    intensity: float
    source: str
    group: str

    def row(self) -> dict[str, str | float]:
        """The sentence as it is written to the files."""
        return {
            "text": self.text,
            "intensity": round(self.intensity, 4),
            "polarity": polarity(self.intensity),
            "source": self.source,
        }


def polarity(intensity: float) -> str:
    """Class of a mean rating from -4 to 4, by the authors' thresholds of +-0.05 scaled to the ratings: +-0.2."""
    if intensity >= NEUTRAL:
        return "positive"
    return "negative" if intensity <= -NEUTRAL else "neutral"


# ---------------------------------------------------------------------------------------------------------- fetching


def fetch(cache: Path) -> bytes:
    """The source distribution, from the cache folder or through pip.

    Raises:
        PrepareError: pip is missing or failed, or the file is not the expected one.
    """
    kept = cache / SDIST
    if kept.is_file() and hashlib.sha256(content := kept.read_bytes()).hexdigest() == SHA256:
        return content
    if importlib.util.find_spec("pip") is None:
        raise PrepareError(
            f"expected pip to fetch {REQUIREMENT}, found none in {sys.executable}; "
            f"run `{sys.executable} -m ensurepip`, or put {SDIST} into {cache}"
        )
    print(f"Fetching {REQUIREMENT} (source distribution, 2.5 MB) with pip ...", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        # With a hash given, pip checks the file before it runs anything in it (to read its metadata).
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
        options = ["--no-deps", "--no-binary", "vaderSentiment", "--require-hashes", "--disable-pip-version-check"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", scratch],
            capture_output=True,
            text=True,
            check=False,
        )
        fetched = Path(scratch, SDIST)
        if done.returncode != 0 or not fetched.is_file():
            raise PrepareError(
                f"expected pip to fetch {REQUIREMENT}, but it failed:\n{_errors(done.stderr or done.stdout)}\n"
                f"Check the network and the package index (pip config list), or put {SDIST} into {cache}"
            )
        content = fetched.read_bytes()
    check_hash(content)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _write(kept, content)
    except OSError as error:
        print(f"(not kept for later: {cache} cannot be written, {error.strerror})")
    return content


def check_hash(content: bytes) -> None:
    """Refuse any file but the one this script was written for.

    Raises:
        PrepareError: the SHA-256 differs.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise PrepareError(
            f"expected {SDIST} with SHA-256 {SHA256}, found {found}; the package index gave another file: "
            "do not use it, and try another index"
        )


def cache_folder() -> Path:
    """Where the download is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_mtcompress"


def _errors(output: str) -> str:
    """The lines of pip's output that say what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in ([line for line in lines if "ERROR" in line] or lines)[-4:])


# ----------------------------------------------------------------------------------------------------------- reading


def read_sentences(sdist: bytes) -> list[Sentence]:
    """All rated sentences in the source distribution. Nothing is unpacked to disk.

    Raises:
        PrepareError: a file is missing or a line is not `id TAB rating TAB text`.
    """
    archive = _member(sdist, ARCHIVE)
    return [
        sentence
        for source, name in FILES.items()
        for sentence in parse(_member(archive, name).decode("utf-8"), source, name)
    ]


def parse(content: str, source: str, name: str) -> list[Sentence]:
    """The sentences of one file with lines of `id TAB mean rating TAB text`.

    An id `12_3` is the third sentence of review or article 12; an id `12` stands alone.

    Raises:
        PrepareError: a line has another form.
    """
    sentences = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            identifier, rating, text = line.rstrip("\r").split("\t")
            intensity = float(rating)
        except ValueError:
            raise PrepareError(
                f"expected 'id TAB rating TAB text' in line {number} of {name}, found {line[:80]!r}; "
                "the file is not the one this script was written for"
            ) from None
        # The texts hold HTML entities (`&amp;`) and runs of spaces, left over from where they were collected.
        text = " ".join(html.unescape(text).split())
        if text:
            sentences.append(Sentence(text, intensity, source, f"{source}/{identifier.split('_')[0]}"))
    return sentences


def _member(archive: bytes, name: str) -> bytes:
    """Content of the one regular file in a .tar.gz whose path ends with `name`."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if member.isfile() and f"/{member.name}".endswith(f"/{name}"):
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise PrepareError(f"expected {name} in {SDIST}, found none; the file is not the one this script was written for")


# ---------------------------------------------------------------------------------------------------------- splitting


def split(sentences: Sequence[Sentence], sizes: Mapping[str, int], seed: int) -> dict[str, list[Sentence]]:
    """Draw the splits: sources in equal shares as far as they reach, groups in one split only.

    Args:
        sentences: all rated sentences.
        sizes: rows of each split, at least 1.
        seed: another seed gives another draw.

    Raises:
        PrepareError: there are too few sentences.
    """
    draw = random.Random(seed)
    waiting = _groups_by_source(sentences)
    for groups in waiting.values():
        draw.shuffle(groups)
    splits: dict[str, list[Sentence]] = {}
    # The test split is drawn first, so that it stays the same when the others change in size.
    for name in reversed(SPLITS):
        shares = _shares({source: sum(map(len, groups)) for source, groups in waiting.items()}, sizes[name])
        if (found := sum(shares.values())) < sizes[name]:
            raise PrepareError(
                f"expected {sizes[name]} sentences for {name}, found {found} left of {len(sentences)}; "
                f"ask for fewer with --{name}, or for smaller other splits"
            )
        rows: list[Sentence] = []
        for source, share in shares.items():
            taken: list[Sentence] = []
            while len(taken) < share:
                taken += waiting[source].pop()
            # The rest of a group that was cut here is used nowhere.
            rows += taken[:share]
        draw.shuffle(rows)
        splits[name] = rows
    return {name: splits[name] for name in SPLITS}


def _groups_by_source(sentences: Sequence[Sentence]) -> dict[str, list[list[Sentence]]]:
    """Different texts, by source and group: what is trained on must not be tested on."""
    seen: set[str] = set()
    groups: dict[str, dict[str, list[Sentence]]] = defaultdict(lambda: defaultdict(list))
    for sentence in sentences:
        if (key := sentence.text.casefold()) not in seen:
            seen.add(key)
            groups[sentence.source][sentence.group].append(sentence)
    return {source: list(by_group.values()) for source, by_group in groups.items()}


def _shares(available: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Equal shares of `wanted`; what a small source lacks is spread over the larger ones."""
    shares, left = {}, wanted
    for index, source in enumerate(sorted(available, key=lambda source: (available[source], source))):
        shares[source] = min(available[source], left // (len(available) - index))
        left -= shares[source]
    return shares


# ----------------------------------------------------------------------------------------------------------- writing


def write(splits: Mapping[str, Sequence[Sentence]], folder: Path, settings: Mapping[str, object]) -> None:
    """Write the splits as JSON lines; the folder appears whole or not at all.

    Raises:
        PrepareError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise PrepareError(
            f"expected to write {folder}, but that failed ({error.strerror}); give another --out"
        ) from error
    try:
        for name, sentences in splits.items():
            lines = [json.dumps(sentence.row(), ensure_ascii=False) + "\n" for sentence in sentences]
            (scratch / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (scratch / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    except OSError as error:
        raise PrepareError(
            f"expected to write {folder}, but that failed ({error.strerror}); give another --out"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_prepared(folder: Path, settings: Mapping[str, object]) -> bool:
    """Whether the folder holds what the same settings would write."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == settings and all((folder / f"{name}.jsonl").is_file() for name in SPLITS)


def describe(folder: Path) -> str:
    """Rows of each split, by source and by polarity."""
    lines = []
    for name in SPLITS:
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        counts = [
            ", ".join(f"{label} {count}" for label, count in sorted(Counter(row[column] for row in rows).items()))
            for column in ("source", "polarity")
        ]
        lines.append(f"  {name:<10} {len(rows):>5} rows: {'; '.join(counts)}")
    return "\n".join(lines)


def _write(target: Path, content: bytes) -> None:
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data; 0 when they are there, 2 when that is impossible."""
    parser = argparse.ArgumentParser(
        description="Fetch and split the human-rated sentences of Hutto & Gilbert (2014).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default in zip(SPLITS, (6400, 500, 2000), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="ROWS", help=f"rows of the {name} split")
    parser.add_argument("--seed", type=int, default=13, help="seed of the draw")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", help="folder to write")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder that keeps the download")
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in SPLITS}
    settings = {"version": 1, "sha256": SHA256, "seed": options.seed, "rows": sizes}
    try:
        for name, size in sizes.items():
            if size < 1:
                raise PrepareError(f"expected at least 1 row with --{name}, found {size}")
        if is_prepared(options.out, settings):
            print(f"Nothing to do, {options.out} holds:")
        else:
            write(split(read_sentences(fetch(options.cache)), sizes, options.seed), options.out, settings)
            print(f"Wrote {options.out}:")
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(describe(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
