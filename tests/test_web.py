"""The page that segments photos in a browser: its builder and its server, and the page itself in headless Chromium."""

import base64
import functools
import http.client
import http.server
import io
import json
import pathlib
import re
import shutil
import tarfile
import threading

import numpy as np
import pytest
import tiny
from conftest import errors
from PIL import Image

import backbones
import inference
from common import UserError

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")

from onnx_model import OnnxModel, start_session
from web import build, serve

NEEDED = ["index.html", "model.json", "model-fp32.onnx", "model-int8.onnx", *(f"ort/{name}" for name in build.NOTICES)]
NEEDED += [f"ort/{name}" for names in build.FILES.values() for name in names]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, learned_teachers, few) -> dict[str, pathlib.Path]:
    """A tiny network that has learned `few`, in both precisions."""
    out = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "build_backbone", tiny.tiny_backbone)
        patch.setattr("sys.argv", ["build.py"])
        args = build.parse_args(["--ckpt", str(learned_teachers[0]), "--out", str(out), "--data", str(few)])
        return dict(zip(args.precision, build.export_models(args), strict=True))


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> pathlib.Path:
    """The cache, with an archive in the place of onnxruntime-web's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = build.cache_folder() / build.ARCHIVE
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name in [*build.FILES["int8"], *build.FILES["fp32"], "ort.node.min.mjs"]:
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    monkeypatch.setattr(build, "SHA512", sha512(archive))
    return archive


def sha512(path) -> str:
    return base64.b64encode(build.hashlib.sha512(path.read_bytes()).digest()).decode()


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- the builder ----


@pytest.mark.slow
def test_the_folder_is_complete_and_holds_nothing_else(script, tmp_path, stand_in, exported):
    out = tmp_path / "page"
    code, said, err = script(build, "--ckpt", exported["int8"], exported["fp32"], "--out", out)
    assert code == 0 and f"python -m web.serve {out}" in said, err
    assert files(out) == {*NEEDED}
    about = json.loads((out / "model.json").read_text())
    model = OnnxModel(out / "model-int8.onnx")
    assert about["classes"] == ["ground", "red", "blue"] and about["palette"] == model.metadata["palette"]
    assert [entry["precision"] for entry in about["models"]] == ["int8", "fp32"]
    for entry in about["models"]:
        path = exported[entry["precision"]]
        assert (out / entry["file"]).read_bytes() == path.read_bytes() and entry["bytes"] == path.stat().st_size
    assert (out / "ort" / "ort.wasm.min.mjs").read_text() == "ort.wasm.min.mjs"  # from the archive
    assert "Microsoft" in (out / "ort" / "LICENSE").read_text()
    # built again with one model, the other is gone, and so is what needs it alone
    assert script(build, "--ckpt", exported["int8"], "--out", out)[0] == 0
    assert {path for path in files(out) if path.endswith(".onnx")} == {"model-int8.onnx"}
    assert len(json.loads((out / "model.json").read_text())["models"]) == 1


@pytest.mark.slow
def test_what_the_page_cannot_use_is_refused(script, tmp_path, stand_in, exported, ckpt):
    fp32, int8 = exported["fp32"], exported["int8"]
    assert "no such checkpoint" in errors(script, build, "--ckpt", "absent.pt")
    assert "no such file" in errors(script, build, "--ckpt", "absent.onnx")
    assert "is for a checkpoint" in errors(script, build, "--ckpt", fp32, "--precision", "fp32")
    assert "give one checkpoint" in errors(script, build, "--ckpt", ckpt, fp32)
    assert "invalid choice: 'fp16'" in errors(script, build, "--ckpt", ckpt, "--precision", "fp16")
    shutil.copy(fp32, tmp_path / "again.onnx")
    assert "second file in fp32" in errors(script, build, "--ckpt", fp32, tmp_path / "again.onnx")
    other = tmp_path / "other.onnx"
    other.write_bytes(int8.read_bytes().replace(b'"ground"', b'"Ground"'))
    assert "other classes than" in errors(script, build, "--ckpt", fp32, other)
    other.write_bytes(fp32.read_bytes().replace(b'"size": null', b'"size":[9,9]'))
    assert "at any size" in errors(script, build, "--ckpt", other)
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "index.html").write_text("mine")
    assert "holds other files" in errors(script, build, "--ckpt", fp32, "--out", mine)
    assert files(mine) == {"index.html"}


@pytest.mark.slow
def test_an_archive_with_other_bytes_is_refused(script, tmp_path, stand_in, exported):
    stand_in.write_bytes(stand_in.read_bytes()[:-1] + b"x")
    err = errors(script, build, "--ckpt", exported["fp32"], "--out", tmp_path / "page")
    assert f"{stand_in}: is not onnxruntime-web" in err and "delete it" in err
    assert not files(tmp_path / "page")


def test_npm_downloads_once_and_what_it_cannot_is_one_line(tmp_path, stand_in, monkeypatch, capfd):
    packed = stand_in.rename(tmp_path / "packed.tgz")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=r"npm, which downloads .* is not installed; install Node.js, or put https://registry"):
        build.runtime_archive()
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho npm error code ENOTFOUND >&2\necho npm error more >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=r"cannot download .* \(code ENOTFOUND\); try again when this machine is online"):
        build.runtime_archive()
    npm.write_text(f'#!/bin/sh\nfor last; do :; done\n/bin/cp {packed} "$last/{build.ARCHIVE}"\n')
    assert build.runtime_archive() == stand_in and stand_in.exists()
    npm.unlink()
    assert build.runtime_archive() == stand_in
    assert [path.name for path in stand_in.parent.iterdir()] == [build.ARCHIVE]
    assert not capfd.readouterr().err


def test_the_page_refers_to_nothing_outside_its_folder_and_runs_only_its_own_script():
    html = build.page()
    assert not re.search(r"""(?:https?:)?//[\w.-]+\.\w""", html)
    assert {*re.findall(r"""(?:src|href)="([^"]*)""", html)} == {"data:,", "ort/LICENSE", "ort/ThirdPartyNotices.txt"}
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert not re.search(r"unsafe-(?!eval)|(?<!wasm-)unsafe-eval|https?:|\*|HASH", policy)
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "document.write" not in html
    assert max(map(len, build.PAGE.read_text(encoding="utf-8").splitlines())) <= 128


# ---- the server ----


@pytest.fixture
def served(tmp_path):
    """get(path) -> (status, headers, body), from a server of a folder with a page."""
    folder = tmp_path / "site"
    (folder / "ort").mkdir(parents=True)
    (folder / "index.html").write_text("page")
    (folder / "ort" / "a.mjs").write_text("module")
    (folder / "ort" / "a.wasm").write_bytes(b"wasm")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "site-2").mkdir()
    (tmp_path / "site-2" / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "link").symlink_to(tmp_path / "site-2")
    with serve.open_server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

        def get(path):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

        yield get
        server.shutdown()


def test_the_server_sends_the_two_headers_and_the_types_that_browsers_ask_for(served):
    for path, kind in (("/", "text/html"), ("/ort/a.mjs", "text/javascript"), ("/ort/a.wasm", "application/wasm"), ("/no", "")):
        status, headers, _ = served(path)
        assert status == (200 if kind else 404) and headers["Content-Type"].startswith(kind)
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"


@pytest.mark.parametrize("path", [
    "/../secret.txt", "/%2e%2e/secret.txt", "/ort/..%2f../secret.txt", "/link.txt", "/link/secret.txt", "/../site-2/secret.txt",
    "//secret.txt", "/ort/", "/link/",
])  # fmt: skip
def test_the_server_serves_nothing_outside_its_folder_and_no_lists(served, path):
    status, _, body = served(path)
    assert status == 404 and b"secret" not in body


def test_the_server_is_for_this_machine_and_refuses_with_one_line(script, tmp_path, served):
    assert "holds no index.html; build it" in errors(script, serve, tmp_path / "absent")
    assert "--port 99999" in errors(script, serve, tmp_path / "site", "--port", "99999")
    with serve.open_server(tmp_path / "site", 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert "--port" in errors(script, serve, tmp_path / "site", "--port", str(server.server_port))


def test_a_browser_that_goes_away_leaves_no_traceback(served, tmp_path, monkeypatch, capfd):
    """Such as one in which the page is loaded again while it still gets the network."""
    gone = threading.Event()

    def copyfile(self, source, target):
        gone.set()
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(serve.Handler, "copyfile", copyfile)
    with pytest.raises(http.client.IncompleteRead):
        served("/")
    assert gone.is_set()
    monkeypatch.undo()
    assert served("/%00")[0] == 404 and served("/")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


# ---- the page, in a browser ----

FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]  # WebGPU on the CPU
SEGMENT = """async (text) => {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d", { alpha: false });
  canvas.drawImage(image, 0, 0);
  const labels = await window.segment(canvas.getImageData(0, 0, image.width, image.height));
  return Array.from(labels);
}"""
TWO_CLICKS = """() => {
  const media = navigator.mediaDevices, ask = media.getUserMedia.bind(media);
  window.asked = 0;
  media.getUserMedia = (...what) => (window.asked++, ask(...what));
  document.getElementById("camera").click();
  document.getElementById("camera").click();
}"""
CANVAS = """(id) => document.getElementById(id).toDataURL("image/png").split(",")[1]"""


@pytest.fixture(scope="session")
def page_folder(tmp_path_factory, exported) -> pathlib.Path:
    try:
        archive = build.runtime_archive()
    except UserError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("page")
    build.build_page([*exported.values()], archive, out)
    return out


@pytest.fixture(scope="session")
def open_page(page_folder):
    """open_page(*flags, headers=True) -> a page of a headless Chromium that shows the folder, ready to use."""
    api = pytest.importorskip("playwright.sync_api", reason="the extra `web` is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    plain = functools.partial(QuietHandler, directory=str(page_folder))
    servers = {True: serve.open_server(page_folder, 0), False: http.server.ThreadingHTTPServer(("127.0.0.1", 0), plain)}
    for server in servers.values():
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with api.sync_playwright() as playwright:
        browsers = {}

        def open_one(*flags, headers=True):
            if flags not in browsers:
                browsers[flags] = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, *flags])
            page = browsers[flags].new_page()
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{servers[headers].server_port}/")
            api.expect(page.locator("#time")).to_contain_text("Ready.")
            return page

        yield open_one
        for browser in browsers.values():
            browser.close()
    for server in servers.values():
        server.shutdown()
        server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def scenes(few) -> list[np.ndarray]:
    """Larger scenes than the network learned, (H, W, 3) uint8."""
    images = [np.asarray(Image.open(few / "images" / f"val{i}.png")) for i in range(8)]
    tall = np.concatenate([np.concatenate(images[:4]), np.concatenate(images[4:])], 1)  # (128, 64)
    return [tall, np.concatenate([tall, tall[::-1], tall], 1)[:101, :]]  # (101, 192)


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def labels_in(page, image) -> np.ndarray:
    labels = page.evaluate(SEGMENT, base64.b64encode(png(image)).decode())
    return np.array(labels, np.uint8).reshape(image.shape[:2])


def equal_labels(page, folder, precision, scenes) -> float:
    """The fraction of pixels that the page and ONNX Runtime on the CPU label alike."""
    session = start_session(folder / f"model-{precision}.onnx")
    expected = [session.run(None, {"image": image[None]})[0][0] for image in scenes]
    assert all(len(np.unique(labels)) == 3 for labels in expected)
    return np.mean(np.concatenate([(labels_in(page, i) == e).ravel() for i, e in zip(scenes, expected, strict=True)]))


@pytest.mark.slow
@pytest.mark.parametrize("precision, least", [("fp32", 0.999), ("int8", 0.99)])
def test_wasm_gives_the_labels_of_onnx_runtime(open_page, page_folder, scenes, precision, least):
    page = open_page()
    page.select_option("#backend", f"{precision}-wasm")
    assert page.evaluate("crossOriginIsolated")
    assert equal_labels(page, page_folder, precision, scenes) >= least
    page.close()


@pytest.mark.slow
def test_webgpu_gives_the_labels_of_onnx_runtime(open_page, page_folder, scenes):
    page = open_page(*GPU)
    if page.locator("#backend option[value=fp32-webgpu]").is_disabled():
        pytest.skip("this Chromium has no WebGPU")
    page.select_option("#backend", "fp32-webgpu")
    assert equal_labels(page, page_folder, "fp32", scenes[:1]) >= 0.999
    page.close()


@pytest.mark.slow
def test_without_the_headers_it_runs_on_one_thread_and_says_so(open_page, page_folder, scenes):
    page = open_page(headers=False)
    assert "one thread" in page.inner_text("#notes") and "python -m web.serve" in page.inner_text("#notes")
    assert equal_labels(page, page_folder, "int8", scenes) >= 0.99
    show(page, "photo.png", png(scenes[0]))
    assert "int8, CPU (wasm), one thread" in page.inner_text("#time")
    page.close()


def show(page, name, content, result="ms per frame"):
    """Choose a file, and wait for a line about the time that holds `result`."""
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})
    page.locator("#time", has_text=result).wait_for()


@pytest.mark.slow
def test_a_photo_is_shown_with_its_mask_and_the_classes_that_are_in_it(open_page, page_folder, few):
    page = open_page()
    squares = np.asarray(Image.open(few / "images" / "val0.png")).repeat(24, 0).repeat(40, 1)  # 768 x 1280
    noise = np.random.default_rng(0).integers(-80, 80, squares.shape)  # which shows how the page resizes
    image = np.clip(squares + noise, 0, 255).astype(np.uint8)
    show(page, "<b>bold</b>.png", png(image))
    assert "1280×768, seen by the network at 512×307" in page.inner_text("#sizes")
    assert page.inner_text("#sizes").count("<b>bold</b>.png") == 1  # as text
    small = inference.resize(image, (307, 512))
    (labels,) = start_session(page_folder / "model-int8.onnx").run(None, {"image": small[None]})[0]
    about = json.loads((page_folder / "model.json").read_text())
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(page.evaluate(CANVAS, "mask")))).convert("RGB"))
    assert mask.shape == image.shape
    rows, columns = (np.arange(768) + 0.5) * 307 // 768, (np.arange(1280) + 0.5) * 512 // 1280
    nearest = labels[rows.astype(int)][:, columns.astype(int)]
    palette = np.array(about["palette"], np.uint8)
    assert (mask == palette[nearest]).all(-1).mean() > 0.998
    assert {*map(tuple, mask.reshape(-1, 3))} == {*map(tuple, palette[np.unique(labels)])}  # no colours between two
    found = page.locator("#legend li").all_inner_texts()
    assert {re.split(r"\s", entry)[0] for entry in found} == {about["classes"][label] for label in np.unique(labels)}
    page.close()


@pytest.mark.slow
def test_a_broken_file_and_a_camera(open_page, scenes):
    page = open_page()
    show(page, "holiday.png", b"no image", "Ready.")
    page.locator("#error", has_text="holiday.png: cannot be read as an image").wait_for()
    show(page, "photo.png", png(scenes[0]))
    assert not page.is_visible("#error")
    page.click("#camera")
    page.locator("#sizes", has_text="Camera: ").wait_for()
    page.click("#camera")
    assert page.inner_text("#camera") == "Use the camera" and not page.is_visible("#error")
    page.evaluate(TWO_CLICKS)  # while the browser asks whether it may
    page.locator("#camera", has_text="Stop").wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate("asked") == 1
    page.click("#camera")
    page.close()
