"""What reaches the Hub, what never may, and what the user is told when it goes wrong."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from huggingface_hub import HfApi

from hf_mtcompress.errors import PublishingError
from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.hub import COMMIT_TITLE, push_folder
from hf_mtcompress.publishing.repository import collect_repository
from tests.unit.publishing import push_worker
from tests.unit.publishing.factory import RECIPE, make_record, write_run
from tests.unit.publishing.hub_stub import GOOD_TOKEN, READ_TOKEN, Hub, running_hub

REPOSITORY = "tester/artificial"
Push = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def hub_server() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(hub_server: Hub) -> Hub:
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="module")
def push_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("push") / "log.txt"


@pytest.fixture(scope="module")
def push(hub_server: Hub, push_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Push]:
    """`push_folder` in another process whose client talks to the stand-in."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": hub_server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "NO_PROXY": "127.0.0.1",
    }
    with (
        push_log.open("w") as log,
        subprocess.Popen(
            [sys.executable, push_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(folder: Path, repo_id: str = REPOSITORY, **order: Any) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"token": GOOD_TOKEN} | order | {"folder": str(folder), "repo_id": repo_id}))
            process.stdin.write("\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, push_log.read_text()[-2000:]
            return json.loads(line)

        yield ask
        process.stdin.close()
        process.wait(30)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder, with the card as a run writes it."""
    folder = tmp_path / "artificial"
    record = write_run(folder)
    (folder / "README.md").write_text(render_card(record, RECIPE), encoding="utf-8")
    return folder


EXPECTED = [
    "README.md",
    "assets/comparison.png",
    "assets/interference.png",
    "config.json",
    "model.safetensors",
    "onnx/config.json",
    "onnx/model.onnx",
    "recipe.yaml",
    "record.json",
    *(
        f"vanilla/{task}/{name}"
        for task in ("intent", "mood", "slots")
        for name in ("config.json", "model.safetensors")
    ),
]


def test_push_makes_a_private_repository_with_one_commit(push: Push, hub: Hub, run: Path):
    """A repository that is public by default, or that can be seen half full, cannot be taken back."""
    result = push(run)
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    assert len(repository.commits) == 1
    assert sorted(repository.files["main"]) == sorted(EXPECTED) == sorted(result["files"])
    assert result["commit_url"].endswith(repository.commits[0])


def test_pushed_bytes_are_those_of_the_delivered_forms(push: Push, hub: Hub, run: Path):
    """Another step's weights under the right name would pass every other check."""
    push(run)
    files = hub.repositories[REPOSITORY].files["main"]
    assert files["model.safetensors"] == (run / "pruned" / "model.safetensors").read_bytes()
    assert files["onnx/model.onnx"] == (run / "small" / "model.onnx").read_bytes()
    folder = run / "student-export" / "vanilla" / "mood"
    assert files["vanilla/mood/model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_card_and_recipe_are_made_for_readers(push: Push, hub: Hub, run: Path):
    """Snippets that name folders of the author's run fail for everybody else, and local paths tell who that is."""
    push(run)
    contents = hub.repositories[REPOSITORY].files["main"]
    files = {name: contents[name].decode() for name in ("README.md", "recipe.yaml", "record.json")}
    assert f'AutoModel.from_pretrained("{REPOSITORY}")' in files["README.md"]
    assert "/home/someone" in (run / "recipe.yaml").read_text()
    assert "/home/someone" not in files["recipe.yaml"] + files["README.md"] + files["record.json"]
    assert "path: example/artificial-encoder" in files["recipe.yaml"]


def test_second_push_changes_nothing(push: Push, hub: Hub, run: Path):
    """A push that always commits buries real changes among empty ones."""
    first = push(run)
    hub.requests.clear()
    second = push(run)
    assert len(hub.repositories[REPOSITORY].commits) == 1
    assert second["commit_url"] == first["commit_url"]
    assert not [request for request in hub.requests if request.startswith("PUT") or "/commit/" in request]


def test_only_what_changed_is_sent_again(push: Push, hub: Hub, run: Path):
    """Sending all weights again for a word in the card costs minutes."""
    push(run)
    hub.requests.clear()
    text = (
        (run / "README.md").read_text().replace("<!-- Text between these", "Ask the author.\n<!-- Text between these")
    )
    (run / "README.md").write_text(text)
    push(run)
    repository = hub.repositories[REPOSITORY]
    assert len(repository.commits) == 2
    assert b"Ask the author." in repository.files["main"]["README.md"]
    assert f'"{REPOSITORY}"'.encode() in repository.files["main"]["README.md"]
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_edited_card_goes_up_as_it_is(push: Push, hub: Hub, run: Path):
    """A card that is rendered again over somebody's work loses that work."""
    text = (run / "README.md").read_text().replace("## Limitations", "## Limitations and advice")
    (run / "README.md").write_text(text)
    push(run)
    assert hub.repositories[REPOSITORY].files["main"]["README.md"].decode() == text


def test_branch_is_made(push: Push, hub: Hub, run: Path):
    """A revision that is ignored puts an experiment on main."""
    push(run, revision="trial")
    repository = hub.repositories[REPOSITORY]
    assert repository.files["main"] == {}
    assert sorted(repository.files["trial"]) == sorted(EXPECTED)


def test_dry_run_lists_files_and_asks_nobody(push: Push, hub: Hub, run: Path):
    """A dry run that creates the repository is none."""
    result = push(run, dry_run=True)
    assert sorted(result["files"]) == sorted(EXPECTED)
    assert result["files"]["config.json"] == (run / "pruned" / "config.json").stat().st_size
    assert result["commit_url"] is None
    assert result["checked"]
    assert hub.requests == []


def test_dry_run_shows_what_readers_will_see(run: Path):
    """The card that is pushed names the repository, and is not the one that lies in the folder."""
    result = push_folder(run, REPOSITORY, check=lambda folders: [], dry_run=True)
    assert sorted(result.made) == ["README.md", "recipe.yaml"]
    assert f'AutoModel.from_pretrained("{REPOSITORY}")' in result.made["README.md"].decode()
    assert b"/home/someone" not in result.made["recipe.yaml"]


def test_new_card_beside_a_changed_one_stays_and_is_named(push: Push, hub: Hub, run: Path):
    """Two cards in a repository contradict each other; a new one that nobody hears of is never looked at."""
    assert push(run)["other_card"] is None
    text = (run / "README.md").read_text().replace("## Limitations", "## Limitations and advice")
    (run / "README.md").write_text(text)
    (run / "README.new.md").write_text(render_card(make_record(), RECIPE))
    assert push(run)["other_card"] == "README.new.md"
    assert sorted(hub.repositories[REPOSITORY].files["main"]) == sorted(EXPECTED)


def test_existing_public_repository_is_refused(push: Push, hub: Hub, run: Path):
    """`private` has no effect on a repository that exists: the push would be public without a word."""
    push(run, private=False)
    assert not hub.repositories[REPOSITORY].private
    (run / "assets" / "comparison.png").write_bytes(b"\x89PNG another")
    answer = push(run)
    assert "public" in answer["refused"]
    assert len(hub.repositories[REPOSITORY].commits) == 1
    assert push(run, private=False)["commit_url"]


def test_failed_check_refuses_before_any_request(push: Push, hub: Hub, run: Path):
    """What does not load again must not be found on the Hub."""
    answer = push(run, check_answers=["pruned: outputs differ by 0.5"])
    assert "pruned: outputs differ by 0.5" in answer["refused"]
    assert [Path(folder).relative_to(run).as_posix() for folder in answer["checked"]] == [
        "pruned",
        "small",
        "student-export/vanilla",
    ]
    assert hub.requests == []


def plant_pickle(run: Path) -> None:
    (run / "pruned" / "pytorch_model.bin").write_bytes(b"\x80\x04weights")


def plant_hidden_pickle(run: Path) -> None:
    (run / "pruned" / "state.dat").write_bytes(b"\x80\x04weights")


def plant_torch_archive(run: Path) -> None:
    (run / "pruned" / "state").write_bytes(b"PK\x03\x04........archive/data.pkl")


def plant_local_path(run: Path) -> None:
    (run / "pruned" / "config.json").write_text('{"_name_or_path": "/home/someone/models/base"}')


def plant_path_in_graph(run: Path) -> None:
    (run / "small" / "model.onnx").write_bytes(b"graph " + os.fsencode(Path(sys.prefix).resolve()) + b"/lib/site.py")


def plant_path_in_weights(run: Path) -> None:
    header = json.dumps({"__metadata__": {"source": f"{run.resolve()}/pruned"}}).encode()
    (run / "pruned" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def plant_token(run: Path) -> None:
    (run / "student-export" / "vanilla" / "mood" / "notes.txt").write_text(f"log in with {GOOD_TOKEN}")


def plant_token_in_page(run: Path) -> None:
    (run / "pruned" / "notes.html").write_text(f"<p>{GOOD_TOKEN}</p>")


def plant_token_in_backup(run: Path) -> None:
    (run / "pruned" / "config.json.bak").write_text(f'{{"token": "{GOOD_TOKEN}"}}')


def plant_token_without_suffix(run: Path) -> None:
    (run / "assets" / "NOTES").write_text(f"token={GOOD_TOKEN}")


def plant_token_in_picture(run: Path) -> None:
    (run / "assets" / "comparison.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00tEXtComment\x00" + GOOD_TOKEN.encode())


def plant_token_in_wide_text(run: Path) -> None:
    (run / "pruned" / "notes.log").write_bytes(f"token {GOOD_TOKEN}".encode("utf-16"))


def plant_token_in_weights(run: Path) -> None:
    header = json.dumps({"__metadata__": {"source": GOOD_TOKEN}}).encode()
    (run / "pruned" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def plant_token_in_graph(run: Path) -> None:
    (run / "small" / "model.onnx").write_bytes(b"graph\x00" + GOOD_TOKEN.encode())


def plant_path_in_page(run: Path) -> None:
    (run / "pruned" / "notes.html").write_text("<p>from /home/someone/models</p>")


def plant_archive(run: Path) -> None:
    with zipfile.ZipFile(run / "pruned" / "notes.zip", "w") as archive:
        archive.writestr("token.txt", GOOD_TOKEN)


def plant_packed(run: Path) -> None:
    (run / "pruned" / "notes").write_bytes(gzip.compress(GOOD_TOKEN.encode()))


def plant_link(run: Path) -> None:
    outside = run.parent / "outside.json"
    outside.write_text("{}")
    (run / "pruned" / "extra.json").symlink_to(outside)


def plant_wrong_number(run: Path) -> None:
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(text.replace("97.1 %", "99.9 %"))


def plant_missing_weights(run: Path) -> None:
    for path in (run / "pruned").iterdir():
        if path.is_file():
            path.unlink()


def plant_broken_record(run: Path) -> None:
    (run / "record.json").write_text('{"format_version": 1}')


def plant_newer_record(run: Path) -> None:
    (run / "record.json").write_text('{"format_version": 99}')


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (plant_pickle, "pytorch_model.bin: expected safetensors"),
        (plant_hidden_pickle, "state.dat: expected safetensors"),
        (plant_torch_archive, "state: expected safetensors"),
        (plant_local_path, "config.json: expected no path of a machine, found '/home/someone/models/base'"),
        (plant_path_in_graph, "onnx/model.onnx: expected no path of this machine"),
        (plant_path_in_weights, "model.safetensors: expected no path of this machine"),
        (plant_token, "vanilla/mood/notes.txt: expected no secret, found what looks like a Hugging Face token"),
        (plant_token_in_page, "notes.html: expected no secret, found what looks like a Hugging Face token"),
        (plant_token_in_backup, "config.json.bak: expected no secret"),
        (plant_token_without_suffix, "assets/NOTES: expected no secret"),
        (plant_token_in_picture, "assets/comparison.png: expected no secret"),
        (plant_token_in_wide_text, "notes.log: expected no secret"),
        (plant_token_in_weights, "model.safetensors: expected no secret"),
        (plant_token_in_graph, "onnx/model.onnx: expected no secret"),
        (plant_path_in_page, "notes.html: expected no path of a machine, found '/home/someone/models"),
        (plant_archive, "notes.zip: expected a file that can be looked into, found an archive"),
        (plant_packed, "notes: expected a file that can be looked into, found an archive"),
        (plant_link, "extra.json: expected a file of the folder, found a link"),
        (plant_wrong_number, "README.md: expected every number to stand in the record, found 99.9"),
        (plant_missing_weights, "expected the files of step 'pruned'"),
        (plant_broken_record, "expected the record of a run"),
        (plant_newer_record, "format_version 1 or older, found 99"),
    ],
)
def test_refused_without_a_check_or_a_request(
    push: Push, hub: Hub, run: Path, plant: Callable[[Path], None], said: str
):
    """Once it is on the Hub it has been read: code in a pickle, a token, the name of somebody's machine."""
    plant(run)
    answer = push(run)
    assert said in answer["refused"]
    assert GOOD_TOKEN not in answer["refused"]
    assert answer["checked"] == []
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_" + "Z9z9Z9z9Z9" * 3, "(401); log in"), (READ_TOKEN, "(403); use one with write access")],
)
def test_tokens_that_may_not(push: Push, hub: Hub, run: Path, token: str, said: str):
    """The client's own words for a refused token speak of a repository that is not found."""
    answer = push(run, token=token)
    assert said in answer["refused"]
    assert token not in answer["refused"]
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("/api/repos/create", 500, "it failed itself (500)"),
        ("/preupload/", 503, "it failed itself (503)"),
        ("/objects/", 500, "(500); push again later"),
        ("/commit/", 412, "somebody else committed meanwhile (412)"),
        ("/commit/", 409, "(409)"),
        ("/commit/", 504, "it failed itself (504)"),
        ("/api/validate-yaml", 400, "it found a mistake in them (400). The Hub says: no"),
        ("/preupload/", 429, "fewer requests (429)"),
    ],
)
def test_server_that_fails(push: Push, hub: Hub, run: Path, part: str, status: int, said: str):
    """A traceback of the client says neither what failed nor whether the repository is now broken."""
    hub.rules.answers = {part: status}
    answer = push(run)
    assert said in answer["refused"]
    assert GOOD_TOKEN not in answer["refused"]
    assert all(not repository.files["main"] for repository in hub.repositories.values())


@pytest.mark.parametrize("said", [None, "{}", "<html>Welcome</html>"])
def test_commit_whose_answer_is_lost_is_found(push: Push, hub: Hub, run: Path, said: str | None):
    """A user who is told of no connection pushes again, or believes that nobody can see the model yet."""
    hub.rules.garbled = {"/commit/": said}
    answer = push(run)
    repository = hub.repositories[REPOSITORY]
    assert sorted(repository.files["main"]) == sorted(EXPECTED)
    assert answer["commit_url"] == f"{hub.url}/{REPOSITORY}/commit/{repository.commits[0]}"


def test_later_commit_whose_answer_is_lost_is_found(push: Push, hub: Hub, run: Path):
    """That files lie there is no proof: they may be those of the push before."""
    (run / "pruned" / "tokens.txt").write_text("of the older run")
    push(run, revision="trial")
    hub.rules.answers = {"/commit/": 0}
    (run / "pruned" / "tokens.txt").unlink()
    assert "there was no connection" in push(run, revision="trial")["refused"]
    (run / "assets" / "comparison.png").write_bytes(b"\x89PNG another")
    assert "there was no connection" in push(run, revision="trial")["refused"]
    hub.rules.answers = {}
    hub.rules.garbled = {"/commit/": None}
    assert push(run, revision="trial")["commit_url"].endswith(hub.repositories[REPOSITORY].commits[1])


def test_lost_answer_that_nobody_can_look_for(push: Push, hub: Hub, run: Path):
    """Whether the commit was done is not known then, and must not be claimed either way."""
    push(run)
    (run / "assets" / "comparison.png").write_bytes(b"\x89PNG another")
    hub.rules.garbled = {"/commit/": None}
    # The first look at the repository is before the commit; what follows it fails.
    hub.rules.answers = {}
    hub.rules.unreachable_after = "/commit/"
    refused = push(run)["refused"]
    assert "whether it was done could not be seen" in refused
    assert "push again" in refused


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("/api/repos/create", "{}"),
        (f"/api/models/{REPOSITORY}", "[]"),
        (f"/api/models/{REPOSITORY}$", '{"id": "tester/artificial", "private": true}'),
        ("/tree/", "<html>Welcome</html>"),
        ("/tree/", '"?"'),
        ("/preupload/", "{}"),
        ("/objects/batch", '"?"'),
        ("/commit/", "{}"),
        ("/commit/", "<html>Welcome</html>"),
    ],
)
def test_answers_that_are_none(push: Push, hub: Hub, run: Path, part: str, said: str):
    """A page to log in, sent by some network instead of the Hub's answer, came to `KeyError: 'commitUrl'`."""
    hub.rules.garbled = {part: said}
    hub.rules.skipped = True
    refused = push(run)["refused"]
    assert f"expected an answer of the Hub for '{REPOSITORY}', but found something else" in refused
    assert "HF_ENDPOINT" in refused
    assert all(not repository.files["main"] for repository in hub.repositories.values())


def test_repository_holds_what_the_run_holds_now(push: Push, hub: Hub, run: Path):
    """Weights of an older run beside a card that speaks of another one are taken for what the card describes."""
    (run / "pruned" / "tokens.txt").write_text("of the older run")
    push(run)
    hub.repositories[REPOSITORY].change({"LICENSE": b"MIT", ".gitattributes": b"", "onnx/extra.md": b"x"}, "By hand")
    hub.repositories[REPOSITORY].change({"assets/comparison.png": b"better"}, "By hand")
    hub.repositories[REPOSITORY].change({".hub/notes.yaml": b"of the Hub's own"}, COMMIT_TITLE)
    (run / "pruned" / "tokens.txt").unlink()
    (run / "assets" / "comparison.png").unlink()
    (run / "assets" / "interference.png").unlink()
    (run / "README.md").write_text(render_card(make_record(), RECIPE, pictures=()))
    answer = push(run)
    there = hub.repositories[REPOSITORY].files["main"]
    expected = {*EXPECTED, "LICENSE", ".gitattributes", "onnx/extra.md", ".hub/notes.yaml"} - {
        "assets/interference.png"
    }
    assert there.keys() == expected
    assert answer["removed"] == ["assets/interference.png", "tokens.txt"]
    assert answer["kept"] == [".hub/notes.yaml", "LICENSE", "assets/comparison.png", "onnx/extra.md"]
    assert there["assets/comparison.png"] == b"better"
    assert len(hub.repositories[REPOSITORY].commits) == 5


def test_older_files_of_another_branch_go(push: Push, hub: Hub, run: Path):
    """A new branch starts with the files of main."""
    push(run)
    (run / "assets" / "interference.png").unlink()
    (run / "README.md").write_text(render_card(make_record(), RECIPE, pictures=("comparison.png",)))
    assert push(run, revision="trial")["removed"] == ["assets/interference.png"]
    assert sorted(hub.repositories[REPOSITORY].files["main"]) == sorted(EXPECTED)
    assert "assets/interference.png" not in hub.repositories[REPOSITORY].files["trial"]


def test_what_others_changed_is_named_when_it_is_replaced(push: Push, hub: Hub, run: Path):
    """A card that somebody worked on at the Hub is not lost without a word."""
    push(run)
    same = hub.repositories[REPOSITORY].files["main"]
    changed = {"README.md": b"better words", "recipe.yaml": b"a: 1"}
    hub.repositories[REPOSITORY].change({**same, **changed}, "Update README.md")
    assert push(run)["replaced"] == ["README.md", "recipe.yaml"]
    assert push(run)["replaced"] == []


def test_commit_of_others_in_between_is_not_overwritten(push: Push, hub: Hub, run: Path):
    """What is removed is chosen by a look at the repository, which somebody may change right after."""
    push(run)
    (run / "assets" / "comparison.png").write_bytes(b"\x89PNG another")
    hub.rules.commit_before = "/preupload/"
    assert "somebody else committed meanwhile (412)" in push(run)["refused"]
    assert hub.repositories[REPOSITORY].files["main"]["assets/comparison.png"] == b"\x89PNG invented"


def test_passing_failure_is_survived(push: Push, hub: Hub, run: Path):
    """One lost upload among many must not cost the whole push."""
    hub.rules.answers = {"/objects/": 503}
    hub.rules.once = True
    assert push(run)["commit_url"]
    assert len(hub.repositories[REPOSITORY].commits) == 1


def test_token_is_in_no_log(push: Push, hub: Hub, run: Path, push_log: Path):
    """Logs are pasted into bug reports."""
    hub.rules.answers = {"/commit/": 403}
    push(run)
    hub.reset()
    push(run)
    assert GOOD_TOKEN not in push_log.read_text()


def test_token_of_the_environment_is_in_no_message(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A token that nobody passed is still sent, and a server or proxy may echo it."""
    secret = "odd-looking-secret-of-a-proxy"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: fail(f"the server said: {secret} and {GOOD_TOKEN}"))
    with pytest.raises(PublishingError) as caught:
        push_folder(run, REPOSITORY, check=lambda folders: [])
    assert "the server said: *** and ***" in str(caught.value)
    assert caught.value.__cause__ is None
    assert secret not in "".join(capfd.readouterr())


def fail(message: str) -> None:
    raise OSError(message)


def test_unreachable_hub_is_one_message(tmp_path: Path, run: Path):
    """Without a network the client's traceback fills the screen; here the client is offline, as in all tests."""
    with pytest.raises(PublishingError, match="expected to reach the Hub for 'tester/artificial'"):
        push_folder(run, REPOSITORY, check=lambda folders: [])


@pytest.mark.parametrize("name", ["a/b/c", "has space", "-x", ""])
def test_repository_names_that_cannot_be(run: Path, name: str):
    """The Hub would refuse the name only after the check has loaded every model."""
    with pytest.raises(PublishingError, match="expected a repository such as"):
        push_folder(run, name, check=lambda folders: pytest.fail("checked first"))


def test_missing_folder(tmp_path: Path):
    """A misspelt folder must not make an empty repository."""
    with pytest.raises(PublishingError, match="expected a folder to push"):
        push_folder(tmp_path / "nowhere", REPOSITORY, check=lambda folders: [])


def test_plain_folder_with_its_own_card(tmp_path: Path):
    """`push_folder` is also for people without a recipe."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: transformers\nlicense: mit\npipeline_tag: text-classification\n"
        "tags: [hf_mtcompress]\n---\n# It\n"
    )
    (tmp_path / "README.new.md").write_text("another")
    seen: list[Path] = []
    result = push_folder(tmp_path, REPOSITORY, check=lambda folders: seen.extend(folders) or [], dry_run=True)
    assert [file.path for file in result.files] == ["README.md", "config.json"]
    assert seen == [tmp_path]
    assert result.total_bytes == sum((tmp_path / file.path).stat().st_size for file in result.files)


def test_plain_folder_without_a_card(tmp_path: Path):
    """A model without a card says neither what it does nor under which licence."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PublishingError, match=r"README\.md: expected a model card"):
        push_folder(tmp_path, REPOSITORY, check=lambda folders: [])


def test_collect_leaves_work_and_steps_at_home(run: Path):
    """Half-made folders, optimizer states, probes with rows of the data and every intermediate step would go public."""
    files = collect_repository(run, make_record())
    assert list(files) == sorted(EXPECTED)
    assert all(path.is_relative_to(run) for path in files.values())


@pytest.mark.parametrize("form", ["bitsandbytes", "torchao"])
def test_few_bits_lie_beside_the_float_model(tmp_path: Path, form: Literal["bitsandbytes", "torchao"]):
    """A k-bit model at the root would shadow the float one that everybody can load."""
    record = make_record()
    small = record.steps[-1].artefacts[0]
    small.form, small.precision = form, "int8"
    write_run(tmp_path / "run", record)
    files = collect_repository(tmp_path / "run", record)
    assert files["model.safetensors"].parent.name == "pruned"
    assert files[f"{form}/model.safetensors"].parent.name == "small"
    assert files["onnx/model.onnx"].parent.name == "teacher-int8"
