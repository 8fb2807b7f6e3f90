"""A page holds what it needs, says so when it cannot be made, and answers like Python."""

import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image

from hf_mtcompress.cli import USER_ERROR, main
from hf_mtcompress.errors import ArtifactError, MissingExtraError, UnsupportedEncoderError
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.formats.web import page as webpage
from hf_mtcompress.formats.web.page import LIBRARIES, PAGE, serve_webpage, write_webpage
from hf_mtcompress.records.forms import ONNX_MODEL
from tests.unit.formats.artefacts import Saved, saved_images, saved_text

CHROMIUM = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that nobody opens need no code of others."""
    monkeypatch.setattr(webpage, "LIBRARIES_OF_THE_PAGE", ())


@pytest.mark.usefixtures("without_libraries")
@pytest.mark.parametrize("saved", [saved_text, saved_images], ids=["text", "images"])
def test_everything_the_page_loads_lies_beside_it(saved: Any, tmp_path: Path):
    """A page that fetches something from elsewhere fails behind a firewall, and tells others who looks at it."""
    source = saved().folders["int8"]
    page = write_webpage(source, tmp_path / "page", title="Mood", facts={"kept": "99 %"}, examples=["a fox"])
    described = json.loads((page / PAGE).read_text(encoding="utf-8"))
    assert described["bytes"] == (page / "model" / ONNX_MODEL).stat().st_size
    assert [task["name"] for task in described["tasks"]] == list(saved().model.tasks)
    assert described["facts"] == [["kept", "99 %"]]
    for name in ("index.html", "app.mjs", "engine.mjs", "text.mjs", "image.mjs", "answers.mjs", "style.css"):
        text = (page / name).read_text(encoding="utf-8")
        assert "http://" not in text
        assert "https://" not in text
    assert (page / "model" / "tokenizer.json").is_file() == ("text" in described)
    assert "step.json" not in {path.name for path in page.rglob("*")}
    assert not [path for path in page.rglob("*") if path.suffix == ".py"], "what writes the page is not part of it"


@pytest.mark.usefixtures("without_libraries")
def test_the_front_matter_makes_a_static_space(tmp_path: Path):
    """Without the two headers a Space computes on one thread."""
    page = write_webpage(saved_text().folders["onnx"], tmp_path / "page", title='Mood: "fine"')
    front = yaml.safe_load((page / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["title"], front["sdk"], front["app_file"]) == ('Mood: "fine"', "static", "index.html")
    assert set(front["custom_headers"].values()) == {"require-corp", "same-origin"}


@pytest.mark.usefixtures("without_libraries")
def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path):
    """A mistyped --output must not delete somebody's folder."""
    source = saved_text().folders["onnx"]
    write_webpage(source, tmp_path / "page", title="one")
    write_webpage(source, tmp_path / "page", title="two")
    assert json.loads((tmp_path / "page" / PAGE).read_text())["title"] == "two"
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="expected a new folder or an older page"):
        write_webpage(source, tmp_path / "papers", title="three")
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "years of work"
    # A clone of a Space: what its owner wrote stays, and what is not ours is not touched.
    (tmp_path / "page" / "README.md").write_text("my words")
    write_webpage(source, tmp_path / "page", title="four")
    assert (tmp_path / "page" / "README.md").read_text() == "my words"
    (tmp_path / "page" / ".git").mkdir()
    with pytest.raises(ArtifactError, match=r"found something else \(.git\)"):
        write_webpage(source, tmp_path / "page", title="five")


def test_libraries_are_exactly_those_expected(tmp_path: Path):
    """Whatever else lies in node_modules would run on every visitor's machine."""
    source = saved_text().folders["onnx"]
    with pytest.raises(ArtifactError, match="npm install --ignore-scripts onnxruntime-web@"):
        write_webpage(source, tmp_path / "page", title="x", libraries=tmp_path)
    place = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    place.mkdir(parents=True)
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        (place / name).write_text("alert('hello')")
    with pytest.raises(ArtifactError, match="found another content"):
        write_webpage(source, tmp_path / "page", title="x", libraries=tmp_path)
    assert not (tmp_path / "page").exists()


def test_a_package_with_other_content_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would be found there by every later call."""
    pack = tmp_path / "package.tgz"
    with tarfile.open(pack, "w:gz") as archive:
        for name in webpage.LIBRARIES_OF_THE_PAGE[0].files:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = 5
            archive.addfile(member, io.BytesIO(b"other"))
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\ncp "{pack}" "$4/one.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setattr(webpage, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    source = saved_text().folders["onnx"]
    with pytest.raises(ArtifactError, match=r"expected dist/ort.wasm.min.mjs.* found another content"):
        write_webpage(source, tmp_path / "page", title="x")
    pack.write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match="as npm packs it"):
        write_webpage(source, tmp_path / "page", title="x")
    assert not list((tmp_path / "home" / "mtcompress").glob("onnx*"))


@pytest.mark.usefixtures("without_libraries")
def test_a_damaged_graph_makes_no_page(tmp_path: Path):
    """It would fail in front of every visitor."""
    source = shutil.copytree(saved_text().folders["onnx"], tmp_path / "onnx")
    (source / ONNX_MODEL).write_bytes((source / ONNX_MODEL).read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="found another content"):
        write_webpage(source, tmp_path / "page", title="x")


def test_ports_are_checked_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for port in ("99999", "-1", "http"):
        with pytest.raises(SystemExit):
            main(["webpage", str(tmp_path), f"--serve={port}"])
        assert "expected a port from 0" in capsys.readouterr().err


def test_without_npm_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webpage, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"expected npm .* --libraries"):
        write_webpage(saved_text().folders["onnx"], tmp_path / "page", title="x")


def test_npm_that_fails_is_reported_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No network: the last line of npm, and no half-made folder that the next call would take for the library."""
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'network unreachable' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(webpage, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ArtifactError, match="network unreachable"):
        write_webpage(saved_text().folders["onnx"], tmp_path / "page", title="x")
    assert not list((tmp_path / "home" / "mtcompress").glob("onnx*"))


@pytest.mark.usefixtures("without_libraries")
def test_image_processors_that_pad_are_refused(tmp_path: Path):
    """The page would answer, wrongly."""
    source = shutil.copytree(saved_images().folders["onnx"], tmp_path / "onnx")
    path = source / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "size": {"shortest_edge": 32, "longest_edge": 64}}))
    with pytest.raises(UnsupportedEncoderError, match="image processor"):
        write_webpage(source, tmp_path / "page", title="x")


@pytest.mark.usefixtures("without_libraries")
def test_command_on_an_onnx_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = shutil.copytree(saved_text().folders["onnx"], tmp_path / "mood")
    assert main(["webpage", str(source), "--example", "a fox"]) == 0
    assert str(tmp_path / "mood-webpage") in capsys.readouterr().out
    assert json.loads((tmp_path / "mood-webpage" / PAGE).read_text())["examples"] == ["a fox"]
    assert main(["webpage", str(source), "--step", "int8"]) == USER_ERROR
    assert "expected a run" in capsys.readouterr().err
    assert main(["webpage", str(saved_text().folders["torch"])]) == USER_ERROR
    assert "mtcompress_onnx.json" in capsys.readouterr().err


@pytest.fixture
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Saved]]:
    """Address of a page that is being served."""
    saved, form, with_libraries = request.param
    if not with_libraries:
        request.getfixturevalue("without_libraries")
    page = write_webpage(saved().folders[form], tmp_path / "page", title="Mood")
    server = serve_webpage(page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", saved()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("served", [(saved_text, "onnx", False)], indirect=True)
def test_the_server_gives_types_and_headers_that_browsers_insist_on(served: tuple[str, Saved]):
    with urlopen(f"{served[0]}engine.mjs") as answer:
        assert answer.headers.get_content_type() == "text/javascript"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"


# ---- in a browser ----


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",  # tests may run as root
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def _ready(driver: Any, address: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(address)
    WebDriverWait(driver, 60).until(lambda one: one.find_element(By.ID, "form").is_displayed())


def _result(driver: Any) -> dict[str, Any]:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60).until(lambda one: one.execute_script("return globalThis.lastResult !== undefined"))
    return driver.execute_script("return { answers: lastResult.answers, logits: lastResult.logits }")


@pytest.mark.slow
@pytest.mark.parametrize(
    "served", [(saved_text, "onnx", True), (saved_text, "int8", True)], ids=["float32", "int8"], indirect=True
)
def test_a_sentence_is_answered_as_in_python(served: tuple[str, Saved], browser: Any):
    """Types a sentence, reads every task's answer; words, spans, several labels, a number."""
    from selenium.webdriver.common.by import By

    address, saved = served
    _ready(browser, address)
    text = saved.samples[0]
    browser.find_element(By.ID, "text").send_keys(text)
    browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
    found = _result(browser)
    (expected,) = load_predictor(_folder_of(served, browser)).predict([text])
    _assert_equal(found["answers"], expected)
    cards = browser.find_elements(By.CSS_SELECTOR, "#answers article")
    assert [card.get_attribute("data-task") for card in cards] == list(expected)
    assert expected["mood"]["label"] in cards[0].text
    assert all(word in cards[1].text for word in text.split())
    assert f"{expected['intensity']:.2f}" in cards[2].text
    assert "4 tasks in" in browser.find_element(By.ID, "time").text
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@pytest.mark.parametrize("served", [(saved_images, "onnx", True)], indirect=True)
def test_a_picture_is_answered_as_in_python(served: tuple[str, Saved], browser: Any, tmp_path: Path):
    from selenium.webdriver.common.by import By

    address, saved = served
    _ready(browser, address)
    picture = tmp_path / "picture.png"
    saved.samples[0].resize((57, 43)).save(picture)
    browser.find_element(By.ID, "image").send_keys(str(picture))
    found = _result(browser)
    (expected,) = load_predictor(_folder_of(served, browser)).predict([Image.open(picture)])
    _assert_equal(found["answers"], expected)
    assert browser.find_element(By.ID, "preview").is_displayed()


def _folder_of(served: tuple[str, Saved], browser: Any) -> Path:
    precision = browser.execute_script("return document.getElementById('summary').textContent").rpartition(" ")[2]
    return served[1].folders["int8" if precision == "int8" else "onnx"]


def _assert_equal(found: Any, expected: Any) -> None:
    """The same labels, numbers within 1e-3."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            _assert_equal(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_equal(one, other)
    else:
        assert found == expected


def test_folder_names_are_those_the_scripts_ask_for():
    """app.mjs writes the names down a second time."""
    script = Path(webpage.__file__).with_name("app.mjs").read_text(encoding="utf-8")
    assert f"./{LIBRARIES}/ort.wasm.min.mjs" in script
    assert f"./{LIBRARIES}/tokenizers.min.mjs" in script
    assert f'"{PAGE}"' in script
    assert f"model/{ONNX_MODEL}" in script
